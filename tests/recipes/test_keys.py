"""No key without effect: every field of every recipe's config is read by the code that runs, not only checked and printed."""

import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from tests.helpers.models import make_model
from tests.helpers.recipe import ROOT, arguments, load_recipe
from torchft.config.problems import optional_inner
from torchft.models.build import read_config
from torchft.models.custom import CustomSpec
from torchft.optim.build import OPTIMIZERS, OptimConfig, build_optimizer
from torchft.optim.schedules import SCHEDULES, ScheduleConfig, build_schedule

# Of adapter.method: its section, the test of it against peft, its keys.
METHODS = [
    ("ia3", "methods", "outputs inputs layers"),
    ("vera", "methods", "rank targets exclude layers seed d_initial save_projection"),
    ("oft", "methods", "block_size neumann_terms targets exclude layers"),
    ("prompt", "virtual", "num_tokens init"),
    ("p_tuning", "virtual", "num_tokens hidden_size"),
    ("prefix", "virtual", "num_tokens init"),
    ("llama_pro", "llama_pro", "num_new"),
    ("eva", "eva", "rho"),
]
# Read only where one process in this test does not get: key -> file and text of the test that holds its effect.
ELSEWHERE = {
    "parallel.schedule": ("tests/dist/test_contract.py", '("schedule", "gpipe")'),
    "parallel.pp_stages_per_rank": ("tests/dist/test_layouts.py", '("pp_stages_per_rank", 1)'),
    "parallel.pp_split": ("tests/dist/test_layouts.py", '("pp_split", [1, 3])'),
    "parallel.fsdp.forward_prefetch": ("tests/dist/test_fsdp_options.py", "forward_prefetch=2"),
    "parallel.fsdp.backward_prefetch": ("tests/dist/test_fsdp_options.py", "backward_prefetch=2"),
    "model.vocab.noise": ("tests/recipes/test_new_tokens_recipe.py", "model.vocab.noise"),  # of weights that are read
    "data.streams": ("tests/unit/test_streaming.py", "data.streams"),  # of data.streaming, which has no epochs
    "adapter.path": ("tests/recipes/test_lora_recipe.py", "adapter.path"),  # decides what the other keys of adapter say
    **{
        f"adapter.{method}.{key}": (f"tests/parity/test_peft_{file}.py", f"{key}=")
        for method, file, keys in METHODS
        for key in keys.split()
    },
    "adapter.eva.batches": ("tests/recipes/test_methods_recipe.py", "adapter.eva.batches"),
    "plugins": ("tests/unit/test_config.py", "plugins"),  # config/load.py imports them
    "checkpoint.best_mode": ("tests/unit/test_store.py", "best_mode"),
    "checkpoint.overwrite": ("tests/unit/test_store.py", "overwrite"),
    "checkpoint.max_failures": ("tests/faults/test_async_save.py", "max_failures=2"),
    "train.spike.window": ("tests/faults/test_numbers.py", "window=8"),
    "schedule.allow_change": ("tests/recipes/test_full_finetune.py", "allow_change"),
    "train.nonfinite.action": ("tests/dist/test_data_parallel.py", 'NonFinite(action="skip")'),
    "train.nonfinite.max_in_row": ("tests/recipes/test_options.py", "max_in_row=2"),
    "metrics.project": ("tests/unit/test_trackers.py", "project"),
    "model.family": ("tests/recipes/test_pretrain.py", "model.family"),  # instead of model.path, as all of model.spec
    "model.size": ("tests/recipes/test_full_finetune.py", "model.size"),
    "model.spec": ("tests/recipes/test_pretrain.py", "model.spec."),
    "model.spec.init_std": ("tests/recipes/test_pretrain.py", "init_std"),
    **{f"model.spec.{name}": ("tests/unit/test_custom_spec.py", name) for name in sorted(CustomSpec.__annotations__) if name != "init_std"},
}
READERS = (str(ROOT / "torchft"), str(ROOT / "recipes"))  # whose reads count, but not those of the part that loads and prints configs
LOADING = str(ROOT / "torchft" / "config")


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
def reads(monkeypatch, request) -> Iterator[set[tuple[type, str]]]:
    """(dataclass, field) of every read by READERS outside of checks, of the recipe that the test is about."""
    seen: set[tuple[type, str]] = set()
    config = load_recipe(request.node.callspec.params["recipe"]).Config
    for cls in {cls for _, cls, _ in keys(config)} - {config}:
        names = {f.name for f in fields(cls)}
        monkeypatch.setattr(cls, "__getattribute__", _spy(cls, names, seen))
    yield seen
    if torch.distributed.is_initialized():  # mixed precision made a group of one, which forked ranks of later tests would inherit
        torch.distributed.destroy_process_group()


