"""Attention cores against each other: one softmax under one Layout, whatever computes it."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from tests.helpers.flex import flex_on_cpu
from tests.helpers.tiny import packed_batch, relative_error, tiny_llama
from torchft.batch import Layout, _block_mask_maker
from torchft.errors import ConfigError
from torchft.generate.generate import generate
from torchft.generate.sampling import SamplingConfig
from torchft.models.decoder import build_decoder
from torchft.models.layers import attend_blocks
from torchft.models.layers.attend import CORES, VarlenCore, build_core, check_core, choose_core
from torchft.models.spec import AttentionSpec, LayerSpec

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.3)
WINDOWS = [None, 5, 2]


@pytest.fixture(autouse=True)
def trains_on_cpu():
    with flex_on_cpu():
        yield


def random_qkv(b: int, tq: int, tk: int, spec: AttentionSpec, dtype=torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(b, spec.num_heads, tq, spec.head_dim)] + [(b, spec.num_kv_heads, tk, spec.head_dim)] * 2
    return [torch.randn(shape, generator=g, dtype=dtype).requires_grad_() for shape in shapes]


def run(core, layout: Layout, window: int | None, qkv: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    y = core(*qkv, core.prepare(layout, window))
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), qkv)]


def reference(spec: AttentionSpec, layout: Layout, window: int | None, qkv: list[Tensor]) -> list[Tensor]:
    """Written out, pair by pair allowed as the Layout's description says."""
    q, k, v = qkv
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (spec.head_dim**-0.5 if spec.scale is None else spec.scale)
    if spec.softcap is not None:
        scores = spec.softcap * (scores / spec.softcap).tanh()
    hidden = torch.zeros(q.shape[0], 1, q.shape[2], k.shape[2], dtype=torch.bool)
    for b, i, j in itertools.product(range(q.shape[0]), range(q.shape[2]), range(k.shape[2])):
        ahead = int(layout.index_q[i]) - int(layout.index_kv[j])
        same = layout.doc_q[b, i] == layout.doc_kv[b, j]
        hidden[b, 0, i, j] = not (same and ahead >= 0 and (window is None or ahead < window))
    y = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), qkv)]


