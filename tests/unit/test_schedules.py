"""Pipeline schedules without processes: which stages, how many micro-batches, who waits; and the split of layers into stages."""

import itertools
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from tests.helpers.recipe import ROOT
from tests.helpers.tiny import tiny_llama
from torchft.cli.main import main
from torchft.compat import schedule_actions
from torchft.errors import ConfigError
from torchft.models.build import spec_of_size
from torchft.models.spec import HeadSpec
from torchft.parallel.draw import as_svg, as_text, draw
from torchft.parallel.schedules import SCHEDULES, fits, legal_counts, num_stages
from torchft.parallel.stages import check_split, layer_costs, stage_ranges


@pytest.mark.parametrize("pp,n", [(2, 2), (2, 8), (4, 4), (4, 8), (8, 16)])
def test_bubbles_are_the_closed_forms(pp, n):
    """(p - 1) / (n + p - 1) for gpipe and 1f1b; interleaved with v stages a rank: (p - 1) / (v n + p - 1). Splitting the backward helps."""
    whole, interleaved = (pp - 1) / (n + pp - 1), (pp - 1) / (2 * n + pp - 1)
    assert draw("gpipe", pp, n).bubble == pytest.approx(whole)
    assert draw("1f1b", pp, n).bubble == pytest.approx(whole)
    assert draw("interleaved_1f1b", pp, n, 2).bubble == pytest.approx(interleaved)
    assert draw("interleaved_1f1b", pp, n, 1).bubble == pytest.approx(whole)
    assert draw("zbv", pp, max(n, 2 * pp)).bubble < interleaved and draw("dualpipev", pp, max(n, 2 * pp)).bubble < interleaved


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_stage_computes_every_micro_batch_once(schedule):
    """F once, and B once or I and W once, for each stage on the rank that holds it, in an order that never waits for itself."""
    for pp, n in itertools.product((2, 3, 4), range(1, 13)):
        if not fits(schedule, pp, n):
            continue
        drawing, count = draw(schedule, pp, n), num_stages(schedule, pp, 2)
        assert sorted(itertools.chain(*drawing.stages_of)) == list(range(count))
        for rank, line in enumerate(drawing.steps):
            assert {step.action.stage for step in line} == set(drawing.stages_of[rank])
            assert all(before.end <= after.start for before, after in itertools.pairwise(line))
        seen = [step.action for line in drawing.steps for step in line]
        assert len(seen) == len(set(seen))
        kinds = {(stage, i): "".join(sorted(a.kind for a in seen if a[1:] == (stage, i))) for stage in range(count) for i in range(n)}
        assert set(kinds.values()) <= {"BF", "FIW"}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_legal_numbers_of_micro_batches_are_those_torch_takes(schedule):
    """`fits` says yes where torch's class can be built and no where it refuses; the listed numbers are legal ones around."""
    kind = SCHEDULES[schedule]
    for pp, n in itertools.product((2, 3, 4), range(1, 14)):
        count = num_stages(schedule, pp, 2)
        stages_of = [kind.stages_of(rank, pp, count) for rank in range(pp)]
        try:
            schedule_actions(kind.cls, pp, stages_of, n)
            taken = True
        except ValueError:
            taken = False
        # 1F1B's check comes later, when it has stages
        assert fits(schedule, pp, n) == (taken and not (schedule == "1f1b" and n < pp)), (pp, n)
        legal = legal_counts(schedule, pp, n)
        assert all(fits(schedule, pp, m) for m in legal) and legal[-1] > n


def test_a_drawing_by_hand():
    """GPipe on two ranks, two micro-batches: the last rank starts one forward later and is through one backward earlier."""
    assert as_text(draw("gpipe", 2, 2)).splitlines() == [
        "gpipe: 2 ranks, 2 micro-batches, bubble 33.3%",
        "rank 0 (stages 0) |F0 F1          B0--- B1--- |",
        "rank 1 (stages 1) |   F0 F1 B0--- B1---       |",
    ]


