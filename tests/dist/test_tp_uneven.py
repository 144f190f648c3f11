"""Tensor parallelism where it does not come out even: fewer kv heads than ranks, a vocabulary that tp does not divide; compiled blocks."""

from functools import cache

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.dist import test_contract as contract
from tests.dist.test_contract import Cell
from tests.dist.test_families_dist import compare, reference, run_families
from tests.helpers.dist import run_dist, run_pooled
from tests.helpers.families import FAMILIES, tiny_spec
from tests.helpers.tiny import uneven
from torchft.losses import linear_ce
from torchft.models.spec import ModelSpec

CELLS = {  # layout: (processes, degrees, compile)
    "tp2": (2, {"tp": 2}, ""),
    "tp2 without sp": (2, {"tp": 2, "sequence_parallel": False}, ""),
    "tp4": (4, {"tp": 4}, ""),
    "tp2 x fsdp2": (4, {"tp": 2}, ""),
    "tp2 compiled": (2, {"tp": 2}, "aot_eager"),
    "tp2 without sp compiled": (2, {"tp": 2, "sequence_parallel": False}, "aot_eager"),
}
IN_MAKE_TEST = {
    "tp2": ["llama bias", "qwen2", "qwen3", "gemma3"],
    "tp4": ["qwen3 bias tied"],
    "tp2 x fsdp2": ["qwen3", "gemma2"],
    "tp2 compiled": ["qwen3 bias tied"],
}


def uneven_spec(name: str) -> ModelSpec:
    """The tiny model of a family, which tp does not divide."""
    return uneven(tiny_spec(name))


@cache
def results_of(layout: str, names: tuple[str, ...]) -> list[dict[str, tuple]]:
    world, degrees, compile = CELLS[layout]
    return run_pooled(run_families, world, list(names), degrees, world, uneven_spec, compile, timeout=200)


@pytest.mark.parametrize("layout", IN_MAKE_TEST)
def test_shared_kv_heads_and_an_uneven_vocabulary_equal_one_process(layout: str):
    """Loss and every gradient, fp64: biases, q/k norms and sandwich norms, tied and untied heads, FSDP2 inside uneven shards, compiled."""
    check(layout, IN_MAKE_TEST[layout])


@pytest.mark.full
@pytest.mark.parametrize("layout", CELLS)
def test_every_family_with_shared_kv_heads_and_an_uneven_vocabulary_equals_one_process(layout: str):
    """The same for all families in every cell."""
    check(layout, list(FAMILIES))


def check(layout: str, names: list[str]) -> None:
    by_rank = results_of(layout, tuple(names))
    for name in names:
        compare(uneven_spec(name), reference(name, uneven_spec), [results[name] for results in by_rank])


def test_adapters_of_shared_kv_heads_equal_one_process():
    """LoRA on every projection with two kv heads over four ranks: losses, gradients of the adapters, weights after the steps."""
    cell = Cell("tp4-lora", 4, (("tp", 4),), lora=True, num_batches=2)
    contract.compare(cell, "fp64", run_pooled(contract.run_cell, 4, cell, "fp64"))


def test_ranks_of_uneven_rows_cut_their_tokens_alike(monkeypatch: pytest.MonkeyPatch):
    """Room for one row of 51 logits or two of 50 at a time: both ranks take the larger shard's chunks, whose sums they share."""
    monkeypatch.setitem(linear_ce.CHUNK_BYTES, "cpu", 2 * 50 * 4)
    compare(
        uneven_spec("qwen3"),
        reference("qwen3", uneven_spec),
        [r["qwen3"] for r in run_dist(run_families, 2, ["qwen3"], {"tp": 2}, 2, uneven_spec)],
    )


class Widths(TorchDispatchMode):
    """The last dimension of every tensor any operation makes, forward and backward."""

    def __init__(self):
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if getattr(x, "ndim", 0) > 1:
                self.seen.add(x.shape[-1])
        return out


def widths(names: list[str]) -> set[int]:
    with Widths() as mode:
        run_families(names, {"tp": 2}, 2, uneven_spec)
    return mode.seen


def test_no_rank_ever_holds_whole_logits():
    """A step of a tied and an untied model on tp 2 makes rows of 51 or 50 logits, and nothing with 101 columns."""
    for rank, seen in enumerate(run_pooled(widths, 2, ["qwen2", "gemma2"])):
        assert 51 - rank in seen and 101 not in seen
