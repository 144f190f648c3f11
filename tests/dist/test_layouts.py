"""All axes together: each pair, each triple on 8 processes and all four on 16, held as in test_contract to one bare process."""

import pytest

from tests.dist.test_contract import Cell, compare, run_cell
from tests.helpers.dist import run_pooled

TP, PP, REPLICATE = ("tp", 2), ("pp", 2), ("dp_replicate", 2)
NO_SP = ("sequence_parallel", False)

LAYOUTS = (
    Cell("replicate2", 2, (REPLICATE,), recompute="selective"),
    Cell("pp2-replicate2", 4, (PP, REPLICATE)),
    Cell("pp2-tp2", 4, (PP, TP)),
    Cell("pp2-tp2-nosp-untied-recompute", 4, (PP, TP, NO_SP), tied=False, recompute="full"),
    Cell("replicate2-tp2", 4, (REPLICATE, TP)),
    Cell("pp2-fsdp2-tp2", 8, (PP, TP)),
)
SCHEDULES = (  # the interleaved ones: two stages on each of two ranks
    Cell("pp2-interleaved", 2, (PP, ("schedule", "interleaved_1f1b"))),
    Cell("pp2-interleaved-one-a-rank", 2, (PP, ("schedule", "interleaved_1f1b"), ("pp_stages_per_rank", 1))),
    Cell("pp2-zero-bubble-untied", 2, (PP, ("schedule", "interleaved_zero_bubble"), ("pp_split", [1, 1, 1, 1])), tied=False),
    Cell("pp2-zbv-recompute", 2, (PP, ("schedule", "zbv")), recompute="full"),
    Cell("pp2-zbv-lora-untied", 2, (PP, ("schedule", "zbv")), lora=True, tied=False),
    Cell("pp2-dualpipev", 2, (PP, ("schedule", "dualpipev"))),
    Cell("pp2-gpipe-split-by-hand", 2, (PP, ("schedule", "gpipe"), ("pp_split", [1, 3]))),
    Cell("pp2-fsdp2-dualpipev", 4, (PP, ("schedule", "dualpipev")), num_batches=8),
    Cell("pp2-tp2-zbv", 4, (PP, TP, ("schedule", "zbv"))),
)
MORE_SCHEDULES = tuple(
    Cell(f"{layout}-{schedule}", world, (PP, *parallel, ("schedule", schedule)), num_batches=8)
    for layout, world, parallel in (("pp2-tp2", 4, (TP,)), ("pp2-hsdp2x2", 8, (REPLICATE,)), ("pp2-fsdp2-tp2", 8, (TP,)))
    for schedule in ("gpipe", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev")
)
MORE_LAYOUTS = (
    Cell("pp2-tp2-lora", 4, (PP, TP), lora=True, recompute="full"),
    Cell("pp2-tp2-compile", 4, (PP, TP), compile="aot_eager"),
    Cell("replicate2-tp2-nosp-lora-untied", 4, (REPLICATE, TP, NO_SP), lora=True, tied=False),
    Cell("pp4", 4, (("pp", 4),)),
    Cell("hsdp2x2-tp2", 8, (REPLICATE, TP)),
    Cell("pp2-hsdp2x2", 8, (PP, REPLICATE), num_batches=8),
    Cell("pp2-replicate2-tp2", 8, (PP, REPLICATE, TP, ("dp_shard", 1)), recompute="full"),
    Cell("pp2-fsdp2-tp2-nosp-untied", 8, (PP, TP, NO_SP), tied=False),
    Cell("pp2-hsdp2x2-tp2", 16, (PP, REPLICATE, TP), num_batches=8),
    *(
        Cell(f"{layout}-{family}", world, parallel, family=family)
        for layout, world, parallel in (("pp2-tp2", 4, (PP, TP)), ("pp2-fsdp2-tp2", 8, (PP, TP)))
        for family in ("qwen3", "gemma3", "phi3")
    ),
    *MORE_SCHEDULES,
)


@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
@pytest.mark.parametrize("cell", LAYOUTS + SCHEDULES, ids=lambda c: c.name)
def test_axes_together_equal_one_process(cell: Cell, dtype: str):
    """Loss of five steps, every gradient, every weight after five steps, and the validation loss."""
    compare(cell, dtype, run_pooled(run_cell, cell.world, cell, dtype))


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
@pytest.mark.parametrize("cell", MORE_LAYOUTS, ids=lambda c: c.name)
def test_more_layouts_equal_one_process(cell: Cell, dtype: str):
    """The same for the rest of the matrix."""
    compare(cell, dtype, run_pooled(run_cell, cell.world, cell, dtype))
