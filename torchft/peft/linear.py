"""The linear layer with a LoRA adapter beside it: y = W x + s B A x.

It asks the base for its product and nothing else, so the base may be of any class, quantised too.
"""

import torch.nn.functional as F
from torch import Tensor


class LoraMixin:
    """Goes before a linear class in the swapped class.

    With `lora_start_a`, `lora_start_b` (frozen) the adapter is B A - B0 A0: it does nothing at the start although B is not zero, and the
    base keeps its weights, quantised or not.
    """

    TP_DIMS = {name: dims for part in ("", "start_") for name, dims in ((f"lora_{part}a", (None, 1)), (f"lora_{part}b", (0, None)))}
    lora_factor: float

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.update(x)

    def update(self, x: Tensor) -> Tensor:
        """What the adapter adds: (..., in) -> (..., out)."""
        y = F.linear(F.linear(x, self.lora_a), self.lora_b)
        if self.starts_at_weights:
            y = y - F.linear(F.linear(x, self.lora_start_a), self.lora_start_b)
        return self.lora_factor * y

    @property
    def starts_at_weights(self) -> bool:
        """True if B A began as a part of the base's weights."""
        return hasattr(self, "lora_start_a")
