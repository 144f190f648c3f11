"""Doing something on all ranks so that all know how it went: no rank is left waiting in a collective for one that gave up.

Each function is collective: every rank calls it, at the same place. In one process they are plain calls.
"""

import hashlib
from collections.abc import Callable
from typing import TypeVar

from torchft.dist import agree, broadcast_object, gather_objects, rank, world_size
from torchft.errors import CheckpointError

T = TypeVar("T")


def agreed(action: Callable[[], T]) -> T:
    """This rank's result of an action; CheckpointError on every rank, with all reasons, if it failed on any."""
    problem, result = "", None
    try:
        result = action()
    except CheckpointError as error:
        problem = str(error)
    except Exception as error:  # whatever it is, the other ranks must hear of it; it is raised again below
        problem = f"rank {rank()}: {type(error).__name__}: {error}"
    if agree(bool(problem)):
        raise CheckpointError("; ".join(filter(None, over_ranks(problem))))
    return result  # type: ignore[return-value]


def on_rank_0(action: Callable[[], T]) -> T:
    """Rank 0's result of an action that only rank 0 runs, on every rank; CheckpointError on every rank if it failed."""
    return broadcast_object(agreed(lambda: action() if rank() == 0 else None))  # type: ignore[return-value]


def over_ranks(value: T) -> list[T]:
    """The distinct values of all ranks (told apart by their repr), those of lower ranks first; equal ones travel once."""
    if world_size() == 1:
        return [value]
    key = hashlib.sha256(repr(value).encode()).hexdigest()
    keys = gather_objects(key)
    values = gather_objects(value if keys.index(key) == rank() else None)
    return [values[i] for i, key in enumerate(keys) if keys.index(key) == i]
