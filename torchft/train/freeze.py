"""Training a part of the model: which parameters `model.train` and `model.freeze` leave, and where the frozen ones come from.

    layers.*.mlp.*      a glob on parameter names        first:4, last:2      whole layers from the bottom, from the top

Frozen parameters have no gradient and no optimizer state, and checkpoints don't hold them: they name the weights they came from instead.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from torchft.checkpoint.manifest import hash_weights
from torchft.dist import on_rank_0
from torchft.errors import ConfigError, Problem
from torchft.models.decoder import build_decoder
from torchft.models.spec import ModelSpec
from torchft.parallel.mesh import Mesh, ParallelConfig
from torchft.parallel.schedules import num_stages
from torchft.parallel.stages import check_split, stage_ranges
from torchft.train.quantised import describe_quant


def check_freeze(cfg, spec: ModelSpec, mesh: Mesh) -> Iterator[Problem]:
    """Entries that select nothing, nothing left to train, and what freezing does not go with."""
    if not (cfg.model.train or cfg.model.freeze):
        return
    if cfg.checkpoint.load:
        fix = "export that run (scripts/convert_checkpoint.py) and give the folder as model.path"
        yield Problem("checkpoint.load", cfg.checkpoint.load, "null beside model.train or model.freeze", fix)
    try:
        trained = trained_names(spec, cfg.model.train, cfg.model.freeze)
    except ConfigError as error:
        yield from error.problems
        return
    yield from check_first_stage(trained, spec, mesh, cfg.parallel)


def check_first_stage(trained: Iterable[str], spec: ModelSpec, mesh: Mesh, parallel: ParallelConfig) -> Iterator[Problem]:
    """A pipeline needs something to train on its first stage."""
    if mesh.degrees["pp"] == 1:
        return
    count = num_stages(parallel.schedule, mesh.degrees["pp"], parallel.pp_stages_per_rank)
    if any(check_split(spec, count, parallel.pp_split)):
        return  # told by check_degrees
    layers = stage_ranges(spec, count, parallel.pp_split)[0]
    first = {name for name, _ in build_decoder(spec, layers, first=True, last=False).named_modules()}
    if not any(name.rpartition(".")[0] in first for name in trained):
        expected = f"something to train on the first stage (embed_tokens, layers 0 to {layers[-1]})"
        yield Problem("parallel.pp", str(mesh.degrees["pp"]), expected, "use parallel.pp=1 when the bottom is frozen")


def apply_freeze(modules: Iterable[nn.Module], spec: ModelSpec, train: Sequence[str], freeze: Sequence[str]) -> None:
    """Freezes what does not train of this rank's stages (on meta), in place."""
    trained = trained_names(spec, train, freeze)
    for module in modules:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in trained)


def trained_names(spec: ModelSpec, train: Sequence[str], freeze: Sequence[str]) -> set[str]:
    """The parameters of the whole model that train. Raises ConfigError as `chosen` does."""
    return chosen([name for name, _ in build_decoder(spec).named_parameters()], spec.num_layers, train, freeze)


def chosen(names: Sequence[str], num_layers: int, train: Sequence[str], freeze: Sequence[str]) -> set[str]:
    """The names that train: those `train` selects (empty: all) without those `freeze` selects. Raises ConfigError for an entry that
    selects nothing, and if nothing is left."""
    problems = []
    selected: dict[str, set[str]] = {"train": set(), "freeze": set()}
    for key, entries in (("train", train), ("freeze", freeze)):
        for i, entry in enumerate(entries):
            found = {name for name in names if _selects(entry, name, num_layers)}
            if not found:
                expected = f"a glob on parameter names such as {names[-1]}, or first:N, last:N with N from 1 to {num_layers}"
                problems.append(Problem(f"model.{key}.{i}", entry, expected, "mend or remove it"))
            selected[key] |= found
    trained = (selected["train"] if train else set(names)) - selected["freeze"]
    if not trained and not problems:
        problems.append(Problem("model.freeze", ", ".join(freeze), "a parameter left to train", "freeze less"))
    if problems:
        raise ConfigError(problems)
    return trained


def base_of(cfg) -> dict[str, str] | None:
    """What a checkpoint says of the frozen parameters it does not hold; None if all train. All ranks together."""
    if not (cfg.model.train or cfg.model.freeze or getattr(cfg, "adapter", None)):
        return None
    if cfg.model.init == "random":
        return {"path": "random weights", "sha256": hashlib.sha256(f"seed {cfg.seed}".encode()).hexdigest()}
    return {"path": str(cfg.model.path), "sha256": on_rank_0(lambda: hash_weights(Path(cfg.model.path)))} | describe_quant(cfg)


def _selects(entry: str, name: str, num_layers: int) -> bool:
    side, _, count = entry.partition(":")
    if side not in ("first", "last") or not count.isdigit():
        return fnmatchcase(name, entry)
    head, index = name.split(".")[:2] if name.startswith("layers.") else ("", "-1")
    if head != "layers" or not 1 <= int(count) <= num_layers:
        return False
    return int(index) < int(count) if side == "first" else int(index) >= num_layers - int(count)
