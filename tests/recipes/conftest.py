"""For recipes that run inside the test's own process."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture(autouse=True)
def no_group_left() -> Iterator[None]:
    """One process in mixed precision makes a group of one, which ends with the process; the next test begins without."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