def varlen_on_cpu(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa) -> Tensor:
    """torch's varlen_attn by its documentation, one sequence after the other: q (tokens, heads, head_dim)."""
    assert torch.equal(cu_q, cu_k) and cu_q.dtype == torch.int32 and max_q == max_k == int(cu_q.diff().max())
    left, right = window_size
    assert right == 0 and enable_gqa == (q.shape[1] != k.shape[1])
    parts = []
    for lo, hi in itertools.pairwise(cu_q.tolist()):
        near = torch.arange(hi - lo)[:, None] - torch.arange(hi - lo)
        seen = (near >= 0) & ((near <= left) if left >= 0 else torch.tensor(True))
        part = (x[lo:hi].transpose(0, 1) for x in (q, k, v))
        y = torch.nn.functional.scaled_dot_product_attention(*part, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
        parts.append(y.transpose(0, 1))
    return torch.cat(parts)


def core_of(name: str, spec: AttentionSpec):
    core = build_core(name, spec)
    if name == "varlen":
        core.attend = varlen_on_cpu
    return core


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", CORES)
def test_packed_documents(name, window):
    """Ragged packed documents and padding, grouped heads, a scale of its own, windows: output and gradients are the definition's."""
    layout, qkv = packed_batch(3).layout(), random_qkv(2, 32, 32, SPEC)
    want, got = reference(SPEC, layout, window, qkv), run(core_of(name, SPEC), layout, window, qkv)
    assert max(map(relative_error, got, want)) < 1e-12


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", CORES)
def test_one_document_a_row(name, window):
    """The same for plain batches, as many key heads as heads and the default scale."""
    spec = AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=16)
    documents, index = torch.zeros(2, 19, dtype=torch.int32), torch.arange(19, dtype=torch.int32)
    layout, qkv = Layout(documents, documents, index, index, plain_causal=True), random_qkv(2, 19, 19, spec)
    want, got = reference(spec, layout, window, qkv), run(core_of(name, spec), layout, window, qkv)
    assert max(map(relative_error, got, want)) < 1e-12


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", ["eager", "flex"])
def test_soft_cap(name, window):
    """Scores are capped after the scale and before the mask."""
    spec = replace(SPEC, softcap=1.5)
    layout, qkv = packed_batch(3).layout(), random_qkv(2, 32, 32, spec)
    want, got = reference(spec, layout, window, qkv), run(core_of(name, spec), layout, window, qkv)
    assert max(map(relative_error, got, want)) < 1e-12


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("kind", ["packed", "plain", "cache"])
def test_eager_in_many_blocks(kind, window, softcap, monkeypatch):
    """Blocks of 16 queries, the last one shorter, read the keys that one of them sees, and no others."""
    monkeypatch.setitem(attend_blocks.QUERIES, "cpu", 16 if kind == "plain" and window is None else 8)
    spec, b, t = replace(SPEC, softcap=softcap), 2, 72
    documents, index = torch.zeros(b, t, dtype=torch.int32), torch.arange(t, dtype=torch.int32)
    layout = packed_batch(3, t=t).layout() if kind == "packed" else Layout(documents, documents, index, index, kind == "plain")
    if kind == "cache":
        layout = replace(layout, doc_q=documents[:, -40:], index_q=index[-40:])
    bounds = build_core("eager", spec).prepare(layout, window).bounds.tolist()
    rows = 2 if kind == "plain" and window is None else 1
    assert [hi - lo for *_, lo, hi, _, _ in bounds] == (b if rows == 1 else 1) * ([16, 16, 8] if kind == "cache" else [16, 16, 16, 16, 8])
    seen = layout.dense(window)
    for r0, r1, lo, hi, first, end in bounds:
        assert seen[r0:r1, 0, lo:hi].flatten(0, 1).any(0).nonzero().aminmax() == (first, end - 1) and r1 - r0 == rows
    qkv = random_qkv(b, layout.doc_q.shape[1], t, spec)
    want = reference(spec, layout, window, qkv)
    for skip in (True, False):
        core = build_core("eager", spec)
        core.prepare = partial(attend_blocks.blocks_of, num_heads=spec.num_heads, skip=skip)
        assert max(map(relative_error, run(core, layout, window, qkv), want)) < 1e-12


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_other_rows_do_not_change_a_bit(name, dtype, plain):
    """A row of packed documents, alone and among others: the bits of its output and gradients stay, so micro-batches of other rows (on
    another number of ranks) give the same numbers."""
    spec, t = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16), 600
    lengths = [[600], [130, 400, 70], [310, 290], [5, 90, 505]]
    documents = torch.stack([torch.repeat_interleave(torch.arange(len(n), dtype=torch.int32), torch.tensor(n)) for n in lengths])
    index, core = torch.arange(t, dtype=torch.int32), build_core(name, spec)
    documents = documents * (not plain)
    qkv = [x.detach().to(dtype) for x in random_qkv(4, t, t, spec, torch.float32)]
    weights = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def of(rows: list[int]) -> list[Tensor]:
        some = [x[rows].requires_grad_() for x in qkv]
        y = core(*some, core.prepare(Layout(documents[rows], documents[rows], index, index, plain), None))
        return [y, *torch.autograd.grad((y * weights[rows]).sum(), some)]

    whole = of([0, 1, 2, 3])
    for rows in ([1], [3], [2, 3]):
        assert all(torch.equal(got, want[rows]) for got, want in zip(of(rows), whole, strict=True))


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_narrow_numbers(name):
    """bf16: scores are not rounded to 8 bits before the softmax, which would triple the error at scores of this size."""
    layout = packed_batch(3).layout()
    wide = [(x.detach() * 4).bfloat16().double().requires_grad_() for x in random_qkv(2, 32, 32, SPEC)]
    core = build_core(name, SPEC)
    got, want = core(*(x.detach().bfloat16() for x in wide), core.prepare(layout, None)), reference(SPEC, layout, None, wide)[0]
    assert relative_error(got.double(), want) < 4e-3


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("name", ["sdpa", "eager", "flex"])
def test_cache_offsets(name, queries, window):
    """Queries behind keys of a cache, one and several, with padding inside the cache: the same pairs are seen."""
    held = torch.zeros(2, 14, dtype=torch.int32)
    held[1, 3:8] = 1
    index = torch.arange(14, dtype=torch.int32)
    layout = Layout(held[:, -queries:], held, index[-queries:], index, plain_causal=False)
    qkv = random_qkv(2, queries, 14, SPEC)
    want, got = reference(SPEC, layout, window, qkv), run(core_of(name, SPEC), layout, window, qkv)
    assert max(map(relative_error, got, want)) < 1e-12


@pytest.mark.parametrize("name", CORES)
def test_other_documents_do_not_change_a_bit(name):
    """Other queries, keys and values in each row's first document: the outputs of all other documents stay as they are, bit by bit."""
    batch, core = packed_batch(5), core_of(name, SPEC)
    prepared, first = core.prepare(batch.layout(), None), (batch.documents == 0)[:, None, :, None]
    before = [x.detach().float() for x in random_qkv(2, 32, 32, SPEC)]
    after = [torch.where(first, x + 1, x) for x in before]
    (b, a), others = (core(*x, prepared).transpose(1, 2) for x in (before, after)), batch.documents > 0
    assert torch.equal(b[others], a[others]) and not torch.equal(b[~others], a[~others])


def test_documents_laid_end_to_end():
    """cu_seqlens: a row's first token always begins a document, also where two rows' neighbours have one id; the last bound is the end."""
    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [2, 2, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1]], dtype=torch.int32)
    index = torch.arange(6, dtype=torch.int32)
    bounds, longest = Layout(documents, documents, index, index, plain_causal=False).cu_seqlens()
    assert bounds.tolist() == [0, 2, 5, 6, 12, 13, 18] and bounds.dtype == torch.int32 and longest == 6


