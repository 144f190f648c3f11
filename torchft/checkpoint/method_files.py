"""Adapters that are no LoRA: which file forms there are, by PEFT's name and by config, and their merge into a base, row by row.

PEFT folder --open_method--> MethodAdapter --merged_method--> weights        our tensors --to_method_files--> PEFT's
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchft.checkpoint.linear_files import Files, ia3_files, ia3_of, oft_files, oft_of, vera_files, vera_of
from torchft.checkpoint.peft_files import WITH_PEFT
from torchft.checkpoint.tensor_files import LazyTensor
from torchft.checkpoint.virtual_files import p_tuning_files, prefix_files, prefix_of, prompt_files, prompt_of
from torchft.errors import CheckpointError
from torchft.models.spec import ModelSpec
from torchft.peft.ia3 import Ia3Config
from torchft.peft.methods import Merge, method_of
from torchft.peft.oft import OftConfig
from torchft.peft.prefix import PrefixConfig
from torchft.peft.vera import VeraConfig
from torchft.peft.virtual import PromptConfig, PTuningConfig


@dataclass(frozen=True)
class MethodAdapter:
    """An adapter of another method than LoRA by our names. cfg: what puts exactly its parameters on a model."""

    cfg: Any
    tensors: dict[str, LazyTensor]
    base: str | None = None  # SHA-256 of the base's weights, if the file says
    quant: str | None = None  # how the base was quantised, as JSON; None: it was not

    def config(self) -> Any:
        return self.cfg

    def modules(self) -> list[str]:
        """The layers it sits on."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self.tensors))


def open_method(folder: Path, spec: ModelSpec, config: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> MethodAdapter:
    """The adapter of a PEFT folder. Raises CheckpointError for a method or an option that is not here."""
    kind = config.get("peft_type")
    if kind not in READERS:
        raise CheckpointError(f"{folder}: peft_type={kind!r}\n  expected: LORA, {', '.join(READERS)}\n  fix: {WITH_PEFT}")
    if extra := [key for key in ("modules_to_save",) if config.get(key)]:
        raise CheckpointError(f"{folder}: {extra[0]}={config[extra[0]]!r}\n  expected: nothing beside {kind}\n  fix: {WITH_PEFT}")
    return MethodAdapter(*READERS[kind](folder, spec, config, tensors))


def to_method_files(spec: ModelSpec, tensors: Mapping[str, Tensor], cfg: Any) -> Files:
    """Our tensors -> (PEFT's tensors, adapter_config.json)."""
    out, config = WRITERS[type(cfg)](spec, tensors, cfg)
    return out, {"task_type": "CAUSAL_LM", "inference_mode": True, **config}


def does_nothing(tensors: Mapping[str, Tensor], cfg: Any) -> bool:
    """True if a trained adapter is still what it began as."""
    return type(cfg) in UNTRAINED and UNTRAINED[type(cfg)](tensors)


def merged_method(tensors: Mapping[str, LazyTensor], adapter: MethodAdapter, *, wide: bool) -> dict[str, LazyTensor]:
    """The base's weights with the adapter in them, made when they are read. Raises CheckpointError for a method that no weight carries."""
    method = method_of(adapter.cfg)
    if method.merger is None:
        given = f"an adapter of {type(adapter.cfg).__name__.removesuffix('Config')}"
        expected = "a method whose change a weight can hold: virtual tokens are no weights"
        raise CheckpointError(f"{given} can't be merged\n  expected: {expected}\n  fix: load it beside its base, with peft or here")
    out = dict(tensors)
    merge = method.merger(adapter.cfg, {module: tensors[f"{module}.weight"].shape for module in adapter.modules()})
    for module in adapter.modules():
        own = {name.rpartition(".")[2]: tensor for name, tensor in adapter.tensors.items() if name.rpartition(".")[0] == module}
        for name in changed_by(module, own, tensors):
            base, dtype = tensors[name], tensors[name].dtype
            read = _merged_read(base, own, merge)
            out[name] = replace(base, read=read, dtype=torch.promote_types(dtype, torch.float32)) if wide else _rounded(base, read)
    return out


def changed_by(module: str, own: Mapping[str, Any], tensors: Mapping[str, Any]) -> list[str]:
    """The base's tensors that the adapter of a layer changes: its weight, and a bias that outputs are multiplied with."""
    bias = [f"{module}.bias"] if "ia3_out" in own and f"{module}.bias" in tensors else []
    return [f"{module}.weight", *bias]


def _merged_read(base: LazyTensor, own: Mapping[str, LazyTensor], merge: Merge):
    def read(part: tuple[slice, ...]) -> Tensor:
        rows, columns = (*part, slice(None), slice(None))[:2]
        weight = base.read((rows, slice(None)) if len(base.shape) == 2 else (rows,))
        values = {name: tensor.read(()) for name, tensor in own.items()}
        wide = torch.promote_types(weight.dtype, torch.float32)
        values = {name: value.to(wide) for name, value in values.items()}
        if weight.ndim == 1:
            return merge(weight.to(wide)[:, None], rows, values)[:, 0]
        return merge(weight.to(wide), rows, values)[:, columns]

    return read


def _rounded(base: LazyTensor, read) -> LazyTensor:
    return replace(base, read=lambda part: read(part).to(base.dtype))


READERS = {
    "IA3": ia3_of,
    "VERA": vera_of,
    "OFT": oft_of,
    "PROMPT_TUNING": prompt_of,
    "P_TUNING": prompt_of,
    "PREFIX_TUNING": prefix_of,
}
WRITERS = {
    Ia3Config: ia3_files,
    VeraConfig: vera_files,
    OftConfig: oft_files,
    PromptConfig: prompt_files,
    PTuningConfig: p_tuning_files,
    PrefixConfig: prefix_files,
}
UNTRAINED = {  # virtual tokens do something from the first step on
    Ia3Config: lambda tensors: all((tensor == 1).all() for tensor in tensors.values()),
    VeraConfig: lambda tensors: not any(tensor.any() for name, tensor in tensors.items() if name.endswith(".vera_b")),
    OftConfig: lambda tensors: not any(tensor.any() for tensor in tensors.values()),
}
