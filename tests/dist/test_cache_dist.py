"""The cache built by real processes: no collective is open while one rank works, and one rank's error is everyone's."""

import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from tests.helpers.caches import ListRecords, make_encoded, make_key
from tests.helpers.dist import run_dist
from torchft.data.cache_build import build_cache
from torchft.errors import DataError


def _build(folder: str, encode) -> object:
    return build_cache(
        folder,
        ListRecords([{"n": 5 + i % 3} for i in range(9)]),
        encode,
        make_key(),
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        report=lambda line: None,
    )


def _slow(folder: str) -> tuple[str, int]:
    dist.barrier()
    _set_pg_timeout(timedelta(seconds=1.5), dist.group.WORLD)

    def encode(record: dict, where: str):
        time.sleep(1 if dist.get_rank() == 1 else 0)
        return make_encoded(record["n"])

    cache = _build(folder, encode)
    dist.barrier()
    return cache.hash, len(cache)


def test_slow_rank_outlasts_the_collective_time_limit(tmp_path):
    """Rank 1 works twice as long as the process group's time limit: all get the same cache and go on to a collective."""
    results = run_dist(_slow, 3, str(tmp_path))
    assert len(set(results)) == 1 and results[0][1] == 9


def _bad(folder: str) -> tuple[str, float]:
    def encode(record: dict, where: str):
        if where.endswith(":5"):
            raise DataError(f"{where}:1: key 'messages' is missing")
        return make_encoded(record["n"])

    start = time.monotonic()
    try:
        _build(folder, encode)
    except DataError as error:
        return str(error), time.monotonic() - start
    return "no error", 0.0


def test_one_ranks_data_error_is_raised_on_all(tmp_path):
    """A bad record in rank 1's slice: every rank raises that very message within seconds."""
    results = run_dist(_bad, 3, str(tmp_path))
    assert {text for text, _ in results} == {"rows.jsonl:5:1: key 'messages' is missing"}
    assert max(seconds for _, seconds in results) < 5
