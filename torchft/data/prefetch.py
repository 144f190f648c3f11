"""Work done ahead in threads, handed out in order: the number of threads and the lead change when a step is made, never which or how.

`map_ahead` is that for a row of items; `Prefetch` for steps that each begin where the last ended:

    one thread plans   (packs of step 1), (packs of step 2), ...      each from the cursor behind the last
    `workers` threads  packs -> batches                               several steps at once; results come out by step

An error is raised by the call that would have returned the step it belongs to.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Generic, TypeVar

Plan = TypeVar("Plan")
Result = TypeVar("Result")
Where = TypeVar("Where")


def map_ahead(make: Callable[[Plan], Result], items: Iterable[Plan], *, workers: int, together: int = 16) -> Iterator[Result]:
    """make(item) for each item in order, by so many threads, `together` items at a time; 0 or 1: without threads. Items are taken from
    `items` a little ahead, so memory is bounded."""
    if workers <= 1:
        yield from map(make, items)
        return
    groups = _groups(items, together)
    with ThreadPoolExecutor(workers, thread_name_prefix="map") as pool:

        def start() -> Iterator[Future[list[Result]]]:
            for group in groups:
                yield pool.submit(lambda group=group: [make(item) for item in group])

        started = start()
        ahead = deque(islice(started, 2 * workers))
        try:
            while ahead:
                done = ahead.popleft().result()
                ahead.extend(islice(started, 1))
                yield from done
        finally:
            pool.shutdown(cancel_futures=True)


def _groups(items: Iterable[Plan], size: int) -> Iterator[list[Plan]]:
    """The items, `size` at a time."""
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group


class Prefetch(Generic[Where, Plan, Result]):
    """plan(where) -> (what, where the next begins), called in order by one thread; make(what) -> result, by any of `workers`."""

    def __init__(
        self,
        plan: Callable[[Where], tuple[Plan, Where]],
        make: Callable[[Plan], Result],
        start: Where,
        *,
        workers: int,
        depth: int,
    ):
        self._plan, self._make, self._where = plan, make, start
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="loader-plan")
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="loader")
        self._depth = depth
        self._ahead: deque[Future[tuple[Future[Result], Where]]] = deque()

    def next(self) -> tuple[Result, Where]:
        """The next result and the place behind it. `depth` further ones are under way when it returns."""
        while len(self._ahead) <= self._depth:
            self._ahead.append(self._planner.submit(self._start_next))
        making, after = self._ahead.popleft().result()
        return making.result(), after

    def close(self) -> None:
        """Ends the threads; what is under way is finished first."""
        self._planner.shutdown(cancel_futures=True)
        self._workers.shutdown(cancel_futures=True)

    def _start_next(self) -> tuple[Future[Result], Where]:
        planned, self._where = self._plan(self._where)
        return self._workers.submit(self._make, planned), self._where
