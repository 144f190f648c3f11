"""Work of rank 0 alone may last longer than a collective may."""

import time

import pytest
import torch.distributed as dist

from tests.helpers.dist import run_dist
from torchft.compat import set_timeout
from torchft.dist import wait_for_rank_0


def _work(fails: bool) -> tuple[float, str]:
    set_timeout(dist.group.WORLD, 1.0)
    began, said = time.monotonic(), ""

    def work() -> None:
        time.sleep(2.5)
        if fails:
            raise OSError("no room")

    try:
        wait_for_rank_0(work)
    except OSError as error:
        said = str(error)
    waited = time.monotonic() - began
    dist.barrier()
    return waited, said


@pytest.mark.parametrize("fails", [False, True])
def test_the_others_wait_beyond_the_time_limit(fails):
    """2.5 s of work with collectives limited to 1 s: both ranks go on together afterwards; an error is rank 0's alone."""
    (first, said), (second, other) = run_dist(_work, 2, fails)
    assert first >= 2.4 and second >= 2.4 and (said, other) == ("no room" if fails else "", "")


def _twice() -> list[float]:
    waited = []
    for seconds in (0.1, 2.5):
        began = time.monotonic()
        wait_for_rank_0(lambda seconds=seconds: time.sleep(seconds))
        waited.append(time.monotonic() - began)
    return waited


def test_every_call_waits():
    """A second call does not take the first one's end for its own."""
    for waited in run_dist(_twice, 2):
        assert waited[1] >= 2.0


def test_one_process_just_works():
    """Without a group the work is done, and its error comes through."""
    done = []
    wait_for_rank_0(lambda: done.append(1))
    assert done == [1]
    with pytest.raises(ZeroDivisionError):
        wait_for_rank_0(lambda: 1 / 0)
