"""DoRA (Liu et al. 2024): W' = m * (W + s B A) / ||W + s B A||, one length m per output, its direction by LoRA.

The norm runs over the inputs of each output and is a constant to the backward, as in the paper's section 4.3. Row by row

    ||W + s B A||^2 = ||W||^2 + 2 s (W A^T) . B + s^2 (B A A^T) . B

so the adapted weight is never made. While nothing trains (evaluation, generation) the norm is computed once. With dropout W x stays
whole and what is added to it, (m / norm - 1) W x and B A x, sees the x with holes, as in PEFT.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from torchft.peft.linear import LoraMixin


class DoraMixin(LoraMixin):
    """LoraMixin with `lora_magnitude` (out,), the length of each row of the adapted weight."""

    TP_DIMS = {"lora_magnitude": (0, None)}
    _kept: tuple[tuple, Tensor] | None = None  # of evaluation: what the norm was computed from, and the norm

    def forward(self, x: Tensor) -> Tensor:
        base = super(LoraMixin, self).forward(x)
        if not self.adapter_on:
            return base
        scale, holed = self.lora_magnitude / self.norm(), self.dropped(x)
        if holed is not x:
            return self._with_holes(base, x, holed, scale)
        if self.bias is None:
            return scale * (base + self.update(x))
        return scale * (base - self.bias + self.update(x)) + self.bias

    def _with_holes(self, base: Tensor, x: Tensor, holed: Tensor, scale: Tensor) -> Tensor:
        """base: W x + bias."""
        inner = super(LoraMixin, self).forward(holed)
        inner = inner if self.bias is None else inner - self.bias
        if self.starts_at_weights:
            base, inner = (y - self.start_product(z) for y, z in ((base, x), (inner, holed)))
        return base + (scale - 1) * inner + scale * self.product(holed)

    def train(self, mode: bool = True) -> "DoraMixin":
        self._kept = None
        return super().train(mode)

    def norm(self) -> Tensor:
        """||W + s B A|| of every row: (out,) in the parameters' dtype, without gradient."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._norm()
        key = tuple((id(p), p._version) for p in (self.lora_a, self.lora_b))
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, self._norm())
        return self._kept[1]

    @torch.no_grad()
    def _norm(self) -> Tensor:
        pairs = [(self.lora_a, self.lora_factor * self.lora_b)]
        if self.starts_at_weights:
            pairs.append((self.lora_start_a, -self.lora_factor * self.lora_start_b))
        norm = adapted_norm(self.weight.detach().to(self.lora_a.dtype), pairs)
        return norm.to(self.lora_magnitude.dtype)


def adapted_norm(weight: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The norm of each row of weight (out, in) + the sum of B A over pairs of A (r, in), B (out, r): (out,), at least fp32.

    The weight may be narrower than A and B, as a frozen base is under mixed precision.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    square = _replicated(torch.linalg.vector_norm(weight, dim=1, dtype=wide)).square()
    for i, (a, b) in enumerate(pairs):
        square = square + 2 * _rows((weight.to(torch.promote_types(weight.dtype, a.dtype)) @ a.T).to(wide), b)
        for other_a, other_b in pairs[: i + 1]:
            square = square + (1 if other_a is a else 2) * _rows(b.to(wide) @ (a.to(wide) @ other_a.to(wide).T), other_b)
    return square.clamp(min=torch.finfo(wide).tiny).sqrt()


def _rows(x: Tensor, b: Tensor) -> Tensor:
    """(out, r), (out, r) -> the dot product of each row: (out,)."""
    return (_replicated(x) * b.to(x.dtype)).sum(dim=1)


def _replicated(x: Tensor) -> Tensor:
    """A sum that is spread over the ranks that share the inputs, on each of them."""
    if not isinstance(x, DTensor):
        return x
    return x.redistribute(placements=[Replicate() if p.is_partial() else p for p in x.placements])
