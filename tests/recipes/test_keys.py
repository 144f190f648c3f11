"""No key without effect: every field of the recipe's config is read by the code that runs, not only checked and printed."""

import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from tests.helpers.recipe import ROOT, arguments, load_recipe
from torchft.config.problems import optional_inner
from torchft.optim.build import OPTIMIZERS, build_optimizer
from torchft.optim.schedules import SCHEDULES, ScheduleConfig, build_schedule

# Read only where one process in this test does not get: key -> file and text of the test that holds its effect.
ELSEWHERE = {
    "parallel.schedule": ("tests/dist/test_contract.py", '("schedule", "gpipe")'),
    "plugins": ("tests/unit/test_config.py", "plugins"),  # config/load.py imports them
    "checkpoint.best_mode": ("tests/unit/test_store.py", "best_mode"),
    "checkpoint.overwrite": ("tests/unit/test_store.py", "overwrite"),
}
IGNORED = (str(ROOT / "torchft" / "config"), "dataclasses.py")  # files that read every key: loading, printing, saving


def keys(cls: type, prefix: str = "") -> Iterator[tuple[str, type, str]]:
    """(dotted key, its dataclass, its field) of every leaf, those of lists and dicts of dataclasses included."""
    hints = get_type_hints(cls)
    for f in fields(cls):
        inner, _ = optional_inner(hints[f.name])
        nested = next((t for t in (inner, *get_args(inner)) if is_dataclass(t)), None)
        yield (prefix + f.name, cls, f.name)
        if nested is not None:
            yield from keys(nested, f"{prefix}{f.name}.")


@pytest.fixture
def reads(monkeypatch) -> set[tuple[type, str]]:
    """(dataclass, field) of every read outside IGNORED and outside checks."""
    seen: set[tuple[type, str]] = set()
    for cls in {cls for _, cls, _ in keys(load_recipe().Config)} - {load_recipe().Config}:
        names = {f.name for f in fields(cls)}
        monkeypatch.setattr(cls, "__getattribute__", _spy(cls, names, seen))
    return seen


def _spy(cls: type, names: set[str], seen: set[tuple[type, str]]) -> Any:
    def read(self: Any, name: str) -> Any:
        if name in names:
            code = sys._getframe(1).f_code
            if not code.co_filename.startswith(IGNORED[0]) and not code.co_filename.endswith(IGNORED[1]) and "check" not in code.co_name:
                seen.add((cls, name))
        return object.__getattribute__(self, name)

    return read


def run(folder: Path, cache: Path, *overrides: str) -> None:
    module = load_recipe()
    assert module.main(arguments(folder, cache, "train.steps=2", "schedule.warmup_steps=0", *overrides)) == 0


def test_every_key_is_read(reads, tmp_path) -> None:
    """Three runs and each optimizer and schedule read all keys but those of ELSEWHERE, whose tests are there."""
    module = load_recipe()
    every = [
        "validate.every_steps=1",
        "validate.early_stop.metric=val/heldout/loss",
        "validate.prompts=[Hello]",
        "validate.prompt_tokens=2",
        "checkpoint.best_by=val/heldout/loss",
        "optim.groups=[{pattern: '*', lr_scale: 0.5}]",
        "train.neftune=5",
        "metrics.profile.first_step=1",
        "memory.recompute=full",
        "compile.enabled=true",
        "compile.backend=eager",
    ]
    run(tmp_path / "run", tmp_path / "cache", *every)
    run(tmp_path / "half", tmp_path / "cache", "precision.compute=fp16", "export.dtype=bf16", "train.steps=null", "train.epochs=0.05")
    run(tmp_path / "size", tmp_path / "cache", "schedule.allow_change=true", "model.freeze=[norm.weight]")
    for name in SCHEDULES:
        cfg = ScheduleConfig(name, min_ratio=0.1, boundaries=[2], factors=[0.5])
        build_schedule(cfg, 1.0, 10)(8)
    for name in OPTIMIZERS:
        build_optimizer([], module.OptimConfig(name))
    own = {key: (cls, field) for key, cls, field in keys(module.Config)}
    unread = {key for key, pair in own.items() if pair not in reads and pair[0] is not module.Config and key not in ELSEWHERE}
    assert not unread, f"keys that nothing reads: {sorted(unread)}"
    source = "\n".join(path.read_text() for folder in ("torchft", "recipes") for path in (ROOT / folder).rglob("*.py"))
    top = {key for key, (cls, _) in own.items() if cls is module.Config and key not in ELSEWHERE and f"cfg.{key}" not in source}
    assert not top, f"keys that nothing reads: {sorted(top)}"


def test_exceptions_are_true() -> None:
    """Each key of ELSEWHERE exists, and so does the test it names."""
    names = {key for key, _, _ in keys(load_recipe().Config)}
    for key, (path, text) in ELSEWHERE.items():
        assert key in names and text in (ROOT / path).read_text(), key
