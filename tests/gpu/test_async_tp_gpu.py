"""Asynchronous tensor parallelism on CUDA: the numbers of one process."""

import pytest
import torch

from tests.dist.test_contract import Cell, compare, run_cell
from tests.helpers.dist import run_dist

CELL = Cell("tp2-async", 2, (("tp", 2), ("async_tp", True)), compile="inductor", num_batches=2)


@pytest.mark.gpu
def test_overlapped_traffic_changes_no_number():
    """Losses, gradients and weights of five steps in fp32, blocks compiled, symmetric memory between two devices."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 CUDA devices, found {torch.cuda.device_count()}")
    compare(CELL, "fp32", run_dist(run_cell, 2, CELL, "fp32", "cuda", timeout=250, backend="nccl"))