def test_varlen_refuses_a_cache():
    """It has no notion of keys that came before: generation says so before it computes, and so does the layout."""
    model = build_decoder(tiny_llama(), core="varlen", device="cpu")
    with pytest.raises(ConfigError, match="KV cache"):
        generate(model, [[1, 2]], cfg=SamplingConfig())
    documents, index = torch.zeros(1, 4, dtype=torch.int32), torch.arange(4, dtype=torch.int32)
    layout = Layout(documents[:, -1:], documents, index[-1:], index, plain_causal=False)
    with pytest.raises(AssertionError, match="KV cache"):
        VarlenCore(SPEC).prepare(layout, None)


def test_varlen_compiles_for_all_packs_at_once():
    """Ten packs of other document counts and lengths through compiled blocks of two windows, traced with torch's own operator: a
    few graphs with free sizes, not one a pack. (The operator runs on CUDA alone: what is traced is not run.)"""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        outputs = [node.meta["val"] if hasattr(node, "meta") else node for node in graph.graph.output_node().args[0]]

        def zeros(*args):
            return [torch.zeros([int(n) for n in x.shape], dtype=x.dtype) if isinstance(x, Tensor) else x for x in outputs]

        return make_boxed_func(zeros)

    model = build_decoder(replace(tiny_llama(), layers=(LayerSpec(), LayerSpec(window=5))), core="varlen", device="cpu")
    for block in model.layers.values():
        block.compile(backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)
    for seed in range(10):
        batch = packed_batch(seed)
        model(batch.tokens, layout=batch.layout(), positions=batch.positions).sum().backward()
    assert len(graphs) <= 12
    assert all(any("varlen_attn" in str(node.target) for node in graph.graph.nodes) for graph in graphs)


def test_auto_is_the_fused_kernel_wherever_it_can_compute_the_model():
    """And eager for capped scores and to train on a CPU; a named core is that core, in every layer."""
    assert choose_core("auto", SPEC) == "sdpa" and choose_core("auto", replace(SPEC, softcap=2.0)) == "eager"
    assert choose_core("auto", SPEC, "cuda") == "sdpa" and choose_core("auto", SPEC, "cpu") == "eager"
    for name, kind in CORES.items():
        model = build_decoder(tiny_llama(), core=name)
        assert {type(block.self_attn.core) for block in model.layers.values()} == {kind}


CAPPED = replace(SPEC, softcap=2.0)


@pytest.mark.parametrize(
    "name, spec, device, dtype, words",
    [
        ("sdpa", CAPPED, "cpu", "float32", "caps its scores"),
        ("varlen", CAPPED, "cuda", "bfloat16", "caps its scores"),
        ("flex", SPEC, "cpu", "float32", "no backward on a CPU"),
        ("flex", SPEC, "cuda", "float64", "at most fp32"),
        ("flex", replace(SPEC, head_dim=8), "cuda", "float32", "heads of at least 16"),
        ("varlen", SPEC, "cpu", "bfloat16", "no CPU kernel"),
        ("varlen", SPEC, "cuda", "float32", "precision.compute=bf16"),
        ("varlen", replace(SPEC, head_dim=20), "cuda", "bfloat16", "a multiple of 8"),
    ],
)
def test_a_core_that_can_not_train_the_model_is_refused(name, spec, device, dtype, words):
    """Each for its one reason, with what to set instead."""
    (problem,) = check_core(name, spec, device, getattr(torch, dtype))
    assert words in str(problem) and problem.key == "model.attention" and "model.attention=auto" in problem.fix


def test_what_can_train_is_not_refused():
    """auto and eager anywhere, the others where they can."""
    for device, dtype in itertools.product(["cpu", "cuda"], [torch.float64, torch.float32, torch.bfloat16]):
        for spec, names in ((SPEC, ["auto", "eager", "sdpa"]), (CAPPED, ["auto", "eager"])):
            assert not [problem for name in names for problem in check_core(name, spec, device, dtype)]
    for spec in (SPEC, CAPPED):
        assert not list(check_core("flex", spec, "cuda", torch.bfloat16))
    assert not list(check_core("varlen", SPEC, "cuda", torch.bfloat16))


@pytest.mark.full
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_compiled_for_the_cpu(softcap):
    """What CUDA compiles, compiled for the CPU without gradients: block mask and attention, two packs of other lengths, a window, fp32."""
    spec = replace(SPEC, softcap=softcap)
    core, maker = torch.compile(core_of("flex", spec), dynamic=False), _block_mask_maker(compiled=True)
    for t in (40, 72):
        layout, qkv = packed_batch(3, t=t).layout(), random_qkv(2, t, t, spec, torch.float32)
        eager = layout.block_mask(7)
        mask = maker(eager.mask_mod, 2, None, t, t, device="cpu")
        assert torch.equal(mask.to_dense(), eager.to_dense())
        with torch.no_grad():
            got = core(*qkv, mask)
        assert relative_error(got, reference(spec, layout, 7, qkv)[0]) < 1e-6
