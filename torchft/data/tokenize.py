"""Record -> Encoded, cut to length by a policy; and a sample for the eye, its trained tokens marked.

record --formats--> Sample --template--> Encoded --truncate--> Encoded of at most seq_len ids, or None
"""

from itertools import pairwise
from typing import Literal

import numpy as np

from torchft.data.formats import Format, sample_from_record
from torchft.data.templates import Template
from torchft.data.types import Encoded
from torchft.errors import DataError
from torchft.tokenizers.protocol import Tokenizer

Truncation = Literal["error", "drop", "left", "right"]
GREEN, PLAIN = "\033[32m", "\033[0m"


def encode_record(record: dict, where: str, *, format: Format, template: Template) -> Encoded:
    """A record's chat as tokens. Raises DataError naming `where`."""
    sample = sample_from_record(record, where, format)
    return template.encode(sample.messages, where=where, tools=sample.tools)


def truncate(encoded: Encoded, seq_len: int, policy: Truncation, where: str) -> Encoded | None:
    """The sample in at most seq_len ids, or None if it is dropped: too long (`drop`), or nothing left to train on.

    `left` and `right` cut that side off; `error` raises DataError. The first id has no weight: nothing predicts it.
    """
    ids, weights = encoded.ids, encoded.weights
    if len(ids) > seq_len:
        if policy == "error":
            raise DataError(
                f"{where}: given {len(ids)} tokens, expected at most data.seq_len={seq_len}: raise data.seq_len, shorten this record, "
                "or set data.truncation to drop, left or right"
            )
        if policy == "drop":
            return None
        kept = slice(len(ids) - seq_len, None) if policy == "left" else slice(seq_len)
        ids, weights = ids[kept], weights[kept]
    if not (weights[1:] > 0).any():
        return None
    weights = weights.copy()
    weights[0] = 0
    return Encoded(ids, weights)


def describe(encoded: Encoded, tokenizer: Tokenizer, *, color: bool = True) -> str:
    """A sample as text, «trained tokens» between marks and in green, special tokens written out."""
    trained = encoded.weights > 0
    edges = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), len(trained)]
    out, shown = "", ""
    for start, end in pairwise(edges):
        whole = tokenizer.decode(encoded.ids[:end].tolist(), skip_special=False)  # from the beginning: spaces depend on what is before
        text, shown = whole[len(shown) :], whole
        if start < end and trained[start]:
            text = f"{GREEN}«{text}»{PLAIN}" if color else f"«{text}»"
        out += text
    return out
