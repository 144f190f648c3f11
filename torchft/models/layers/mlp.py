"""The MLP: gated, down(act(gate(x)) * up(x)) (Shazeer 2020), or plain, down(act(up(x)))."""

from torch import Tensor, nn

from torchft.models.layers.fused import ACTIVATIONS, gated
from torchft.models.spec import ModelSpec


class Mlp(nn.Module):
    """(b, t, d) -> (b, t, d) through intermediate_size."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        m = spec.mlp
        self.gate_proj = nn.Linear(spec.hidden_size, m.intermediate_size, bias=m.bias)
        self.up_proj = nn.Linear(spec.hidden_size, m.intermediate_size, bias=m.bias)
        self.down_proj = nn.Linear(m.intermediate_size, spec.hidden_size, bias=m.bias)
        self.activation = m.activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.activation))


class PlainMlp(nn.Module):
    """Without a gate (GPT-2)."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        m = spec.mlp
        self.up_proj = nn.Linear(spec.hidden_size, m.intermediate_size, bias=m.bias)
        self.down_proj = nn.Linear(m.intermediate_size, spec.hidden_size, bias=m.bias)
        self.activation = ACTIVATIONS[m.activation][0]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


def build_mlp(spec: ModelSpec) -> nn.Module:
    """The MLP a spec describes."""
    return Mlp(spec) if spec.mlp.gated else PlainMlp(spec)
