"""Memory of this process in GiB. CUDA: what torch's allocator handed out. CPU: the resident set, which counts all of the process:
weights, data, the interpreter and libraries (and shared pages, so the sum over processes is an upper bound)."""

import os
import resource
import sys
from pathlib import Path

import torch

GIB = 1 << 30
_STATM = Path("/proc/self/statm")  # Linux: size and resident pages


def peak_gib(device: torch.device) -> float:
    """The most memory this process has used since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def now_gib(device: torch.device) -> float | None:
    """The memory this process uses now; None on a CPU without /proc."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / GIB
    if not _STATM.exists():
        return None
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / GIB
