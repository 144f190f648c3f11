"""How the ranks of an attempt find each other at a store that outlives it: never the ones of an attempt before."""

import threading
from collections.abc import Sequence
from datetime import timedelta

import pytest
import torch.distributed as dist

from torchft.dist import _meet
from torchft.train.lock import launcher


def meet(store: dist.Store, ranks: Sequence[int], size: int) -> list[str]:
    """What each of these ranks takes for the attempt's number."""
    found = {}
    threads = [threading.Thread(target=lambda rank=rank: found.update({rank: _meet(store, rank, size, 10.0)})) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return [found[rank] for rank in ranks]


def test_attempts_never_mix():
    """Three attempts at one store, of 3, 2 and 4 ranks, two ranks of the second dead before they heard of its number: within an attempt
    one number, another one each time, though no launcher counts."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=10))
    first = meet(store, [2, 1, 0], 3)
    for _ in range(2):
        store.add("torchft/calls", 1)  # called, and was killed
    second, third = meet(store, [0, 1], 2), meet(store, [3, 0, 2, 1], 4)
    assert [len(set(numbers)) for numbers in (first, second, third)] == [1, 1, 1]
    assert len({first[0], second[0], third[0]}) == 3


def test_a_rank_that_never_comes():
    """Rank 0 gives up within its limit."""
    with pytest.raises(dist.DistStoreError, match="some did not come within 0.1 s"):
        _meet(dist.HashStore(), 0, 2, 0.1)


def test_the_launcher_is_known_by_its_process(monkeypatch):
    """The same for two processes of one launcher, and for the same process twice; nothing without torchrun."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launcher() == ""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert launcher() == launcher() and len(launcher().split()) == 3
