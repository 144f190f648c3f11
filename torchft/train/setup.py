"""Everything a training recipe needs, built in the one right order: `build_job(cfg, run)`.

    checks --> text, caches --> loader, schedule --> stages on meta --> parallelize --> optimizer --> resume, or weights

Nothing is allocated before every check has passed. A recipe's loop then uses the Job's parts.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torchft.checkpoint.hub import local_folder
from torchft.checkpoint.load import load_weights_only
from torchft.checkpoint.new_rows import NewRows
from torchft.checkpoint.store import Store
from torchft.dtypes import DTYPES
from torchft.errors import ConfigError, Problem
from torchft.log import get_logger
from torchft.losses.cross_entropy import build_loss
from torchft.models.build import read_config
from torchft.models.custom import CustomSpec, custom_spec
from torchft.models.init import init_weights
from torchft.models.layers.attend import choose_core
from torchft.models.spec import ModelSpec
from torchft.models.vocabulary import VocabConfig, resize_spec
from torchft.optim.build import build_optimizer
from torchft.optim.schedules import ScheduleConfig, build_schedule
from torchft.parallel.apply import parallelize
from torchft.parallel.mesh import Mesh
from torchft.parallel.parts import Parts
from torchft.parallel.pp import build_stages
from torchft.peft.dropout import keyed_layers
from torchft.peft.methods import apply_adapter, base_names
from torchft.train.adapter import built_spec, init_adapter, prepare_optimizer, shape_of, train_new_tokens, virtual_tokens
from torchft.train.checks import check_job
from torchft.train.data import (
    Rows,
    build_loader,
    build_text,
    build_tokens,
    check_prompts,
    check_vocabulary,
    data_facts,
    encode_prompts,
)
from torchft.train.early_stop import EarlyStop, EarlyStopConfig
from torchft.train.eva import begin_with_eva
from torchft.train.freeze import apply_freeze, base_of
from torchft.train.job import Job
from torchft.train.quantised import has_quant, load_base, narrow_frozen, quantise
from torchft.train.run import Run
from torchft.train.scaler import LossScaler
from torchft.train.spikes import SpikeConfig, Spikes
from torchft.train.step import NonFinite

log = get_logger(__name__)


@dataclass
class ModelConfig:
    path: str | None = None  # HF folder (config.json and safetensors; `torchft convert` makes one), or a hub id: org/name[@revision]
    family: str | None = None  # instead of path: a family, such as llama ...
    size: str | None = None  # ... and one of its named sizes ...
    spec: CustomSpec = field(default_factory=CustomSpec)  # ... or, or with, numbers of your own
    init: Literal["weights", "random"] = "weights"  # weights: read them from path; random: fresh from the seed
    train: list[str] = field(default_factory=list)  # parameters to train: globs on names, first:N, last:N (layers); empty: all
    freeze: list[str] = field(default_factory=list)  # parameters to freeze of those, written the same way
    vocab: VocabConfig = field(default_factory=VocabConfig)  # more tokens than model.path has, and padding of the vocabulary
    attention: Literal["auto", "sdpa", "eager", "flex", "varlen"] = (
        "auto"  # attention core; auto: eager on a CPU and if the model caps scores, else sdpa
    )

    def check(self) -> Iterator[Problem]:
        if bool(self.path) == bool(self.family):
            given = f"{self.path!r} and model.family={self.family!r}"
            yield Problem("model.path", given, "a HF folder, or model.family with model.size", "give exactly one of them")
        elif self.path and self.spec.given():
            fix = "leave model.spec out, or give model.family instead of model.path"
            yield Problem("model.spec", ", ".join(self.spec.given()), "nothing: config.json in model.path has the numbers", fix)
        elif self.family and not self.size and self.spec.missing():
            expected = f"a named size of {self.family}, or model.spec with {', '.join(self.spec.missing())}"
            yield Problem("model.size", "nothing", expected, "see docs/models.md for the sizes")
        elif self.family and self.init == "weights":
            yield Problem("model.init", "weights", "random, since model.family has no weights", "set model.init=random, or give model.path")


@dataclass
class TrainConfig:
    steps: int | None = None  # optimizer steps in all; or give epochs
    epochs: float | None = None  # passes over the data, parts allowed; or give steps
    global_batch_size: int = 8  # rows (packs, or samples without packing) of one optimizer step over all ranks
    micro_batch_size: int = 1  # rows at once on one rank; the rest is accumulated
    neftune: float | None = None  # noise on the embeddings in training (NEFTune), its alpha, e.g. 5; null: none
    auto_micro_batch: bool = False  # out of memory: halve micro_batch_size on all ranks, keep the global batch, and try the step again
    nonfinite: NonFinite = field(default_factory=NonFinite)  # what to do when loss or gradients are not finite
    spike: SpikeConfig = field(default_factory=SpikeConfig)  # leave out steps whose loss lies far above the recent ones
    time_limit_s: float | None = None  # save and stop (exit code 75) once this process has run so long; null: no limit
    max_crashes: int = 3  # give up when so many attempts in a row, restarted by torchrun or Slurm, died at the same step; 0: never

    def check(self) -> Iterator[Problem]:
        if (self.steps is None) == (self.epochs is None):
            yield Problem("train.steps", f"{self.steps} with train.epochs={self.epochs}", "exactly one of the two", "set one of them")
        for key in ("steps", "epochs", "global_batch_size", "micro_batch_size"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                yield Problem(f"train.{key}", str(value), "more than 0", "use a positive number")
        if self.time_limit_s is not None and not self.time_limit_s > 0:
            yield Problem("train.time_limit_s", str(self.time_limit_s), "more than 0 seconds, or null", "use null for no limit")
        if self.max_crashes < 0:
            yield Problem("train.max_crashes", str(self.max_crashes), "0 or more", "use 0 for never")
        if self.neftune is not None and not self.neftune > 0:
            yield Problem("train.neftune", str(self.neftune), "more than 0, or null", "use e.g. 5, or null for no noise")


@dataclass
class ValidateConfig:
    every_steps: int = 0  # validate every so many steps and at the end; 0: never
    at_start: bool = False  # also before the first step
    micro_batch_size: int | None = None  # rows at once on one rank; null: train.micro_batch_size
    prompts: list[str] = field(default_factory=list)  # continued at each validation into samples/ (one process or FSDP2)
    prompt_tokens: int = 64  # new tokens for each of them
    early_stop: EarlyStopConfig = field(default_factory=EarlyStopConfig)  # end the run when a metric stops getting better

    def check(self) -> Iterator[Problem]:
        if self.every_steps < 0:
            yield Problem("validate.every_steps", str(self.every_steps), "0 or more", "use 0 for never")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            yield Problem("validate.micro_batch_size", str(self.micro_batch_size), "at least 1, or null", "use null")
        if self.prompt_tokens < 1:
            yield Problem("validate.prompt_tokens", str(self.prompt_tokens), "at least 1", "use e.g. 64")

    def is_due(self, step: int, *, last: int) -> bool:
        """True after every `every_steps` steps and after the last."""
        return self.every_steps > 0 and (step % self.every_steps == 0 or step == last)


def build_job(cfg, run: Run) -> Job:
    """cfg: a recipe's config. Raises ConfigError, DataError or CheckpointError; a rank that fails alone is ended by the launcher."""
    mesh, world = run.mesh, run.world
    run.check_restart()
    use_local_copies(cfg)
    base = read_spec(cfg.model, packed=has_quant(cfg))
    spec = built_spec(cfg, resize_spec(base, cfg.model.vocab))
    train_new_tokens(cfg, base, spec)
    _raise_if_any(check_job(cfg, spec, mesh))
    text = build_text(cfg.tokenizer, cfg.model.path)
    _raise_if_any(itertools.chain(check_vocabulary(spec, text, cfg.tokenizer), check_prompts(cfg.validate.prompts, spec, text)))
    tokens = build_tokens(cfg.data, text, world, virtual_tokens(cfg, spec))
    run.record(data=data_facts(tokens.train, tokens.validation))
    rows = Rows(cfg.train.micro_batch_size, row_multiple(mesh), mesh)
    loader = build_loader(tokens.train, cfg.data, rows, text, global_batch_size=cfg.train.global_batch_size, seed=cfg.seed)
    build_schedule(cfg.schedule, cfg.optim.lr, cfg.train.steps or loader.num_steps(cfg.train.epochs))  # raises if it does not fit
    begin_with_eva(cfg, spec, run.folder, mesh, text, tokens)
    parts = build_parts(cfg, spec, mesh)
    optimizer = build_optimizer(parts.named_parameters(copies=True), cfg.optim)
    if adapter := getattr(cfg, "adapter", None):
        prepare_optimizer(adapter, optimizer, parts)
    early_stop = EarlyStop(cfg.validate.early_stop)
    scaler = LossScaler(cfg.precision) if cfg.precision.compute == "fp16" else None
    spikes = Spikes(cfg.train.spike) if cfg.train.spike.zscore else None
    saved: dict[str, Any] = {}  # filled below; the store asks for it at each save
    store = Store(
        run.folder / "checkpoints",
        parts,
        optimizer,
        cfg.checkpoint,
        extra_state=lambda: {**run.counters(), "loader": loader.state(), **_states(early_stop, scaler, spikes), **saved},
        config_hash=run.config_hash,
        mesh=mesh.degrees,
        base=base_of(cfg),
        on_saved=run.note_save,
    )
    run.at_end(store.wait)
    state = _resume(cfg, spec, store, restarted=run.restarted)
    if state is not None:
        loader.load_state(state["loader"])
        run.restore(state)
        _load_states(state, early_stop, scaler, spikes)
    num_steps = cfg.train.steps or loader.num_steps(cfg.train.epochs)
    saved["schedule"] = {**asdict(cfg.schedule), "lr": cfg.optim.lr, "num_steps": num_steps}
    if state is not None:
        check_schedule(saved["schedule"], state["schedule"])
    run.begin(spec, parts, optimizer, num_steps=num_steps, seq_len=cfg.data.seq_len)
    if early_stop.is_over:
        run.end_early(run.step, "as before: no better validate.early_stop.metric")
    return Job(
        spec=spec,
        text=text,
        parts=parts,
        loss=build_loss(cfg.loss),
        optimizer=optimizer,
        schedule=build_schedule(cfg.schedule, cfg.optim.lr, num_steps),
        loader=loader,
        store=store,
        rows=replace(rows, micro_batch_size=cfg.validate.micro_batch_size or rows.micro_batch_size),
        data=cfg.data,
        validation=tokens.validation,
        num_steps=num_steps,
        early_stop=early_stop,
        scaler=scaler,
        spikes=spikes,
        noise=(cfg.train.neftune or 0.0, cfg.seed) if cfg.train.neftune or keyed_layers(parts.modules) else None,
        prompts=encode_prompts(cfg.validate.prompts, text),
        ledger=cfg.debug.ledger,
    )


