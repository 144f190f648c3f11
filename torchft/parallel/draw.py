"""A pipeline schedule drawn: what each rank computes when, and the bubble, the share of the ranks' time in which they wait.

    rank 0 (stages 0)  |F0 F1 B0   B1   |      F forward, B whole backward, I backward for the input, W for the weights;
    rank 1 (stages 1)  |   F0 B0   F1 ..|      the number is the micro-batch, ' a rank's second stage, '' its third

The order is torch's own, what its schedules will run. A step starts when its rank is free and what it needs is there; sending takes no
time; all stages cost the same, a backward twice a forward and its two parts a forward each. The first stage has no input to
give a gradient to: its whole backward runs at W.
"""

from dataclasses import dataclass

from torchft.compat import Action, schedule_actions
from torchft.errors import ConfigError, Problem
from torchft.parallel.schedules import SCHEDULES, fits, legal_counts, num_stages

TICKS = {"F": 1, "B": 2, "I": 1, "W": 1}  # of one forward of one stage
COLORS = {"F": "#4c78a8", "B": "#54a24b", "I": "#72b7b2", "W": "#eeca3b"}
UNIT, ROW, LEFT, TOP = 26, 28, 150, 34  # of the SVG, in pixels


@dataclass(frozen=True)
class Step:
    """One action in time."""

    action: Action
    start: int  # ticks
    end: int


@dataclass(frozen=True)
class Drawing:
    """What every rank does."""

    schedule: str
    stages_of: list[list[int]]  # by rank
    steps: list[list[Step]]  # by rank, in order
    num_microbatches: int

    @property
    def length(self) -> int:
        """Ticks from the first step to the last."""
        return max(step.end for line in self.steps for step in line)

    @property
    def bubble(self) -> float:
        """The share of all ranks' time that they wait."""
        busy = sum(step.end - step.start for line in self.steps for step in line)
        return 1 - busy / (len(self.steps) * self.length)


def draw(schedule: str, pp: int, num_microbatches: int, stages_per_rank: int = 2) -> Drawing:
    """The steps of one training step. Raises ConfigError for a number of micro-batches that the schedule does not take."""
    problems = []
    if schedule not in SCHEDULES:
        problems.append(Problem("schedule", schedule, ", ".join(SCHEDULES), "choose one of them"))
    for name, value, least in (("--pp", pp, 2), ("--micro-batches", num_microbatches, 1), ("--stages-per-rank", stages_per_rank, 1)):
        if value < least:
            problems.append(Problem(name, str(value), f"at least {least}", f"use {least} or more"))
    if not problems and not fits(schedule, pp, num_microbatches):
        legal = legal_counts(schedule, pp, num_microbatches)
        problems.append(
            Problem("--micro-batches", str(num_microbatches), f"a number that {schedule} takes on {pp} ranks", f"use one of {legal}")
        )
    if problems:
        raise ConfigError(problems)
    kind, count = SCHEDULES[schedule], num_stages(schedule, pp, stages_per_rank)
    stages_of = [kind.stages_of(rank, pp, count) for rank in range(pp)]
    if schedule == "1f1b":
        actions = [_one_forward_one_backward(rank, pp, num_microbatches) for rank in range(pp)]
    else:
        actions = schedule_actions(kind.cls, pp, stages_of, num_microbatches)
    steps = _timed(actions, count)
    return Drawing(schedule, stages_of, steps, num_microbatches)


def as_text(drawing: Drawing) -> str:
    """A line a rank, a cell a tick."""
    labels = [[_label(drawing, rank, step) for step in line] for rank, line in enumerate(drawing.steps)]
    width = max(len(label) for line in labels for label in line) + 1
    names = [_name(drawing, rank) for rank in range(len(drawing.steps))]
    rows = []
    for name, line, texts in zip(names, drawing.steps, labels, strict=True):
        row = ""
        for step, text in zip(line, texts, strict=True):
            if ticks := step.end - step.start:
                cell = text.ljust(ticks * width - 1, "-" if ticks > 1 else " ")
                row = row.ljust(step.start * width) + cell + " "
        rows.append(f"{name.ljust(max(map(len, names)))} |{row.ljust(drawing.length * width)}|")
    return "\n".join([_title(drawing), *rows])


