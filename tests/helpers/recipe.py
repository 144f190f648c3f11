"""Runs the full fine-tuning recipe in this process or on n forked ranks, on the debug model, and reads what it left."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

from tests.helpers.dist import run_dist
from torchft.checkpoint.manifest import read_manifest

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "debug" / "tiny.yaml"


def load_recipe(name: str = "full_finetune") -> ModuleType:
    """The recipe's module, by path: recipes/ is no package."""
    module_spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def arguments(output_dir: Path, cache: Path, *overrides: str) -> list[str]:
    """The debug config with absolute paths."""
    return [
        "--config",
        str(CONFIG),
        f"output_dir={output_dir}",
        f"data.cache={cache}",
        f"model.path={ROOT / 'configs/debug/tiny-llama'}",
        f"data.train.0.path={ROOT / 'configs/quickstart/data/train.jsonl'}",
        f"data.validation.heldout.path={ROOT / 'configs/quickstart/data/heldout.jsonl'}",
        *overrides,
    ]


def train(argv: list[str], world_size: int = 1) -> int:
    """The recipe's exit code; on several ranks that of rank 0, all equal."""
    if world_size == 1:
        return load_recipe().main(argv)
    codes = run_dist(_main, world_size, argv)
    assert len(set(codes)) == 1, codes
    return codes[0]


def _main(argv: list[str]) -> int:
    return load_recipe().main(argv)


def rows(output_dir: Path) -> list[dict]:
    """Training rows of metrics.jsonl."""
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def state_hashes(output_dir: Path, step: int) -> dict[str, str]:
    """The hashes of all weights and optimizer state in a checkpoint's files: the same layout and bits give the same files."""
    files = read_manifest(output_dir / "checkpoints" / f"step_{step:08d}").files
    return {name: info.sha256 for name, info in files.items() if name != "state.json"}