def read_spec(cfg: ModelConfig, *, packed: bool = False) -> ModelSpec:
    """The model as model.path or model.family has it. packed: it may be a GPTQ or AWQ folder."""
    return read_config(cfg.path, packed=packed)[0] if cfg.path else custom_spec(cfg.family or "", cfg.size, cfg.spec)


def _resume(cfg, spec: ModelSpec, store: Store, *, restarted: bool) -> dict[str, Any] | None:
    """Fills the model, and on a resume the optimizer; the checkpoint's state, None for a new run."""
    if store.base is not None:  # checkpoints don't hold what is frozen
        load_initial_weights(cfg, spec, store.parts)
    state = store.resume(restarted=restarted)
    if state is None and store.base is None:
        load_initial_weights(cfg, spec, store.parts)
    return state


def _states(early_stop: EarlyStop, scaler: LossScaler | None, spikes: Spikes | None) -> dict[str, Any]:
    """Of state.json, what options keep."""
    return {"early_stop": early_stop.state(), "scaler": scaler and scaler.state(), "spikes": spikes and spikes.state()}


def _load_states(state: dict[str, Any], early_stop: EarlyStop, scaler: LossScaler | None, spikes: Spikes | None) -> None:
    """Goes on from `_states`; a run without that option left nothing."""
    if state.get("early_stop"):
        early_stop.load_state(state["early_stop"])
    if scaler and state.get("scaler"):
        scaler.load_state(state["scaler"])
    if spikes and state.get("spikes"):
        spikes.load_state(state["spikes"])


