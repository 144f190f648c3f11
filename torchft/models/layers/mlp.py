"""The MLP: gated, down(act(gate(x)) * up(x)) (Shazeer 2020), or plain, down(act(up(x)))."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from torchft.models.spec import ModelSpec

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


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


class PlainMlp(nn.Module):
    """Without a gate (GPT-2)."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        m = spec.mlp
        self.up_proj = nn.Linear(spec.hidden_size, m.intermediate_size, bias=m.bias)
        self.down_proj = nn.Linear(m.intermediate_size, spec.hidden_size, bias=m.bias)
        self.activation = ACTIVATIONS[m.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


def build_mlp(spec: ModelSpec) -> nn.Module:
    """The MLP a spec describes."""
    return Mlp(spec) if spec.mlp.gated else PlainMlp(spec)
