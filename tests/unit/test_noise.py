"""NEFTune's noise: its bound, what it depends on, what gets none."""

import math
from dataclasses import replace

import torch

from tests.helpers.caches import make_encoded
from torchft.batch import Batch, NoiseKey, SampleId
from torchft.data.collate import collate
from torchft.data.types import Encoded
from torchft.parallel.noise import embedding_noise

D = 16


def batch(rows: list[list[int]], t: int = 12) -> Batch:
    """Rows of samples by index; sample i has i + 2 tokens."""
    samples = [[make_encoded(i + 2) for i in row] for row in rows]
    made = collate(samples, [[SampleId("s", 0, i) for i in row] for row in rows], t=t, pad_id=0)
    return replace(made, noise=NoiseKey(5.0, 7, 3))


def test_bound_and_padding() -> None:
    """A sample of n tokens has |noise| <= alpha / sqrt(n * d) and fills that range; padding and fillers have none."""
    noise = embedding_noise(batch([[4, 1], []]), D)
    assert noise.shape == (2, 12, D)
    for start, n in ((0, 6), (6, 3)):
        bound = 5.0 / math.sqrt(n * D)
        own = noise[0, start : start + n]
        assert 0.8 * bound < own.abs().max() <= bound and abs(own.mean()) < 0.2 * bound
    assert not noise[0, 9:].any() and not noise[1].any()


def test_depends_on_the_sample_alone() -> None:
    """A sample has the same noise in any pack, row, micro-batch and row length; another step, seed or sample has another."""
    together, alone = embedding_noise(batch([[4, 1], [2]]), D), embedding_noise(batch([[1]], t=5), D)
    assert torch.equal(together[0, 6:9], alone[0, :3])
    assert torch.equal(embedding_noise(batch([[2], [4, 1]]), D)[1], together[0])
    for key in (NoiseKey(5.0, 7, 4), NoiseKey(5.0, 8, 3)):
        assert not torch.equal(embedding_noise(replace(batch([[1]]), noise=key), D)[0, :3], alone[0, :3])
    assert not torch.equal(together[1, :3], alone[0, :3])


def test_pieces_of_a_document_are_samples_of_their_own() -> None:
    """Two pieces of one document in one step have different noise, each scaled by its own length; the same piece always the same."""
    whole = make_encoded(10)
    head, tail = (Encoded(whole.ids[a:b], whole.weights[a:b], start=a) for a, b in ((0, 5), (5, 10)))
    name = SampleId("book", 0, 3)
    made = replace(collate([[head], [tail]], [[name], [name]], t=5, pad_id=0), noise=NoiseKey(5.0, 7, 3))
    first, second = embedding_noise(made, D)
    assert not torch.equal(first, second) and second.abs().max() <= 5.0 / math.sqrt(5 * D)
    alone = replace(collate([[tail]], [[name]], t=8, pad_id=0), noise=NoiseKey(5.0, 7, 3))
    assert torch.equal(embedding_noise(alone, D)[0, :5], second)


def test_no_key_no_noise() -> None:
    """A batch without a key, as validation's are, has none."""
    assert embedding_noise(replace(batch([[1]]), noise=None), D) is None
