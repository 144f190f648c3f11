"""Several adapters of one base: their weighted sum as one adapter, and putting one after the other on a loaded model.

    w1 * f1 B1 A1 + w2 * f2 B2 A2 = [w1 f1 B1, w2 f2 B2] [A1; A2]        exact, of rank r1 + r2

set_adapter(model, one) | set_adapter(model, combine([one, two], [0.7, 0.3])) | set_adapter(model, None): the base again
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from torchft.checkpoint.adapters import Adapter
from torchft.checkpoint.hf import copy_weights
from torchft.checkpoint.method_files import MethodAdapter
from torchft.checkpoint.tensor_files import LazyTensor, held_tensor
from torchft.errors import CheckpointError
from torchft.models.decoder import Decoder
from torchft.peft.linear import is_adapter
from torchft.peft.lora import remove_lora
from torchft.peft.methods import apply_adapter


def combine(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """One adapter that does what all do together, each times its weight. Raises CheckpointError for DoRA and for different bases."""
    if len(adapters) != len(weights):
        raise CheckpointError(f"{len(weights)} weights for {len(adapters)} adapters\n  expected: one each\n  fix: give as many weights")
    if any(isinstance(adapter, MethodAdapter) for adapter in adapters):
        raise CheckpointError("only LoRA adapters can be added up\n  fix: merge the others into the base first, one after the other")
    if any(adapter.dora for adapter in adapters):
        raise CheckpointError("a DoRA adapter can't be added to others: it scales what they change\n  fix: merge it into the base first")
    if not all(adapter.is_plain for adapter in adapters):
        given = "adapters with biases, whole modules or rows can't be added up"
        raise CheckpointError(f"{given}\n  expected: A and B alone\n  fix: merge such an adapter into the base first")
    if len({(adapter.base, adapter.quant) for adapter in adapters if adapter.base}) > 1:
        raise CheckpointError("the adapters were trained on different bases\n  fix: combine adapters of one base")
    origin = next((adapter for adapter in adapters if adapter.base), adapters[0])
    tensors: dict[str, LazyTensor] = {}
    modules = list(dict.fromkeys(module for adapter in adapters for module in adapter.factors))
    for module in modules:
        parts = [(adapter, weight * adapter.factors[module]) for adapter, weight in zip(adapters, weights) if module in adapter.factors]
        wide = [{half: adapter.tensors[f"{module}.lora_{half}"].read(()) for half in "ab"} for adapter, _ in parts]
        tensors[f"{module}.lora_a"] = held_tensor(torch.cat([pair["a"] for pair in wide]))
        tensors[f"{module}.lora_b"] = held_tensor(torch.cat([factor * pair["b"] for pair, (_, factor) in zip(wide, parts)], dim=1))
    return replace(origin, tensors=tensors, factors=dict.fromkeys(modules, 1.0))


def set_adapter(model: Decoder, adapter: Adapter | MethodAdapter | None) -> None:
    """Puts an adapter on a model that is not sharded, in the place of the one it has; None: the base again, bit for bit."""
    remove_lora(model)
    if adapter is not None:
        apply_adapter([model], adapter.config())
        copy_weights(((name, p.data) for name, p in model.named_parameters() if is_adapter(name)), adapter.tensors)
