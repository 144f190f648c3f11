"""LoRA-FA (Zhang et al. 2023): A stays at its first values and only B trains, so no layer's input is kept for the backward.

With `projected`, as in PEFT's optimizer for it, B's gradient becomes the one whose step is nearest to that of the whole weight:

    g_B <- g_B (A A^T + 1e-8 I)^-1 / factor^2

A never changes, so the small matrix on the right is made once. It acts on B's ranks, which no layout shards.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from torchft.peft.inits import whole
from torchft.peft.linear import LoraMixin

DELTA = 1e-8  # of PEFT


def project_gradients(optimizer: Optimizer, roots: Sequence[nn.Module]) -> None:
    """From now on each step of `optimizer` projects the gradients of B first. All ranks of a stage step together."""
    kept: dict[LoraMixin, Tensor] = {}

    @torch.no_grad()
    def project(*_) -> None:
        for module in (module for root in roots for module in root.modules() if isinstance(module, LoraMixin)):
            if module not in kept:
                kept[module] = projection(whole(module.lora_a), module.lora_factor)
            if (grad := module.lora_b.grad) is not None:
                local = grad.to_local() if isinstance(grad, DTensor) else grad
                local.copy_(local.to(kept[module].dtype) @ kept[module])

    optimizer.register_step_pre_hook(project)


def projection(a: Tensor, factor: float) -> Tensor:
    """(A A^T + 1e-8 I)^-1 / factor^2 of A (r, in): (r, r), in at least fp32."""
    a = a.to(torch.promote_types(a.dtype, torch.float32))
    return torch.linalg.pinv(a @ a.T + DELTA * torch.eye(len(a), dtype=a.dtype, device=a.device)) / factor**2
