"""The support matrix of docs/parallelism.md says what the tests hold, no more and no less."""

from itertools import product

from tests.helpers.matrix import PAGE, cells, layout_of, page_with, table
from torchft.parallel.mesh import ParallelConfig, resolve_degrees


def test_page_is_made_from_the_cells():
    """The page holds the generated matrix word for word: `python -m tests.helpers.matrix` after a change of cells."""
    assert PAGE.read_text() == page_with(table())


def test_every_combination_of_axes_has_a_cell():
    """Each of the 15 ways to use pp, dp_replicate, dp_shard and tp is held equal to one process by some cell."""
    held = set()
    for cell, _ in cells():
        degrees = resolve_degrees(ParallelConfig(**dict(cell.parallel)), cell.world)
        held.add(tuple(degrees[axis] > 1 for axis in ("pp", "dp_replicate", "dp_shard", "tp")))
    assert held == set(product((False, True), repeat=4))


def test_a_layout_by_hand():
    """The words for one layout."""
    assert layout_of(8, {"pp": 2, "tp": 2, "sequence_parallel": False}) == "pp 2 x dp_shard 2 x tp 2, no sequence parallelism"
