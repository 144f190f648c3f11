"""The embedding of tokens, with Gemma's factor on its output."""

import torch
from torch import Tensor, nn

from torchft.models.spec import ModelSpec


class Embedding(nn.Embedding):
    """tokens (b, t) -> weight[tokens], (b, t, d)."""

    def scaled(self, rows: Tensor) -> Tensor:
        """Rows as they go into the model."""
        return rows


class ScaledEmbedding(Embedding):
    """tokens (b, t) -> weight[tokens] * scale, (b, t, d). The factor is rounded to the weight's dtype first, as Gemma was trained."""

    def __init__(self, num_embeddings: int, embedding_dim: int, scale: float):
        super().__init__(num_embeddings, embedding_dim)
        self.scale = scale

    def forward(self, tokens: Tensor) -> Tensor:
        return self.scaled(super().forward(tokens))

    def scaled(self, rows: Tensor) -> Tensor:
        return rows * torch.tensor(self.scale, dtype=self.weight.dtype, device="cpu").item()


def build_embedding(spec: ModelSpec) -> Embedding:
    """The embedding of tokens that a spec describes."""
    if spec.embed_scale == 1.0:
        return Embedding(spec.vocab_size, spec.hidden_size)
    return ScaledEmbedding(spec.vocab_size, spec.hidden_size, spec.embed_scale)
