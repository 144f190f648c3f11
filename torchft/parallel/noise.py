"""NEFTune (Jain et al. 2023): uniform noise on the embeddings of training samples.

    sample of n tokens --keyed by (seed, step, sample id)--> U(-1, 1) (n, d) * alpha / sqrt(n * d) --> its place in (b, t, d)

It is added to what the embedding of tokens puts out: after Gemma's factor, before learned positions, as transformers' hook does. What a
sample gets depends on its id alone: not on its pack, its row, the micro-batch, the ranks or the layout, which takes its slice; pieces
of a cut document are samples of their own. Numbers drawn on a CPU and on a GPU differ. Padding gets none, and neither does
validation, whose batches carry no key.
"""

import math

import torch
from torch import Tensor

from torchft.batch import Batch
from torchft.dist import keyed_generator


def embedding_noise(batch: Batch, hidden_size: int) -> Tensor | None:
    """(b, t, d) fp32 on the batch's device; None if the batch asks for no noise."""
    if batch.noise is None or not batch.noise.alpha:
        return None
    alpha, seed, step = batch.noise
    device = batch.tokens.device
    noise = torch.zeros(*batch.tokens.shape, hidden_size, device=device)
    ids = iter(batch.ids)
    assert len(batch.pieces) == len(batch.tokens), "noise needs the length of every sample: build the batch with data/collate.py"
    for row, pieces in zip(noise, batch.pieces, strict=True):
        place = 0
        for start, n in pieces or ((0, 0),):  # a filler has an id and no tokens
            generator = keyed_generator("embed", seed, step, *next(ids), start, device=device)
            bound = alpha / math.sqrt(max(1, n) * hidden_size)
            row[place : place + n].uniform_(-bound, bound, generator=generator)
            place += n
    return noise
