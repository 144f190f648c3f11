"""What training an adapter holds on one process, in closed form: the frozen base, the adapter, its gradients and its optimizer.

    nf4     in / 2 bytes a row, one scale a block (1 byte with double, else 4), 4 bytes for each 256 scales and 4 for their mean
    int8    in bytes a row and one scale of 4       gptq, awq    in / 2 bytes a row, 5 bytes a group, 4 an input
    frozen weights that are not quantised: the compute precision; an adapter: fp32 (precision.params), as much again for its gradient and
    twice for AdamW

Activations and gathered blocks come on top (docs/quantization.md has an example), and so do copies of modules_to_save and trained rows of
the vocabulary, each 16 bytes a number in fp32. All of it is divided over dp_shard x tp, which shards
every matrix; norms and the adapter's narrow sides are so small that the closed form divides them too.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torchft.quant.nf4 import GROUP
from torchft.quant.swap import QuantConfig

GIB = 1 << 30
ADAMW = 2  # moments of each trained number


@dataclass(frozen=True)
class AdapterMemory:
    """Bytes on one process."""

    base: int
    adapter: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.base + self.adapter + self.gradients + self.optimizer


def packed_bytes(shape: tuple[int, int], quant: QuantConfig, group_size: int | None = None) -> int:
    """Of one quantised weight (out, in). group_size: of a GPTQ or AWQ folder."""
    out, width = shape
    if quant.format == "int8":
        return out * width + 4 * out
    if quant.format == "nf4":
        blocks = out * width // quant.block_size
        return out * width // 2 + (blocks + 4 * (math.ceil(blocks / GROUP) + 1) if quant.double else 4 * blocks)
    return out * width // 2 + 5 * out * math.ceil(width / (group_size or width)) + 4 * width


def adapter_memory(
    shapes: Mapping[str, tuple[int, ...]],
    quantised: Iterable[str],
    ranks: Mapping[str, int],
    quant: QuantConfig,
    *,
    frozen_bytes: int = 2,
    trained_bytes: int = 4,
    shards: int = 1,
) -> AdapterMemory:
    """shapes: of all weights of the model (weight_shapes of checkpoint/hf.py). quantised: the names of those that are packed.

    ranks: module -> rank of its adapter. frozen_bytes, trained_bytes: a number of the compute precision and of precision.params.
    shards: dp_shard x tp.
    """
    packed = set(quantised)
    base = sum(packed_bytes(shape, quant) if name in packed else frozen_bytes * math.prod(shape) for name, shape in shapes.items())
    trained = trained_bytes * sum(rank * sum(shapes[f"{module}.weight"]) for module, rank in ranks.items())
    per_rank = [math.ceil(part / shards) for part in (base, trained, trained, ADAMW * trained)]
    return AdapterMemory(*per_rank)
