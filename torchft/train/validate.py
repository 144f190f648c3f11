"""Everything that can be wrong with a recipe's config, found without starting it: no process group, nothing allocated, nothing written.

    config --load--> cfg --> model folder, degrees and batches for N processes, tokenizer, template, first records of each data file

What depends on an earlier part that failed is left out (a config whose own values are wrong: all of the rest); everything else is said at
once. A start after this can still fail at a later record, for want of memory, or on a machine that differs from this one.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from torchft.checkpoint.hf import open_weights
from torchft.checkpoint.quantised import open_base
from torchft.config.load import load_config
from torchft.data.prompts import read_prompts
from torchft.data.sources import SourceConfig, first_records
from torchft.data.truncation import truncate
from torchft.errors import ConfigError, Problem, TorchftError
from torchft.generate.model import find_model, is_checkpoint
from torchft.models.build import read_config
from torchft.models.spec import ModelSpec
from torchft.models.vocabulary import resize_spec
from torchft.optim.schedules import build_schedule
from torchft.parallel.mesh import Mesh, resolve_degrees
from torchft.train.adapter import built_spec
from torchft.train.checks import check_job
from torchft.train.data import Text, TokenizerConfig, build_text, check_vocabulary, encode_for
from torchft.train.quantised import has_quant
from torchft.train.setup import read_spec, use_local_copies

T = TypeVar("T")
RECORDS = 8  # of each data file
SHOWN = 3  # bad records of each source that are told in full


def validate(recipe: ModuleType, argv: list[str], num_processes: int = 1) -> list[str]:
    """Every problem, as given / expected / fix; none: an empty list. argv: as the recipe would get it."""
    found = _Findings()
    if num_processes < 1:
        found.add(iter([Problem("--nproc", str(num_processes), "at least 1", "give the number of processes")]))
        return found.problems
    cfg: Any = found.attempt(lambda: load_config(recipe.Config, argv, description=""))
    if cfg is not None and hasattr(cfg, "parallel"):
        _check_training(cfg, num_processes, found)
    elif cfg is not None and hasattr(cfg, "prompts"):
        _check_generation(cfg, num_processes, found)
    return list(dict.fromkeys(found.problems))


class _Findings:
    """The problems so far."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def attempt(self, make: Callable[[], T]) -> T | None:
        """What `make` gives, or None and its error among the problems."""
        try:
            return make()
        except ConfigError as error:
            self.problems += map(str, error.problems or [error])
        except (TorchftError, OSError) as error:
            self.problems.append(str(error))
        return None

    def add(self, problems: Iterator[Problem]) -> None:
        self.problems += map(str, problems)


def _check_training(cfg, num_processes: int, found: _Findings) -> None:
    model = cfg.model
    before = len(found.problems)
    found.attempt(lambda: use_local_copies(cfg))
    if len(found.problems) > before:
        return
    base = found.attempt(lambda: read_spec(model, packed=has_quant(cfg)))
    spec = None if base is None else found.attempt(lambda: built_spec(cfg, resize_spec(base, model.vocab)))
    degrees = found.attempt(lambda: resolve_degrees(cfg.parallel, num_processes))
    if spec is not None and degrees is not None:
        here = "cuda" if torch.cuda.is_available() else "cpu"
        found.add(check_job(cfg, spec, Mesh(degrees, torch.device(here if cfg.device == "auto" else cfg.device))))
    if spec is not None and model.init == "weights" and not cfg.checkpoint.load:
        found.attempt(lambda: open_base(model.path, base) if has_quant(cfg) else open_weights(model.path, base))
    if cfg.train.steps is not None:
        found.attempt(lambda: build_schedule(cfg.schedule, cfg.optim.lr, cfg.train.steps))
    found.add(_check_output(Path(cfg.output_dir)))
    text = found.attempt(lambda: build_text(cfg.tokenizer, model.path))
    if text is None:
        return
    if spec is not None:
        problems = list(check_vocabulary(spec, text, cfg.tokenizer))
        found.add(iter(problems or _check_vocabulary(text, spec)))
    for source in [*cfg.data.train, *cfg.data.validation.values()]:
        found.problems += _bad_records(source, text, cfg.data)


def _check_output(folder: Path) -> Iterator[Problem]:
    blocked = next((path for path in (folder, *folder.parents) if path.is_file()), None)
    if blocked is not None:
        yield Problem("output_dir", str(folder), f"a folder; {blocked} is a file", "choose another output_dir")


def _check_vocabulary(text: Text, spec: ModelSpec) -> Iterator[Problem]:
    size = text.tokenizer.vocab_size
    if size > spec.num_tokens:
        fix = "take the tokenizer that belongs to the model"
        yield Problem("tokenizer.path", f"a tokenizer of {size} ids", f"at most the model's {spec.num_tokens}", fix)


def _bad_records(source: SourceConfig, text: Text, cfg) -> list[str]:
    """The first bad records among the first of each file of a source."""
    found = _Findings()

    def check(record: dict, where: str) -> None:
        encoded = encode(record, where)
        if encoded is not None:
            truncate(encoded, cfg.seq_len, cfg.truncation, where)

    encode, records = found.attempt(lambda: encode_for(source, text, cfg)), first_records(source, RECORDS)
    if encode is None:
        return found.problems
    while (record := found.attempt(lambda: next(records, None))) is not None:
        found.attempt(lambda record=record: check(*record))
    more = len(found.problems) - SHOWN
    rest = [f"{source.path}: {more} more of the first {RECORDS} records a file have problems"] if more > 0 else []
    return found.problems[:SHOWN] + rest


def _check_generation(cfg, num_processes: int, found: _Findings) -> None:
    if num_processes > 1:
        found.add(iter([Problem("--nproc", str(num_processes), "1: this recipe is one process", "split the prompts' file instead")]))
    path = found.attempt(lambda: find_model(Path(cfg.model.path)))
    if path is not None and not is_checkpoint(path):
        spec = found.attempt(lambda: read_config(path)[0])
        if spec is not None:
            found.attempt(lambda: open_weights(path, spec))
            if not cfg.prompts.raw:
                chosen = TokenizerConfig(**asdict(cfg.tokenizer))
                found.attempt(lambda: build_text(chosen, str(path)))
    found.attempt(lambda: read_prompts(cfg.prompts))
