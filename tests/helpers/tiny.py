"""Tiny models and hand-made batches for tests: ragged packed documents, accumulation, ranks without trained tokens."""

from dataclasses import replace

import torch

from torchft.batch import Across, Batch, SampleId
from torchft.losses.cross_entropy import CrossEntropy
from torchft.models.decoder import build_decoder
from torchft.models.init import init_weights
from torchft.models.spec import AttentionSpec, HeadSpec, LayerSpec, MlpSpec, ModelSpec, NormSpec, RopeSpec

VOCAB = 96


def tiny_llama(*, tied: bool = True, num_layers: int = 4, qkv_bias: bool = False) -> ModelSpec:
    """A llama of 4 heads, 2 kv heads, hidden 32."""
    return ModelSpec(
        family="llama",
        vocab_size=VOCAB,
        hidden_size=32,
        max_seq_len=128,
        tie_embeddings=tied,
        norm=NormSpec(eps=1e-5),
        attention=AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=qkv_bias),
        mlp=MlpSpec(intermediate_size=64),
        layers=(LayerSpec(),) * num_layers,
        rope={"default": RopeSpec(base=10000.0)},
        heads={"lm": HeadSpec(VOCAB)},
        init_std=0.1,
    )


def uneven(spec: ModelSpec) -> ModelSpec:
    """The model with one kv head (GPT-2: as it is) and 101 tokens, a prime: neither comes out even under tensor parallelism."""
    heads = {key: replace(head, size=101) for key, head in spec.heads.items()}
    kv = spec.attention.num_kv_heads if spec.family == "gpt2" else 1
    return replace(spec, vocab_size=101, heads=heads, attention=replace(spec.attention, num_kv_heads=kv))


def packed_batch(seed: int, *, b: int = 2, t: int = 32, trained: bool = True) -> Batch:
    """Rows of two to four documents of random lengths, the last one padded; about 40% of tokens trained, with uneven weights."""
    g = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(0, VOCAB, (b, t), generator=g), torch.zeros(b, t, dtype=torch.int64)
    weights, positions, documents = torch.zeros(b, t), torch.zeros(b, t, dtype=torch.int32), torch.zeros(b, t, dtype=torch.int32)
    num_tokens = 0
    for row in range(b):
        cuts = sorted(set(torch.randint(3, t - 3, (3,), generator=g).tolist()) | {0})
        real = t - int(torch.randint(0, 3, (1,), generator=g))  # what follows is padding of the last document
        num_tokens += real
        for index, (lo, hi) in enumerate(zip(cuts, [*cuts[1:], t], strict=True)):
            documents[row, lo:hi] = index
            positions[row, lo:hi] = torch.arange(hi - lo)
            end = min(hi, real)
            labels[row, lo : end - 1] = tokens[row, lo + 1 : end]
            chosen = (torch.rand(end - lo - 1, generator=g) < 0.4) * (0.5 + torch.rand(end - lo - 1, generator=g))
            weights[row, lo : end - 1] = chosen if trained else 0.0
    return Batch(
        tokens,
        labels,
        weights,
        positions,
        documents,
        num_trained=int((weights > 0).sum()),
        weight_sum=float(weights.double().sum()),
        num_tokens=num_tokens,
        plain_causal=False,
        ids=(SampleId("tiny", 0, seed),),
    )


def padded_batch(seed: int, *, b: int = 2, t: int = 24) -> Batch:
    """Rows of one document each, of random length, the rest padding: the second document of the row."""
    batch = packed_batch(seed, b=b, t=t)
    g = torch.Generator().manual_seed(seed)
    weights, documents, positions = torch.rand(b, t, generator=g), torch.ones(b, t, dtype=torch.int32), torch.zeros(b, t, dtype=torch.int32)
    for row, length in enumerate(torch.randint(5, t, (b,), generator=g).tolist()):
        documents[row, :length] = 0
        positions[row] = torch.cat([torch.arange(length), torch.arange(t - length)])
        weights[row, length - 1 :] = 0.0
    counts = {
        "num_trained": int((weights > 0).sum()),
        "weight_sum": float(weights.double().sum()),
        "num_tokens": int((documents == 0).sum()),
    }
    labels = batch.tokens.roll(-1, dims=1)
    return replace(batch, labels=labels, weights=weights, documents=documents, positions=positions, **counts)


def global_steps(num_steps: int = 3, num_batches: int = 4) -> list[list[Batch]]:
    """All micro-batches of each step; in step 1 the second half has no trained token, so a data rank of two has none; step 3 is padded
    rows of another length instead of packs."""
    return [
        [
            padded_batch(100 * step + i) if step == 3 else packed_batch(100 * step + i, trained=not (step == 1 and i >= num_batches // 2))
            for i in range(num_batches)
        ]
        for step in range(num_steps)
    ]


def of_rank(batches: list[Batch], dp_rank: int, dp_size: int) -> list[Batch]:
    """This data rank's share, in order."""
    share = len(batches) // dp_size
    return batches[dp_rank * share : (dp_rank + 1) * share]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """max|got - want| / max|want|; an all-zero reference must be met exactly."""
    error, size = (got.double() - want.double()).abs().max().item(), want.double().abs().max().item()
    return error / size if size else (0.0 if error == 0 else float("inf"))


def loss_and_gradients(batches: list[Batch]) -> tuple[float, list[torch.Tensor]]:
    """The summed cross-entropy of a small llama in fp64 over these batches, and its gradients."""
    model = build_decoder(tiny_llama(num_layers=2), device="cpu", dtype=torch.float64)
    init_weights(model.named_parameters(), model.spec, seed=0)
    loss, total = CrossEntropy(), 0.0
    for batch in batches:
        out = model(
            batch.tokens,
            layout=batch.layout(),
            positions=batch.positions,
            reduce=lambda hidden, heads, batch=batch: loss(hidden, heads, batch, Across()),
        )
        out.total.sum().backward()
        total += float(out.total.detach())
    return total, [p.grad for p in model.parameters()]
