"""A config's data without training: samples as they will be seen (`torchft data show`), numbers (`stats`), the caches alone (`prepare`).

config --recipe--> tokenizer, template, sources --> the same records, encoding, truncation, caches and order as the run's
"""

import heapq
import multiprocessing
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from torchft import log
from torchft.config.load import load_config
from torchft.data.show import Shown, show_sample
from torchft.data.stats import EpochStats, SourceStats, epoch_stats, source_stats
from torchft.dist import World
from torchft.errors import ConfigError, Problem, TorchftError
from torchft.parallel.mesh import AXES, Mesh
from torchft.train.data import Rows, Source, Text, build_loader, build_source, build_text, build_tokens, encode_with_roles, source_plan
from torchft.train.recipes import load_recipe

Only = Literal["truncated", "dropped", "longest"]


@dataclass(frozen=True)
class Data:
    """A config's data, its text and all its sources by name: train/0, ..., validation/NAME."""

    cfg: Any
    text: Text
    sources: dict[str, Source]


def open_data(recipe: ModuleType, argv: list[str]) -> Data:
    """argv: as the recipe would get it. Raises ConfigError for a recipe that trains on nothing."""
    cfg: Any = load_config(recipe.Config, argv, description="")
    if not hasattr(cfg, "data"):
        raise ConfigError(Problem("recipe", recipe.__name__, "one that has a section `data`", "name a training recipe by --recipe"))
    sources = {f"train/{i}": source for i, source in enumerate(cfg.data.train)}
    sources |= {f"validation/{name}": source for name, source in cfg.data.validation.items()}
    return Data(cfg, build_text(cfg.tokenizer, cfg.model.path), sources)


def show(data: Data, *, count: int, source: str | None = None, first: int = 0, only: Only | None = None) -> list[Shown]:
    """`count` samples of each source, or of one, from record `first` on; only: those that truncation cut, that were dropped, or the
    longest. Raises DataError at a record that can't be read."""
    if source is not None and source not in data.sources:
        raise ConfigError(Problem("--source", source, f"one of {', '.join(data.sources)}", "name a source of the config"))
    found: list[Shown] = []
    for name in [source] if source else data.sources:
        samples = _samples(data, name, first)
        if only == "longest":
            found += heapq.nlargest(count, samples, key=lambda sample: len(sample.tokens))
        else:
            found += islice((sample for sample in samples if only is None or sample.fate.startswith(only)), count)
    return found


def stats(data: Data) -> tuple[list[SourceStats], EpochStats | None]:
    """Of every source, and of the first epoch of training; makes the caches that are missing. Of a streamed source: nothing."""
    tokens = build_tokens(data.cfg.data, data.text, World(0, 1, 0, 1, torch.device("cpu")))
    caches = [*tokens.train, *tokens.validation.values()]
    stop_ids = data.text.template.stop_ids if data.text.template else data.text.tokenizer.stop_ids
    found = source_stats(caches, stop_ids)
    if not tokens.train:
        return found, None
    rows = Rows(1, 1, Mesh(dict.fromkeys(AXES, 1), torch.device("cpu")))
    size = data.cfg.train.global_batch_size
    loader = build_loader(tokens.train, data.cfg.data, rows, data.text, global_batch_size=size, seed=data.cfg.seed)
    return found, epoch_stats(loader)


def prepare(recipe: Path, argv: list[str], num_processes: int) -> list[str]:
    """Makes the caches of all sources with so many processes; a line for each."""
    run = uuid.uuid4().hex
    context = multiprocessing.get_context("spawn")  # a fork would copy the tokenizer's threads in any state
    others = [context.Process(target=_prepare_beside, args=(recipe, argv, rank, num_processes, run)) for rank in range(1, num_processes)]
    for process in others:
        process.start()
    try:
        return _prepare(recipe, argv, 0, num_processes, run)
    finally:
        for process in others:
            process.join()


def _prepare_beside(*place: Any) -> None:
    """In a process of its own; an error of any is raised in the first."""
    with suppress(TorchftError):
        _prepare(*place)


def _prepare(recipe: Path, argv: list[str], rank: int, num_processes: int, run: str) -> list[str]:
    log.setup(rank)
    data = open_data(load_recipe(recipe), argv)
    world = World(rank, num_processes, rank, num_processes, torch.device("cpu"))
    cached = [source for name, source in data.sources.items() if not (data.cfg.data.streaming and name.startswith("train/"))]
    return [build_source(source, data.text, data.cfg.data, world, run).summary() for source in cached]


def _samples(data: Data, name: str, first: int) -> Iterator[Shown]:
    """The samples of a source from record `first` on, one after the other."""
    source = data.sources[name]
    plan = source_plan(source, data.text, data.cfg.data)
    records, truncate = plan["records"], plan.get("truncate")
    for _, record, where in records.read(min(first, len(records)), len(records)):
        for kind, whole, roles in encode_with_roles(record, where, source, data.text, data.cfg.data):
            kept = truncate(whole, where) if truncate else whole
            place = where if kind in ("chat", "text") else f"{where} ({kind})"
            yield show_sample(name, place, whole, kept, roles=roles, tokenizer=data.text.tokenizer)
