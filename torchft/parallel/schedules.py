"""Pipeline schedules by name: which stages a rank holds, and how many micro-batches a step may have.

    loop  rank r of p holds stages r, r + p, r + 2p, ..    v  rank r holds r and 2p - 1 - r: the first and the last stage meet on rank 0

Those that split the backward run the part for a stage's input first, since the stage before waits for it, and the part for its
weights where the rank would idle. What runs them is torch.distributed.pipelining; parallel/draw.py shows them.
"""

from dataclasses import dataclass
from typing import Literal

from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

ScheduleName = Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"]


@dataclass(frozen=True)
class Schedule:
    """What the rest of the code must know of a schedule."""

    cls: type
    shape: Literal["loop", "v"] = "loop"
    interleaved: bool = False  # several stages a rank, as many as parallel.pp_stages_per_rank says; a v has two
    splits_backward: bool = False

    def stages_per_rank(self, wanted: int) -> int:
        """wanted: parallel.pp_stages_per_rank."""
        return 2 if self.shape == "v" else wanted if self.interleaved else 1

    def stages_of(self, rank: int, pp: int, num_stages: int) -> list[int]:
        """The stages that a rank of the pipeline holds, ascending."""
        if self.shape == "v":
            return [rank, num_stages - 1 - rank]
        return list(range(rank, num_stages, pp))

    def rank_of(self, stage: int, pp: int, num_stages: int) -> int:
        """The rank that holds a stage."""
        return next(rank for rank in range(pp) if stage in self.stages_of(rank, pp, num_stages))


SCHEDULES: dict[str, Schedule] = {
    "gpipe": Schedule(ScheduleGPipe),  # all forwards, then all backwards (Huang et al. 2019)
    "1f1b": Schedule(Schedule1F1B),  # a backward as soon as it can: activations of pp micro-batches at most (Narayanan et al. 2019)
    "interleaved_1f1b": Schedule(ScheduleInterleaved1F1B, interleaved=True),  # several stages a rank (Narayanan et al. 2021)
    "interleaved_zero_bubble": Schedule(ScheduleInterleavedZeroBubble, interleaved=True, splits_backward=True),  # ZB1P (Qi et al. 2023)
    "zbv": Schedule(ScheduleZBVZeroBubble, "v", splits_backward=True),  # ZB-V (Qi et al. 2023)
    "dualpipev": Schedule(ScheduleDualPipeV, "v", splits_backward=True),  # DeepSeek's DualPipe, cut in half (2025)
}


def num_stages(schedule: str, pp: int, stages_per_rank: int) -> int:
    """Over all ranks; stages_per_rank: parallel.pp_stages_per_rank."""
    return pp * SCHEDULES[schedule].stages_per_rank(stages_per_rank)


def fits(schedule: str, pp: int, num_microbatches: int) -> bool:
    """Whether a training step may have so many micro-batches on each data rank."""
    if schedule == "1f1b":
        return num_microbatches >= pp
    if schedule == "dualpipev":
        return num_microbatches >= 2 * pp
    if SCHEDULES[schedule].interleaved:
        return num_microbatches % max(1, num_microbatches // pp) == 0
    return True


def legal_counts(schedule: str, pp: int, near: int) -> list[int]:
    """The largest legal number of micro-batches up to `near`, if there is one, and the next above it."""
    below = [n for n in range(1, near + 1) if fits(schedule, pp, n)]
    above = next(n for n in range(near + 1, near + 2 * pp + 2) if fits(schedule, pp, n))
    return [*below[-1:], above]
