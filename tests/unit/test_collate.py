"""Rows become a Batch: labels shifted once, nothing crosses a document, padding is known by length."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.caches import make_encoded
from torchft.batch import SampleId
from torchft.data.collate import collate
from torchft.data.types import Encoded


def encoded(ids: list[int], weights: list[float]) -> Encoded:
    return Encoded(np.array(ids, np.int32), np.array(weights, np.float32))


def test_labels_by_hand():
    """Five tokens, two of them prompt: label i is token i + 1 with that token's weight; the last token predicts nothing."""
    batch = collate([[encoded([5, 6, 7, 8, 9], [0, 0, 1, 1, 0.5])]], [[SampleId("a", 2, 7)]], t=5, pad_id=0)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.labels[0, :4].tolist() == [6, 7, 8, 9]
    assert batch.weights.tolist() == [[0, 1, 1, 0.5, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4]] and batch.documents.tolist() == [[0] * 5]
    assert (batch.num_trained, batch.weight_sum, batch.num_tokens, batch.plain_causal) == (3, 2.5, 5, True)
    assert batch.ids == (SampleId("a", 2, 7),)


def test_packed_row_by_hand():
    """Two documents and padding: no label crosses, positions restart, padding goes on with the last document at weight 0."""
    row = [encoded([1, 2, 3], [1, 1, 1]), encoded([4, 5], [1, 1])]
    batch = collate([row], [[SampleId("a", 0, 0), SampleId("a", 0, 1)]], t=7, pad_id=9)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 9, 9]]
    assert batch.labels[0, [0, 1, 3]].tolist() == [2, 3, 5]
    assert batch.weights.tolist() == [[1, 1, 0, 1, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, 1, 1]]
    assert (batch.num_trained, batch.num_tokens, batch.plain_causal) == (3, 5, False)


def test_the_published_packs():
    """LLaMA-Factory's example of two packed rows, segments numbered from 1 and 0 for padding: the documents, their lengths and where
    they begin when the rows are laid end to end without padding."""
    published = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 2, 2, 3, 3, 3]])
    rows = [[make_encoded(n) for n in lengths] for lengths in ([2, 3], [1, 2, 3])]
    batch = collate(rows, [[SampleId("a", 0, i) for i, _ in enumerate(row)] for row in rows], t=6, pad_id=0)
    real = published > 0
    assert torch.equal(batch.documents[real] + 1, published[real].int()) and batch.num_tokens == int(real.sum())
    lengths = [length for row in batch.pieces for _, length in row]
    assert lengths == [2, 3, 1, 2, 3] and np.cumsum([0, *lengths]).tolist() == [0, 2, 5, 6, 8, 11]


def test_pad_equal_to_eos_trains_eos():
    """pad_id == EOS: the true EOS is trained all the same, the padding is not."""
    batch = collate([[encoded([5, 2, 6, 2], [0, 1, 1, 1])]], [[SampleId("a", 0, 0)]], t=6, pad_id=2)
    assert batch.labels[0, :3].tolist() == [2, 6, 2] and batch.weights.tolist() == [[1, 1, 1, 0, 0, 0]]
    assert batch.num_trained == 3 and batch.num_tokens == 4


def test_filler_row():
    """A row for a pack that does not exist: pad, weight 0, one document, id -1, and no tokens counted."""
    batch = collate([[make_encoded(4)], []], [[SampleId("a", 3, 0)], []], t=4, pad_id=7, epoch=3)
    assert batch.tokens[1].tolist() == [7] * 4 and not batch.weights[1].any()
    assert batch.documents[1].tolist() == [0] * 4 and batch.positions[1].tolist() == [0, 1, 2, 3]
    assert batch.ids == (SampleId("a", 3, 0), SampleId("", 3, -1)) and batch.num_tokens == 4


def test_types_are_the_contract():
    """The dtypes and shapes of batch.py."""
    batch = collate([[make_encoded(4)]], [[SampleId("a", 0, 0)]], t=6, pad_id=0)
    kinds = {"tokens": torch.int64, "labels": torch.int64, "weights": torch.float32, "positions": torch.int32, "documents": torch.int32}
    for name, dtype in kinds.items():
        assert getattr(batch, name).dtype == dtype and getattr(batch, name).shape == (1, 6)


def test_plain_causal_means_one_document_a_row():
    """True unless a row has a second document: padding and fillers belong to the row's only document."""
    one, two, half = [make_encoded(4)], [make_encoded(2), make_encoded(2)], [make_encoded(2)]
    for rows, plain in [([one, one], True), ([one, half], True), ([one, two], False), ([one, []], True)]:
        ids = [[SampleId("a", 0, 0)] * len(row) for row in rows]
        assert collate(rows, ids, t=4, pad_id=0).plain_causal is plain


@given(st.lists(st.lists(st.integers(2, 9), max_size=4), min_size=1, max_size=4))
def test_packed_equals_separate(lengths):
    """Cut at its documents, a packed row gives the very tokens, labels, weights and positions of each sample alone in its row; and
    the host's counts are those of the tensors."""
    rows = [[make_encoded(n, 100 * i + 10 * j) for j, n in enumerate(row)] for i, row in enumerate(lengths)]
    ids = [[SampleId("a", 0, 10 * i + j) for j in range(len(row))] for i, row in enumerate(rows)]
    packed = collate(rows, ids, t=40, pad_id=0)
    for i, row in enumerate(rows):
        start = 0
        for j, sample in enumerate(row):
            n = len(sample.ids)
            alone = collate([[sample]], [[ids[i][j]]], t=n, pad_id=0)
            part = slice(start, start + n)
            for name in ("tokens", "weights", "positions"):
                assert torch.equal(getattr(packed, name)[i, part], getattr(alone, name)[0]), name
            assert torch.equal(packed.labels[i, part][:-1], alone.labels[0, :-1])
            assert (packed.documents[i, part] == j).all()
            start += n
        assert not packed.weights[i, start:].any() and (packed.documents[i, start:] == max(0, len(row) - 1)).all()
    assert packed.num_trained == int((packed.weights > 0).sum())
    assert packed.weight_sum == packed.weights.double().sum().item()
    assert packed.num_tokens == sum(map(sum, lengths))


def test_pairs_are_numbered_through_the_batch():
    """Two rows with two pairs and one: sequences 0..5, 2i chosen and 2i + 1 rejected; -1 in padding. Without units: none."""
    pair = [make_encoded(2), make_encoded(3)]
    ids = [[SampleId("a", 0, 0), SampleId("a", 0, 1)], [SampleId("a", 0, 2)]]
    batch = collate([pair + pair, pair], ids, t=11, pad_id=0, in_units=True)
    assert batch.sequences.tolist() == [[0, 0, 1, 1, 1, 2, 2, 3, 3, 3, -1], [4, 4, 5, 5, 5] + [-1] * 6]
    assert batch.ids == tuple(SampleId("a", 0, i) for i in range(3)) and collate([pair], ids[:1], t=5, pad_id=0).sequences is None
