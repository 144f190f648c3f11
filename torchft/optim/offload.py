"""The optimizer's state in host memory between steps: a device then has room for activations where its state would lie.

    forward, backward (state on the host) --before the update--> device --step--> --after it--> host

The update itself is the optimizer's own, so no number changes; each step pays for moving the state there and back.
"""

import torch
from torch import Tensor
from torch.optim import Optimizer


def offload_state(optimizer: Optimizer, rest: torch.device | str = "cpu") -> None:
    """Keeps every state tensor on `rest` between steps, also what a checkpoint loads. Step counts (0-dim) stay where they are."""

    def fetch(*_: object) -> None:
        for parameter, state in optimizer.state.items():
            state |= {key: value.to(parameter.device) for key, value in state.items() if _moves(value)}

    def put_back(*_: object) -> None:
        for state in optimizer.state.values():
            state |= {key: value.to(rest) for key, value in state.items() if _moves(value)}

    optimizer.register_step_pre_hook(fetch)
    optimizer.register_step_post_hook(put_back)


def _moves(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0
