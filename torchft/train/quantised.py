"""A quantised base in a run: what section `quant` does not go with, the layers on meta, and their values.

quant.format=nf4 | int8: model.path is quantised as it streams in          gptq | awq: model.path is stored so and kept as it is
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from torch import Tensor, nn

from torchft.checkpoint.hf import LoadReport, load_hf
from torchft.checkpoint.new_rows import NewRows
from torchft.checkpoint.quantised import load_packed, read_stored
from torchft.dist import agreed
from torchft.errors import CheckpointError, ConfigError, Problem
from torchft.models.build import read_config
from torchft.models.spec import ModelSpec
from torchft.parallel.fsdp import PrecisionConfig
from torchft.parallel.parts import Parts
from torchft.peft.linear import is_adapter
from torchft.quant.stored import StoredFormat
from torchft.quant.swap import QuantConfig, apply_quant, check_stored, quantised_modules


def has_quant(cfg) -> bool:
    """True for a recipe whose base may be quantised."""
    return hasattr(cfg, "quant")


def quant_of(cfg) -> QuantConfig:
    """A recipe's section `quant`; of one without it, that of no format."""
    return cfg.quant if has_quant(cfg) else QuantConfig()


def stored_of(cfg, spec: ModelSpec) -> StoredFormat | None:
    """How model.path is packed; None for a plain one."""
    if not cfg.model.path or not has_quant(cfg):
        return None
    return agreed(lambda: read_stored(cfg.model.path, spec, read_config(cfg.model.path, packed=True)[1]))


def check_quant(cfg, spec: ModelSpec) -> Iterator[Problem]:
    """What a quantised base does not go with, and what of a packed folder can't be read."""
    quant = quant_of(cfg)
    try:
        yield from check_stored(quant, stored_of(cfg, spec))
    except ConfigError as error:
        yield from error.problems
    except CheckpointError as error:
        yield Problem("model.path", str(cfg.model.path), "a packed folder of this model", str(error))
    if quant.format is None:
        return
    if cfg.model.init == "random":
        yield Problem("quant.format", quant.format, "null with model.init=random: there is nothing to keep small", "give model.path")
    if getattr(cfg, "adapter", None) is None:
        expected = "null: a quantised base can't be trained in full"
        yield Problem("quant.format", quant.format, expected, "train adapters on it: recipes/lora_finetune.py")
    if cfg.model.vocab.size:
        yield Problem("model.vocab.size", str(cfg.model.vocab.size), "null beside quant.format", "resize the model in full precision first")


def quantise(cfg, spec: ModelSpec, modules: Iterable[nn.Module]) -> None:
    """Makes this rank's stages (on meta) quantised, as configured."""
    apply_quant(list(modules), quant_of(cfg), stored_of(cfg, spec))


def narrow_frozen(modules: Iterable[nn.Module], precision: PrecisionConfig) -> None:
    """Frozen weights (on meta) in the compute precision: they need no wide copy. What an adapter started from stays wide beside it."""
    for name, parameter in (entry for module in modules for entry in module.named_parameters()):
        if not parameter.requires_grad and parameter.is_floating_point() and not is_adapter(name):
            parameter.data = parameter.data.to(precision.compute_dtype)


def load_base(cfg, spec: ModelSpec, parts: Parts, parameters: Iterable[tuple[str, Tensor]], new_rows: NewRows) -> LoadReport:
    """The weights of model.path into this rank's shards, quantised whole and then cut, or taken packed as they are."""
    layers, stored = quantised_modules(parts.modules), stored_of(cfg, spec)
    if stored is None:
        return load_hf(cfg.model.path, spec, parameters, new_rows=new_rows, quantised=layers)
    return load_packed(Path(cfg.model.path), spec, parameters, layers, stored)


def describe_quant(cfg) -> dict[str, str]:
    """What a checkpoint says of how its frozen base was quantised; nothing if it was not."""
    values = {key: value for key, value in asdict(quant_of(cfg)).items() if key != "compute"}  # compute changes no value of the base
    return {"quant": json.dumps(values, sort_keys=True)} if values["format"] else {}