def _spy(cls: type, names: set[str], seen: set[tuple[type, str]]) -> Any:
    def read(self: Any, name: str) -> Any:
        if name in names:
            code = sys._getframe(1).f_code
            is_reader = code.co_filename.startswith(READERS) and not code.co_filename.startswith(LOADING)
            if is_reader and "check" not in code.co_name:
                seen.add((cls, name))
        return object.__getattribute__(self, name)

    return read


TRAINING = [
    "validate.every_steps=1",
    "validate.early_stop.metric=val/heldout/loss",
    "validate.prompts=[Hello]",
    "validate.prompt_tokens=2",
    "checkpoint.best_by=val/heldout/loss",
    "export.best=true",
    "optim.groups=[{pattern: '*', lr_scale: 0.5}]",
    "train.neftune=5",
    "metrics.profile.first_step=1",
    "memory.recompute=full",
    "compile.enabled=true",
    "compile.backend=eager",
]
SHORT = ["train.steps=2", "train.global_batch_size=4", "train.micro_batch_size=2", "schedule.warmup_steps=0", "model.init=random"]
OTHERS = [
    ["precision.compute=fp16", "export.dtype=bf16", "train.steps=null", "train.epochs=0.05"],
    ["schedule.allow_change=true", "model.freeze=[norm.weight]"],
]


def pretraining(folder: Path) -> list[str]:
    """A tiny model from scratch on this project's own pages."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    source = f"{{path: {ROOT / 'docs/data.md'}, separator: blank_lines}}"
    return [
        f"output_dir={folder}",
        f"data.cache={folder.parent / 'cache'}",
        "model.family=llama",
        f"model.spec.vocab_size={read_config(ROOT / 'configs/debug/tiny-llama')[0].vocab_size}",
        *(f"model.spec.{name}={value}" for name, value in sizes.items()),
        f"tokenizer.path={ROOT / 'configs/debug/tiny-llama'}",
        f"data.train=[{source}]",
        f"data.validation.heldout={source}",
        "data.seq_len=32",
    ]


def chats(folder: Path) -> list[str]:
    return arguments(folder, folder.parent / "cache")


def drive(recipe: str, folder: Path) -> None:
    """Runs of a recipe that between them reach all of its options."""
    main = load_recipe(recipe).main
    if recipe == "generate":
        (folder / "prompts.txt").write_text("Hello\n")
        options = [f"prompts.path={folder / 'prompts.txt'}", f"output={folder / 'out.jsonl'}", "sampling.temperature=1.0"]
        assert main([f"model.path={make_model(folder / 'hf')}", *options, "sampling.max_new_tokens=2"]) == 0
        return
    argv = pretraining if recipe == "pretrain" else chats
    others = [[word for word in more if "model.freeze" not in word] for more in OTHERS] if recipe == "lora_finetune" else OTHERS
    for number, more in enumerate([TRAINING, *others]):
        assert main([*argv(folder / str(number)), *SHORT, *more]) == 0
    if recipe == "lora_finetune":  # a merged model is made of a base that has weights
        base = [f"model.path={make_model(folder / 'hf')}", "model.init=weights", "export.hf=true"]
        base += ["quant.format=nf4", "quant.block_size=32"]
        assert main([*argv(folder / "merged"), *SHORT, *base]) == 0
    for name in SCHEDULES:
        build_schedule(ScheduleConfig(name, min_ratio=0.1, boundaries=[2], factors=[0.5]), 1.0, 10)(8)
    for name in OPTIMIZERS:
        build_optimizer([], OptimConfig(name))


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (ROOT / "recipes").glob("*.py")))
def test_every_key_is_read(recipe: str, reads, tmp_path: Path) -> None:
    """The runs of `drive` read all keys but those of ELSEWHERE, whose tests are there."""
    drive(recipe, tmp_path)
    config = load_recipe(recipe).Config
    own = {key: (cls, field) for key, cls, field in keys(config)}
    unread = {key for key, pair in own.items() if pair not in reads and pair[0].__module__ != recipe and key not in ELSEWHERE}
    assert not unread, f"keys that nothing reads: {sorted(unread)}"
    # a recipe's own classes are made anew each time it is loaded, so their keys are looked for in the text
    source = "\n".join(path.read_text() for folder in ("torchft", "recipes") for path in (ROOT / folder).rglob("*.py"))
    top = {key for key, (cls, _) in own.items() if cls.__module__ == recipe and key not in ELSEWHERE and f"cfg.{key}" not in source}
    assert not top, f"keys that nothing reads: {sorted(top)}"


def test_exceptions_are_true() -> None:
    """Each key of ELSEWHERE exists, and so does the test it names."""
    recipes = ("full_finetune", "lora_finetune")
    names = {key for recipe in recipes for key, _, _ in keys(load_recipe(recipe).Config)}
    for key, (path, text) in ELSEWHERE.items():
        assert key in names and text in (ROOT / path).read_text(), key
