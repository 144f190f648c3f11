"""The gated MLP (Shazeer 2020): down(act(gate(x)) * up(x))."""

import torch.nn.functional as F
from torch import Tensor, nn

from torchft.models.spec import ModelSpec

ACTIVATIONS = {"silu": F.silu}


class Mlp(nn.Module):
    """(b, t, d) -> (b, t, d) through intermediate_size."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        m = spec.mlp
        self.gate_proj = nn.Linear(spec.hidden_size, m.intermediate_size, bias=m.bias)
        self.up_proj = nn.Linear(spec.hidden_size, m.intermediate_size, bias=m.bias)
        self.down_proj = nn.Linear(m.intermediate_size, spec.hidden_size, bias=m.bias)
        self.activation = ACTIVATIONS[m.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
