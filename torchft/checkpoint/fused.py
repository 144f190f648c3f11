"""Weights that HF stores joined (Phi-3's qkv_proj) or transposed (GPT-2's Conv1D), as ours and back, byte for byte.

    qkv_proj (q + k + v rows, in) --part_of--> q_proj | k_proj | v_proj --join--> qkv_proj          transposed: (in, out) <-> (out, in)

A part is read lazily, its own rows alone; joining holds the members of one tensor at a time.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from torchft.checkpoint.tensor_files import LazyTensor
from torchft.models.keys import Stored


def part_of(tensor: LazyTensor, stored: Stored, ours: str, shapes: Mapping[str, tuple[int, ...]]) -> LazyTensor:
    """Our weight `ours` inside a tensor of the file; shapes: of our weights. If the whole has not the rows of its members together,
    the part shows the file's shape, for the caller's check to report."""
    turned = stored.transposed and len(tensor.shape) == 2
    shape = tensor.shape[::-1] if turned else tensor.shape
    if len(stored.members) == 1 and not turned:
        return tensor
    rows = [shapes[member][0] for member in stored.members]
    if not shape or sum(rows) != shape[0]:
        return LazyTensor(shape, tensor.dtype, tensor.read)
    index = stored.members.index(ours)
    first, held = sum(rows[:index]), (rows[index], *shape[1:])

    def read(part: tuple[slice, ...]) -> Tensor:
        spans = [slice(*p.indices(size)) for p, size in zip((*part, *[slice(None)] * (len(held) - len(part))), held, strict=True)]
        spans[0] = slice(spans[0].start + first, spans[0].stop + first)
        return tensor.read((spans[1], spans[0])).t() if turned else tensor.read(tuple(spans))

    return LazyTensor(held, tensor.dtype, read)


def join(stored: Sequence[Stored], names: Sequence[str], tensors: Iterable[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our tensors, in order, -> HF's (name, tensor), each as soon as all its members have come."""
    waiting: dict[str, dict[str, Tensor]] = {}
    for s, name, tensor in zip(stored, names, tensors, strict=True):
        members = waiting.setdefault(s.name, {})
        members[name] = tensor
        if len(members) == len(s.members):
            whole = tensor if len(members) == 1 else torch.cat([members[m] for m in s.members])
            yield s.name, whole.t() if s.transposed and whole.ndim == 2 else whole
            del waiting[s.name]
    assert not waiting, f"tensors that were not completed: {list(waiting)[:4]}"


def joined_bytes(stored: Sequence[Stored], shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]) -> dict[str, int]:
    """HF's names and their bytes, in the order in which `join` completes them."""
    last = {s.name: place for place, s in enumerate(stored)}
    sizes = dict.fromkeys(sorted(last, key=last.__getitem__), 0)
    for s, shape, dtype in zip(stored, shapes, dtypes, strict=True):
        sizes[s.name] += math.prod(shape) * dtype.itemsize
    return sizes
