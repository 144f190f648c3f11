"""The contract's cells on CUDA and NCCL, against the same reference on the CPU."""

import pytest
import torch

from tests.dist.test_contract import CELLS, compare, run_cell
from tests.helpers.dist import run_dist


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS, ids=lambda c: c.name)
def test_layout_equals_one_cpu_process(cell):
    """Losses, every gradient and every weight in fp64, as on gloo; cells that need more devices than there are skip."""
    if torch.cuda.device_count() < cell.world:
        pytest.skip(f"needs {cell.world} CUDA devices, found {torch.cuda.device_count()}")
    if cell.world == 1:
        ranks = [run_cell(cell, "fp64", "cuda")]
    else:
        ranks = run_dist(run_cell, cell.world, cell, "fp64", "cuda", timeout=180, backend="nccl")
    compare(cell, "fp64", ranks)
