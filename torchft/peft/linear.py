"""The linear layer with a LoRA adapter beside it: y = W x + s (B A x + bias of B).

It asks the base for its product and nothing else, so the base may be of any class, quantised too. Under `adapters_off` it is the base:
the reference model of preference training, with no second copy of the weights.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from torchft.peft.dropout import dropped


class LoraMixin:
    """Goes before a linear class in the swapped class.

    With `lora_start_a`, `lora_start_b` (frozen) the adapter is B A - B0 A0: it does nothing at the start although B is not zero, and the
    base keeps its weights, quantised or not. With dropout B A sees x with holes, W and B0 A0 the whole of it.
    """

    TP_DIMS = {name: dims for part in ("", "start_") for name, dims in ((f"lora_{part}a", (None, 1)), (f"lora_{part}b", (0, None)))}
    TP_DIMS |= {"lora_bias": (0, None)}
    lora_factor: float
    adapter_on = True
    lora_dropout = 0.0
    lora_salt = 0  # of the numbers that fall out
    token_keys: Tensor | None = None  # of the tokens the block is called with; None: nothing falls out

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.update(x) if self.adapter_on else y

    def update(self, x: Tensor) -> Tensor:
        """What the adapter adds: (..., in) -> (..., out)."""
        y = self.product(self.dropped(x))
        return y - self.start_product(x) if self.starts_at_weights else y

    def product(self, x: Tensor) -> Tensor:
        """s (B A x + the bias of B, if it has one); s is multiplied where there are r numbers a token."""
        bias = getattr(self, "lora_bias", None)
        return F.linear(self.lora_factor * F.linear(x, self.lora_a), self.lora_b, bias if bias is None else self.lora_factor * bias)

    def start_product(self, x: Tensor) -> Tensor:
        """s B0 A0 x."""
        return F.linear(self.lora_factor * F.linear(x, self.lora_start_a), self.lora_start_b)

    def dropped(self, x: Tensor) -> Tensor:
        """x with holes, in training with dropout."""
        if not self.lora_dropout or self.token_keys is None or not self.training:
            return x
        return dropped(x, self.token_keys, self.lora_salt, self.lora_dropout)

    @property
    def starts_at_weights(self) -> bool:
        """True if B A began as a part of the base's weights."""
        return hasattr(self, "lora_start_a")


PREFIXES = ("lora_", "ia3_", "vera_", "oft_", "prompt_", "prefix_")


def is_adapter(name: str) -> bool:
    """True for the name of an adapter's parameter, of any method; HF has none that begins so."""
    return name.rpartition(".")[2].startswith(PREFIXES)


@contextmanager
def adapters_off(roots: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the models (or stages) are their bases."""
    adapted = [module for root in roots for module in root.modules() if hasattr(module, "adapter_on")]
    before = [module.adapter_on for module in adapted]
    try:
        for module in adapted:
            module.adapter_on = False
        yield
    finally:
        for module, on in zip(adapted, before, strict=True):
            module.adapter_on = on