def _raise_if_any(problems: Iterable[Problem]) -> None:
    if found := list(problems):
        raise ConfigError(found)


def use_local_copies(cfg) -> None:
    """Hub ids in model.path and tokenizer.path become the folders of their copies here; config.yaml, already saved, keeps the ids."""
    for section in (cfg.model, cfg.tokenizer):
        if section.path:
            section.path = str(local_folder(section.path))


def check_schedule(given: dict[str, Any], saved: dict[str, Any]) -> None:
    """A resumed run keeps its learning-rate curve: another one would bend it in the middle, in silence."""
    saved = {**asdict(ScheduleConfig()), **saved}  # a key that came later was at its default then
    changed = {key: (value, saved[key]) for key, value in given.items() if key != "allow_change" and value != saved[key]}
    if changed and not given["allow_change"]:
        fix = "keep the checkpoint's values, or set schedule.allow_change=true to bend the curve from here on"
        raise ConfigError(
            Problem(f"schedule ({key})", str(new), f"{old}, as in the checkpoint", fix) for key, (new, old) in changed.items()
        )


def build_parts(cfg, spec: ModelSpec, mesh: Mesh) -> Parts:
    """The parallelised model, allocated, its values not yet set."""
    core = choose_core(cfg.model.attention, spec.attention, mesh.device.type)
    log.info("attention: %s", core)
    modules = build_stages(spec, mesh, DTYPES[cfg.precision.params], core, cfg.parallel)
    quantise(cfg, spec, modules)
    if adapter := getattr(cfg, "adapter", None):
        apply_adapter(modules, shape_of(adapter, spec))
        narrow_frozen(modules, cfg.precision)
    else:
        apply_freeze(modules, spec, cfg.model.train, cfg.model.freeze)
    parts = parallelize(modules, mesh, cfg.parallel, precision=cfg.precision, memory=cfg.memory, compile=cfg.compile)
    parts.agrees_on_memory = cfg.train.auto_micro_batch
    return parts


