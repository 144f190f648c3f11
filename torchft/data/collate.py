"""Rows of samples -> Batch. The only place where labels are shifted; a model never shifts and never sees a pad id as a mask.

    ids       A0 A1 A2 | B0 B1 | .  .        one row, t = 7; "." is padding
    labels    A1 A2 .  | B1 .  | .  .        the next token of the same document
    weights   w1 w2 0  | w1 0  | 0  0        the next token's weight; 0 at the last token of a document, not of a piece of one
    positions 0  1  2  | 0  1  | 2  3        padding continues the last document, so no row is without a key to attend
    documents 0  0  0  | 1  1  | 1  1

Padding is known by length, never by id: a pad id equal to EOS changes nothing.
"""

from collections.abc import Sequence

import numpy as np
import torch

from torchft.batch import Batch, SampleId
from torchft.data.types import Encoded


def collate(
    rows: Sequence[Sequence[Encoded]], ids: Sequence[Sequence[SampleId]], *, t: int, pad_id: int, epoch: int = 0, in_units: bool = False
) -> Batch:
    """One micro-batch of (len(rows), t); ids[i] names the samples of rows[i] and is flattened into Batch.ids.

    in_units: rows hold pairs, chosen before rejected, and Batch.sequences numbers the sequences through the batch.

    An empty row is a filler: pad_id everywhere, one document, all weights 0, id SampleId("", epoch, -1). It keeps the number of
    rows equal on all ranks where an epoch's last step has too few.
    """
    shape = (len(rows), t)
    tokens, labels = np.full(shape, pad_id, np.int64), np.full(shape, pad_id, np.int64)
    weights = np.zeros(shape, np.float32)
    positions, documents = np.empty(shape, np.int32), np.empty(shape, np.int32)
    sequences, num_sequences = np.full(shape, -1, np.int32), 0
    for i, row in enumerate(rows):
        starts = _starts(row, t)
        index = np.arange(t)
        documents[i] = np.searchsorted(starts, index, side="right") - 1
        positions[i] = index - starts[documents[i]]
        for start, sample in zip(starts, row, strict=False):  # a filler has a start and no sample
            end = start + len(sample.ids)
            tokens[i, start:end] = sample.ids
            labels[i, start : end - 1] = sample.ids[1:]
            weights[i, start : end - 1] = sample.weights[1:]
            sequences[i, start:end] = num_sequences
            num_sequences += 1
            if sample.follower is not None:
                labels[i, end - 1], weights[i, end - 1] = sample.follower
    return Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        weights=torch.from_numpy(weights),
        positions=torch.from_numpy(positions),
        documents=torch.from_numpy(documents),
        sequences=torch.from_numpy(sequences) if in_units else None,
        num_trained=int(np.count_nonzero(weights)),
        weight_sum=float(weights.sum(dtype=np.float64)),
        num_tokens=sum(len(sample.ids) for row in rows for sample in row),
        plain_causal=all(len(row) <= 1 for row in rows),
        ids=tuple(name for names in ids for name in (names or [SampleId("", epoch, -1)])),
        pieces=tuple(tuple((sample.start, len(sample.ids)) for sample in row) for row in rows),
    )


def _starts(row: Sequence[Encoded], t: int) -> np.ndarray:
    """Where each document of a row begins: (max(1, number of documents),)."""
    lengths = [len(sample.ids) for sample in row]
    assert sum(lengths) <= t and all(lengths), f"{lengths=} {t=}"
    return np.cumsum([0, *lengths[:-1]])