def test_the_page_says_what_is_drawn():
    """docs/parallelism.md: each schedule's bubble at pp 4 and 8 micro-batches, the drawing of zbv, and the split of Llama 3.2 1B."""
    page = (ROOT / "docs" / "parallelism.md").read_text()
    for name in SCHEDULES:
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"| {draw(name, 4, 8).bubble:.1%} |" in row
    assert as_text(draw("zbv", 2, 4)) in page
    assert "two: {} and {}".format(*map(len, stage_ranges(spec_of_size("llama", "llama3.2-1b"), 2))) in page


def test_svg_has_a_box_for_every_step():
    """Well-formed XML; as many boxes as steps that take time, none outside the picture."""
    drawing = draw("zbv", 4, 8)
    root = ElementTree.fromstring(as_svg(drawing))
    boxes = root.findall(".//{http://www.w3.org/2000/svg}rect")
    assert len(boxes) == sum(step.end > step.start for line in drawing.steps for step in line)
    assert all(float(box.get("x")) + float(box.get("width")) <= float(root.get("width")) for box in boxes)


def test_the_verb(capsys, tmp_path):
    """`torchft schedule NAME` prints and writes; without a name every bubble; an illegal number names legal ones."""
    assert main(["schedule", "zbv", "--pp", "4", "--micro-batches", "8", "--svg", str(tmp_path / "a.svg")]) == 0
    assert "bubble 5.9%" in capsys.readouterr().out and (tmp_path / "a.svg").read_text().startswith("<svg")
    assert main(["schedule", "--pp", "4", "--micro-batches", "7"]) == 0
    assert "takes 8 micro-batches" in capsys.readouterr().out
    assert main(["schedule", "1f1b", "--pp", "4", "--micro-batches", "3"]) == 2
    assert "use one of [4]" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="zbv"):
        draw("zb", 4, 8)


def splits(num_layers: int, num_stages: int):
    """All ways to cut a row of layers."""
    for cuts in itertools.combinations(range(1, num_layers), num_stages - 1):
        yield [b - a for a, b in itertools.pairwise([0, *cuts, num_layers])]


@pytest.mark.parametrize("vocab", [96, 3000, 100_000])
@pytest.mark.parametrize("num_layers,num_stages", [(4, 2), (7, 3), (9, 4), (5, 5)])
def test_no_split_has_a_cheaper_costliest_stage(num_layers, num_stages, vocab):
    """The split by cost is as good as the best of all splits, tried one by one; every layer is in one stage."""
    spec = replace(tiny_llama(num_layers=num_layers), heads={"lm": HeadSpec(vocab)})
    layers, embedding, heads = layer_costs(spec)

    def costliest(counts):
        costs = [n * layers[0] for n in counts]
        costs[0], costs[-1] = costs[0] + embedding, costs[-1] + heads
        return max(costs)

    ranges = stage_ranges(spec, num_stages)
    assert [i for r in ranges for i in r] == list(range(num_layers))
    assert costliest(map(len, ranges)) == min(map(costliest, splits(num_layers, num_stages)))


def test_the_head_takes_layers_off_the_last_stage():
    """Llama 3.2 1B's head costs as much as four layers: of 16 layers on two stages the last gets fewer; by hand it gets what is asked."""
    spec = spec_of_size("llama", "llama3.2-1b")
    by_cost = [len(layers) for layers in stage_ranges(spec, 2)]
    assert by_cost[0] > by_cost[1] and sum(by_cost) == 16
    assert [len(layers) for layers in stage_ranges(spec, 2, [3, 13])] == [3, 13]


def test_a_split_that_is_none():
    """Wrong sum, wrong length, an empty stage, more stages than layers: each says what would do."""
    spec = tiny_llama()
    for split in ([1, 2], [4], [0, 4], [1, 1, 2]):
        (problem,) = check_split(spec, 2, split)
        assert "parallel.pp_split" in str(problem) and "[2, 2]" in str(problem)
    assert "num_layers=4" in str(next(check_split(spec, 5, [])))
    assert not list(check_split(spec, 2, [1, 3]))
