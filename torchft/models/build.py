"""From a HF folder, a config or a size's name to a ModelSpec, by the table of families.

    config.json --model_type--> families/llama.py --from_hf--> ModelSpec --to_hf--> config.json

config.json is read as data: nothing in it is imported or run, there is no switch that would, and unknown keys are errors.
"""

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torchft.errors import ConfigError, Problem
from torchft.models.families import gemma, gemma2, gemma3, gpt2, llama, mistral, phi3, qwen2, qwen3
from torchft.models.hf_config import read_json
from torchft.models.spec import ModelSpec

FAMILIES: dict[str, ModuleType] = {  # a family: from_hf, to_hf, KEYS, MODEL_TYPES, SIZES, TEMPLATE
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "phi3": phi3,
    "gpt2": gpt2,
}


def read_config(folder: Path | str, *, packed: bool = False) -> tuple[ModelSpec, dict[str, Any]]:
    """The model that a HF folder describes, and its config.json as it stands. packed: `quantization_config` may stand there, for the
    caller to read. Raises ConfigError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(Problem("model.path", str(folder), "a folder with config.json and safetensors files", _folder_fix(folder)))
    path = folder / "config.json"
    if not path.is_file():
        fix = "give the folder of a HF model; for a .gguf file or a training checkpoint convert it first: scripts/convert_checkpoint.py"
        raise ConfigError(Problem("model.path", str(folder), "a folder that holds config.json", fix))
    config = read_json(path)
    read_here = {key: value for key, value in config.items() if key != "quantization_config"} if packed else config
    return spec_from_config(read_here, where=str(path)), config


def spec_from_config(config: Mapping[str, Any], *, where: str) -> ModelSpec:
    """A parsed config.json -> ModelSpec. `where` names the file in errors."""
    kind = config.get("model_type")
    family = next((f for f in FAMILIES.values() if kind in f.MODEL_TYPES), None)
    if family is None:
        known = sorted(t for f in FAMILIES.values() for t in f.MODEL_TYPES)
        fix = _did_you_mean(str(kind), known) + "use a model of a supported family"
        raise ConfigError(Problem("model_type", repr(kind), f"one of {', '.join(known)}", fix, where))
    try:
        return family.from_hf(config)
    except ConfigError as error:
        raise ConfigError(replace(problem, where=where) for problem in error.problems) from None


def spec_of_size(family: str, size: str) -> ModelSpec:
    """A published size by name: ("llama", "llama3.1-8b"). Raises ConfigError."""
    if family not in FAMILIES:
        fix = _did_you_mean(family, FAMILIES) + "choose one of them"
        raise ConfigError(Problem("model.family", family, ", ".join(FAMILIES), fix))
    sizes = FAMILIES[family].SIZES
    if size not in sizes:
        raise ConfigError(Problem("model.size", size, ", ".join(sizes), _did_you_mean(size, sizes) + "choose one of them"))
    return sizes[size]


def _folder_fix(path: Path) -> str:
    if path.suffix == ".gguf":
        return "convert it first: python scripts/convert_checkpoint.py MODEL.gguf FOLDER"
    if path.is_file():
        return "give the folder, not a file in it"
    siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    return _did_you_mean(path.name, siblings) + "check the path; a model on the hub is named org/name"


def _did_you_mean(given: str, known: Any) -> str:
    close = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]}? Otherwise " if close else ""
