"""FlexAttention's backward on a CPU, which torch refuses: its eager form computes it right, for tests alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.attention.flex_attention as flex


@contextmanager
def flex_on_cpu() -> Iterator[None]:
    """Inside, FlexAttention trains on a CPU (scores held whole, in at least fp32)."""
    torch._dynamo.reset()  # sizes that other tests have seen would become symbols, on which it stumbles
    before, flex._validate_device = flex._validate_device, lambda *args: None
    try:
        yield
    finally:
        flex._validate_device = before