def load_initial_weights(cfg, spec: ModelSpec, parts: Parts) -> None:
    """The weights a new run starts from: another run's checkpoint, a HF folder, or the seed."""
    held, adapter = list(parts.named_parameters(copies=True)), getattr(cfg, "adapter", None)
    base = resize_spec(read_spec(cfg.model, packed=has_quant(cfg)), cfg.model.vocab)
    names = base_names((name for name, _ in held), base, adapter.chosen() if adapter else None)
    named = [(names[name], parameter) for name, parameter in held if name in names]
    if cfg.checkpoint.load:
        load_weights_only(Path(cfg.checkpoint.load), parts)
        log.info("weights of %s", cfg.checkpoint.load)
    elif cfg.model.init == "random":
        init_weights(named, base, cfg.seed)
        log.info("random weights from seed %d", cfg.seed)
    else:
        new_rows = NewRows(read_spec(cfg.model, packed=has_quant(cfg)), cfg.seed, cfg.model.vocab.noise)
        report = load_base(cfg, base, parts, named, new_rows)
        log.info("weights of %s: %d tensors, %.2f GiB on this rank", cfg.model.path, report.num_tensors, report.num_bytes / 2**30)
    if adapter:
        init_adapter(cfg, spec, parts)


def row_multiple(mesh: Mesh) -> int:
    """What a row's length must divide by: sequence parallelism splits it over tp."""
    return mesh.degrees["tp"]
