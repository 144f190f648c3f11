"""A sample cut to data.seq_len, by a policy.

    error         a DataError that names the record
    drop          the sample is left out and counted
    left, right   that side is cut off
    proportional  each round of a prompt and the reply trained on it gets its share of what is left of seq_len, in their order:
                  the longer of the two is cut first, both in proportion where neither is under half (LLaMA-Factory's rule)

A sample of which nothing trained is left is dropped.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np

from torchft.data.types import Encoded
from torchft.errors import DataError

Truncation = Literal["error", "drop", "left", "right", "proportional"]


def truncate(encoded: Encoded, seq_len: int, policy: Truncation, where: str, *, keep_end: bool = False) -> Encoded | None:
    """The sample in at most seq_len ids, or None if it is dropped: too long (`drop`), or nothing left to train on.

    keep_end: of a prompt cut by `proportional` its end is kept, not its beginning: where one reply alone is trained, the prompt is the
    whole chat before it, and its question stands last. The first id has no weight: nothing predicts it. Raises DataError with policy
    `error`.
    """
    ids, weights = encoded.ids, encoded.weights
    if len(ids) > seq_len:
        if policy == "error":
            raise DataError(
                f"{where}: given {len(ids)} tokens, expected at most data.seq_len={seq_len}: raise data.seq_len, shorten this record, "
                "or set data.truncation to drop, left, right or proportional"
            )
        if policy == "drop":
            return None
        kept = _kept(weights, seq_len, policy, keep_end)
        ids, weights = ids[kept], weights[kept]
    if not (weights[1:] > 0).any():
        return None
    weights = weights.copy()
    weights[0] = 0
    return Encoded(ids, weights)


def share(prompt: int, reply: int, budget: int) -> tuple[int, int]:
    """How many tokens of a prompt and of its reply are kept within the budget."""
    if 2 * reply < budget:
        kept = reply
    elif 2 * prompt < budget:
        kept = min(reply, budget - prompt)
    else:
        kept = min(reply, budget * reply // (prompt + reply))
    return min(prompt, budget - kept), kept


def _kept(weights: np.ndarray, seq_len: int, policy: Truncation, keep_end: bool) -> np.ndarray:
    """The places (k,) that are kept, in order; k <= seq_len."""
    n = len(weights)
    if policy == "left":
        return np.arange(n - seq_len, n)
    if policy == "right":
        return np.arange(seq_len)
    pieces, budget = [np.arange(0)], seq_len
    for start, reply, end in _rounds(weights):
        if budget <= 0:
            break
        of_prompt, of_reply = share(reply - start, end - reply, budget)
        first = reply - of_prompt if keep_end else start
        pieces += [np.arange(first, first + of_prompt), np.arange(reply, reply + of_reply)]
        budget -= of_prompt + of_reply
    return np.concatenate(pieces)


def _rounds(weights: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(start, start of the trained part, end) of each round of tokens not trained and trained ones; the last may lack either."""
    trained = np.concatenate([[False], weights > 0, [False]])
    begins, ends = (np.flatnonzero(trained[1:] & ~trained[:-1]), np.flatnonzero(~trained[1:] & trained[:-1]))
    start = 0
    for reply, end in zip(begins.tolist(), ends.tolist()):
        yield start, reply, end
        start = end
    if start < len(weights):
        yield start, len(weights), len(weights)
