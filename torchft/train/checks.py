"""Checks that span components, all before anything is allocated. What one component can see alone it checks itself."""

from collections.abc import Iterator

from torchft.data.holdout import held_out_names
from torchft.data.loader import grad_accum
from torchft.errors import ConfigError, Problem
from torchft.log import get_logger
from torchft.models.layers.attend import check_core
from torchft.models.spec import ModelSpec
from torchft.optim.build import check_rules
from torchft.parallel.apply import check_options
from torchft.parallel.mesh import Mesh, check_degrees
from torchft.parallel.schedules import fits, legal_counts
from torchft.train.adapter import adapter_names, check_adapter
from torchft.train.freeze import check_freeze, trained_names
from torchft.train.quantised import check_quant

log = get_logger(__name__)

PURE_BF16_LR = 1e-4  # at 1e-5 AdamW moves only a sixth of what it should: a bf16 weight of 0.02 has steps of 1.2e-4 (seen in a small run)


def check_job(cfg, spec: ModelSpec, mesh: Mesh) -> Iterator[Problem]:
    """Every problem of this config with this model on these processes."""
    yield from check_degrees(mesh.degrees, spec, cfg.parallel)
    yield from check_options(mesh, cfg.parallel, cfg.memory, cfg.compile)
    yield from check_core(cfg.model.attention, spec.attention, mesh.device.type, cfg.precision.compute_dtype)
    yield from _check_lengths(cfg, spec, mesh)
    yield from _check_batches(cfg, mesh)
    yield from _check_validation(cfg)
    yield from _check_options(cfg, spec, mesh)
    if cfg.data.streaming and cfg.train.epochs is not None:
        given, expected = f"{cfg.train.epochs} with data.streaming=true", "train.steps: what is streamed has no known end"
        yield Problem("train.epochs", given, expected, "set train.steps instead")
    if cfg.precision.params == "bf16" and cfg.optim.lr < PURE_BF16_LR:
        log.warning(
            "precision.params=bf16 with optim.lr=%g: most updates are smaller than bf16 can add and are lost; "
            "use precision.params=fp32 precision.compute=bf16, or a larger rate",
            cfg.optim.lr,
        )


def _check_options(cfg, spec: ModelSpec, mesh: Mesh) -> Iterator[Problem]:
    """Options that some models and layouts don't carry."""
    adapter = getattr(cfg, "adapter", None)  # of recipes that have one
    frozen = list(check_adapter(cfg, spec, mesh) if adapter else check_freeze(cfg, spec, mesh))
    yield from frozen
    yield from check_quant(cfg, spec)
    if not frozen:
        trained = adapter_names(adapter, spec) if adapter else trained_names(spec, cfg.model.train, cfg.model.freeze)
        yield from check_rules(trained, cfg.optim)
    if cfg.validate.prompts and (mesh.degrees["tp"] > 1 or mesh.degrees["pp"] > 1):
        yield Problem("validate.prompts", str(cfg.validate.prompts), "no prompts under parallel.tp or parallel.pp", "remove them")
    if cfg.validate.prompts and not (cfg.validate.every_steps or cfg.validate.at_start):
        yield Problem("validate.prompts", str(cfg.validate.prompts), "validation during the run", "set validate.every_steps")
    if cfg.validate.prompts and cfg.model.attention == "varlen":
        expected = "an attention core that reads a KV cache; varlen reads whole documents only"
        yield Problem("validate.prompts", str(cfg.validate.prompts), expected, "remove them, or set model.attention=flex")
    if cfg.export.best and not cfg.checkpoint.best_by:
        yield Problem("export.best", "true", "a metric in checkpoint.best_by that says which is best", "set checkpoint.best_by")
    if cfg.optim.name == "adamw_8bit" and mesh.degrees["tp"] > 1:
        expected = "parallel.tp=1: its blocks of 256 numbers can't be cut by columns"
        yield Problem("optim.name", "adamw_8bit", expected, "use optim.name=adamw or adafactor, or set parallel.tp=1")
    if cfg.train.auto_micro_batch and mesh.degrees["pp"] > 1:
        expected = "parallel.pp=1: the other stages would wait for the one that ran out of memory"
        yield Problem("train.auto_micro_batch", "true", expected, "set train.micro_batch_size by hand")


def _check_lengths(cfg, spec: ModelSpec, mesh: Mesh) -> Iterator[Problem]:
    if cfg.data.seq_len > spec.max_seq_len:
        given, most = f"{cfg.data.seq_len}", spec.max_seq_len
        yield Problem("data.seq_len", given, f"at most the model's {most} (max_position_embeddings)", f"use data.seq_len={most} or less")
    tp = mesh.degrees["tp"]
    if cfg.data.seq_len % tp:
        down = cfg.data.seq_len - cfg.data.seq_len % tp
        yield Problem("data.seq_len", str(cfg.data.seq_len), f"a multiple of parallel.tp={tp}", f"use {down} or {down + tp}")


def _check_batches(cfg, mesh: Mesh) -> Iterator[Problem]:
    try:
        count = grad_accum(cfg.train.global_batch_size, micro_batch_size=cfg.train.micro_batch_size, dp_size=mesh.dp_size)
    except ConfigError as error:
        yield from error.problems
        return
    pp = mesh.degrees["pp"]
    if pp > 1 and not fits(cfg.parallel.schedule, pp, count):
        legal = legal_counts(cfg.parallel.schedule, pp, count)
        expected = f"a number of micro-batches a step that {cfg.parallel.schedule} takes on {pp} ranks: {legal}; this gives {count}"
        sizes = [n * mesh.dp_size * cfg.train.micro_batch_size for n in legal]
        yield Problem("train.global_batch_size", str(cfg.train.global_batch_size), expected, f"use one of {sizes}")


def _check_validation(cfg) -> Iterator[Problem]:
    names = [*cfg.data.validation, *held_out_names(cfg.data)]
    if (cfg.validate.every_steps or cfg.validate.at_start) and not names:
        key = "validate.every_steps" if cfg.validate.every_steps else "validate.at_start"
        fix = "add data.validation.NAME.path, or data.validation_size"
        yield Problem(key, str(cfg.validate.every_steps or True), "a source in data.validation", fix)
    sources = [f"val/{name}/" for name in names]
    for key, metric in (("checkpoint.best_by", cfg.checkpoint.best_by), ("validate.early_stop.metric", cfg.validate.early_stop.metric)):
        if metric and not any(metric.startswith(source) for source in sources):
            expected = f"a metric of one of {[source + 'loss' for source in sources]}"
            yield Problem(key, metric, expected, "name a metric of a source in data.validation")
        elif metric and not cfg.validate.every_steps:
            yield Problem(key, metric, "validation during the run", "set validate.every_steps")
