"""All axes together: each pair, each triple on 8 processes and all four on 16, held as in test_contract to one bare process."""

from dataclasses import replace

import pytest

from tests.dist.test_contract import Cell, compare, run_cell, runs
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
    Cell(f"{layout}-{schedule}", world, (PP, *parallel, ("schedule", schedule)), num_batches=num_batches)
    for layout, world, parallel, num_batches in (
        ("pp2-tp2", 4, (TP,), 4),
        ("pp2-hsdp2x2", 8, (REPLICATE,), 16),
        ("pp2-fsdp2-tp2", 8, (TP,), 8),
    )
    for schedule in ("gpipe", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev")
    if (layout, schedule) != ("pp2-tp2", "zbv")
)
OTHERS = ("qwen3", "gemma3", "phi3")
FAMILIES = tuple(Cell(f"pp2-tp2-{family}", 4, (PP, TP), family=family, num_batches=2) for family in OTHERS)
MORE_FAMILIES = (  # "": the tiny llama
    *(Cell(f"pp2-fsdp2-tp2-{family}", 8, (PP, TP), family=family) for family in OTHERS),
    *(Cell(f"pp2-tp2-lora-{family}", 4, (PP, TP), family=family, lora=True, num_batches=2) for family in OTHERS),
    *(Cell(f"pp2-fsdp2-tp2-lora-{family or 'llama'}", 8, (PP, TP), family=family, lora=True) for family in ("", *OTHERS)),
    *(Cell(f"fsdp2-tp2-compile-{family or 'llama'}", 4, (TP,), family=family, compile="aot_eager") for family in ("", *OTHERS)),
    *(Cell(f"pp2-fsdp2-compile-{family or 'llama'}", 4, (PP,), family=family, compile="aot_eager") for family in ("", *OTHERS)),
)
MORE_LAYOUTS = (
    Cell("pp2-tp2-lora", 4, (PP, TP), lora=True, recompute="full"),
    Cell("pp2-tp2-compile", 4, (PP, TP), compile="aot_eager"),
    Cell("replicate2-tp2-nosp-lora-untied", 4, (REPLICATE, TP, NO_SP), lora=True, tied=False),
    Cell("pp4", 4, (("pp", 4),)),
    Cell("hsdp2x2-tp2", 8, (REPLICATE, TP), num_batches=8),
    Cell("pp2-hsdp2x2", 8, (PP, REPLICATE), num_batches=8),
    Cell("pp2-replicate2-tp2", 8, (PP, REPLICATE, TP, ("dp_shard", 1)), recompute="full"),
    Cell("pp2-fsdp2-tp2-nosp-untied", 8, (PP, TP, NO_SP), tied=False),
    Cell("pp2-hsdp2x2-tp2", 16, (PP, REPLICATE, TP), num_batches=8),
    *MORE_SCHEDULES,
    *MORE_FAMILIES,
)
CELLS = (*LAYOUTS, *SCHEDULES, *FAMILIES, *(replace(cell, full=True) for cell in MORE_LAYOUTS))


@pytest.mark.parametrize("cell, dtype", runs(CELLS))
def test_axes_together_equal_one_process(cell: Cell, dtype: str):
    """Loss of five steps, every gradient, every weight after five steps, and the validation loss."""
    compare(cell, dtype, run_pooled(run_cell, cell.world, cell, dtype, timeout=200))
