"""Which layers each pipeline stage gets: by cost, or by hand.

    cost of a stage = weights a token is multiplied with: its layers', and on the last stage the heads'; a token's row of the embedding
    on the first. The costliest stage sets the pipeline's pace, so the split makes that one as cheap as it can be.

Attention's products over keys are left out: they depend on the lengths of documents, and are the same in layers of one kind.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import cache

from torchft.errors import Problem
from torchft.metrics.flops import matmul_parameters
from torchft.models.spec import ModelSpec


def stage_ranges(spec: ModelSpec, num_stages: int, split: Sequence[int] = ()) -> list[range]:
    """The layers of each stage, contiguous, at least one. split: how many each gets (parallel.pp_split); empty: by cost."""
    counts = split or _by_cost(*layer_costs(spec), num_stages)
    bounds = [0, *itertools.accumulate(counts)]
    return [range(lo, hi) for lo, hi in itertools.pairwise(bounds)]


def layer_costs(spec: ModelSpec) -> tuple[tuple[int, ...], int, int]:
    """Multiply-adds a token: of each layer, of the embedding, of all heads."""
    heads = sum(spec.hidden_size * head.size for head in spec.heads.values())
    layer = (matmul_parameters(spec) - heads) // spec.num_layers
    return (layer,) * spec.num_layers, spec.hidden_size, heads


def check_split(spec: ModelSpec, num_stages: int, split: Sequence[int]) -> Iterator[Problem]:
    """More stages than layers, and a split by hand that is none."""
    if num_stages > spec.num_layers:
        given = f"{num_stages} stages (parallel.pp x stages a rank)"
        fix = "use fewer: lower parallel.pp or parallel.pp_stages_per_rank, or schedule=1f1b with one stage a rank"
        yield Problem("parallel.pp", given, f"at most num_layers={spec.num_layers}, a layer a stage", fix)
    elif split and (len(split) != num_stages or sum(split) != spec.num_layers or min(split) < 1):
        by_cost = [len(layers) for layers in stage_ranges(spec, num_stages)]
        expected = f"{num_stages} numbers >= 1 whose sum is num_layers={spec.num_layers}"
        yield Problem("parallel.pp_split", str(list(split)), expected, f"use e.g. {by_cost}, or [] to split by cost")


@cache
def _by_cost(layers: tuple[int, ...], embedding: int, heads: int, num_stages: int) -> tuple[int, ...]:
    """The number of layers of each stage; of the splits with the cheapest costliest stage, one with the most even rest."""
    before = [0, *itertools.accumulate(layers)]
    n = len(layers)
    best: dict[int, tuple[tuple[int, int], tuple[int, ...]]] = {0: ((0, 0), ())}  # layers dealt -> (costliest, sum of squares), counts
    for stage in range(num_stages):
        extra = embedding * (stage == 0) + heads * (stage == num_stages - 1)
        ends = [n] if stage == num_stages - 1 else range(stage + 1, n - (num_stages - stage - 1) + 1)
        dealt: dict[int, tuple[tuple[int, int], tuple[int, ...]]] = {}
        for end in ends:
            choices = []
            for start, ((costliest, squares), counts) in best.items():
                if start < end:
                    cost = before[end] - before[start] + extra
                    choices.append(((max(costliest, cost), squares + cost * cost), (*counts, end - start)))
            dealt[end] = min(choices)
        best = dealt
    return best[n][1]