def as_svg(drawing: Drawing) -> str:
    """The same as a picture; a rank's later stages are paler."""
    parts = [f'<text x="4" y="20">{_title(drawing)}</text>']
    for rank, line in enumerate(drawing.steps):
        y = TOP + rank * ROW
        parts.append(f'<text x="4" y="{y + 18}">{_name(drawing, rank)}</text>')
        parts += [_box(step, y, paler=step.action.stage != drawing.stages_of[rank][0]) for step in line if step.end > step.start]
    width, height = LEFT + drawing.length * UNIT + 4, TOP + len(drawing.steps) * ROW + 4
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">'
    return "\n".join([head, *parts, "</svg>\n"])


def _box(step: Step, y: int, *, paler: bool) -> str:
    kind, stage, microbatch = step.action
    x, width = LEFT + step.start * UNIT, (step.end - step.start) * UNIT
    fill = f'fill="{COLORS[kind]}" fill-opacity="{0.55 if paler else 1}"'
    return (
        f"<g><title>{kind} stage {stage} micro-batch {microbatch}</title>"
        f'<rect x="{x}" y="{y}" width="{width - 1}" height="{ROW - 4}" {fill}/>'
        f'<text x="{x + width // 2}" y="{y + 17}" text-anchor="middle">{microbatch}</text></g>'
    )


def compare(pp: int, num_microbatches: int, stages_per_rank: int = 2) -> str:
    """Every schedule's bubble, a line each."""
    lines = [f"{pp} ranks, {num_microbatches} micro-batches", f"  {'schedule':24} stages  bubble"]
    for name in SCHEDULES:
        count = num_stages(name, pp, stages_per_rank)
        if fits(name, pp, num_microbatches):
            lines.append(f"  {name:24} {count:6}  {draw(name, pp, num_microbatches, stages_per_rank).bubble:6.1%}")
        else:
            lines.append(f"  {name:24} {count:6}  takes {' or '.join(map(str, legal_counts(name, pp, num_microbatches)))} micro-batches")
    return "\n".join(lines)


def _one_forward_one_backward(rank: int, pp: int, n: int) -> list[Action]:
    """What Schedule1F1B runs; the order it lists of itself numbers the last rank's forwards from 1 in torch 2.13."""
    ahead = min(n, pp - rank)
    order = [Action("F", rank, i) for i in range(ahead)]
    for i in range(n):
        order += [Action("B", rank, i), *([Action("F", rank, i + ahead)] if i + ahead < n else [])]
    return order


def _timed(actions: list[list[Action]], count: int) -> list[list[Step]]:
    """Runs the ranks' lists against each other."""
    done: dict[Action, int] = {}
    steps: list[list[Step]] = [[] for _ in actions]
    left = [list(reversed(line)) for line in actions]
    while any(left):
        moved = False
        for rank, line in enumerate(left):
            while line and all(need in done for need in _needs(line[-1], count, done)):
                action = line.pop()
                start = max([steps[rank][-1].end if steps[rank] else 0, *(done[need] for need in _needs(action, count, done))])
                done[action] = start + _ticks(action)
                steps[rank].append(Step(action, start, done[action]))
                moved = True
        assert moved, f"the schedule waits for itself: {[line[-1] for line in left if line]}"
    return steps


def _needs(action: Action, count: int, done: dict[Action, int]) -> list[Action]:
    """What must be there before an action starts."""
    kind, stage, i = action
    if kind == "F":
        return [Action("F", stage - 1, i)] if stage else []
    if kind == "W":
        return [Action("I", stage, i)]
    if stage == count - 1:
        return [Action("F", stage, i)]
    above = Action("B", stage + 1, i)
    return [above if above in done else Action("I", stage + 1, i), Action("F", stage, i)]


def _ticks(action: Action) -> int:
    if action.stage == 0 and action.kind in "IW":
        return 0 if action.kind == "I" else TICKS["B"]
    return TICKS[action.kind]


def _label(drawing: Drawing, rank: int, step: Step) -> str:
    return f"{step.action.kind}{step.action.microbatch}" + "'" * drawing.stages_of[rank].index(step.action.stage)


def _name(drawing: Drawing, rank: int) -> str:
    return f"rank {rank} (stages {', '.join(map(str, drawing.stages_of[rank]))})"


def _title(drawing: Drawing) -> str:
    return f"{drawing.schedule}: {len(drawing.steps)} ranks, {drawing.num_microbatches} micro-batches, bubble {drawing.bubble:.1%}"
