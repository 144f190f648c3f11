"""On a CPU freed memory is kept for the next tensor, unless the user has set the allocator's behaviour."""

import platform
import resource
import subprocess
import sys

import pytest

from torchft.compat import keep_freed_memory

FAULTS = """
import resource, torch
from torchft.dist import init_world
init_world("cpu")
for _ in range(20):
    torch.ones(16 << 20)  # 64 MiB, freed at once; the first ones still grow the heap
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(**environment: str) -> int:
    """Of eight tensors of 64 MiB, each freed before the next, in a fresh process that had some before."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), **environment}
    return int(subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_taken_again():
    """Once it is used, memory costs no page faults to speak of: fewer for eight tensors than half a tensor has pages."""
    pages = (64 << 20) // resource.getpagesize()
    assert keep_freed_memory()
    assert page_faults() < pages / 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_the_users_own_setting_wins():
    """With a MALLOC_ variable given nothing is changed: every tensor comes from the kernel anew, as glibc does by default."""
    pages = (64 << 20) // resource.getpagesize()
    faults = page_faults(MALLOC_MMAP_THRESHOLD_="131072")
    assert faults >= pages or faults >= 8 * (64 << 20) // (2 << 20), f"{faults=}"  # huge pages: one fault for 2 MiB
