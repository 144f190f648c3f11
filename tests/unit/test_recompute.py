"""Recomputation: gradients keep their bits, and what is run again is what the mode says."""

import sys
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch._higher_order_ops.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from tests.helpers.flex import flex_on_cpu
from tests.helpers.tiny import packed_batch, relative_error, tiny_llama
from torchft.losses.cross_entropy import CrossEntropy
from torchft.models.init import init_weights
from torchft.parallel.apply import parallelize
from torchft.parallel.compile import CompileConfig
from torchft.parallel.mesh import ParallelConfig, build_mesh, resolve_degrees
from torchft.parallel.pp import build_stages
from torchft.parallel.recompute import MemoryConfig, kept_ops


class Count(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func] += 1
        return func(*args, **(kwargs or {}))


def gradients(memory: MemoryConfig, compile: CompileConfig | None = None, core: str = "auto") -> tuple[dict[str, torch.Tensor], Counter]:
    spec, parallel = tiny_llama(), ParallelConfig()
    mesh = build_mesh(resolve_degrees(parallel, 1), torch.device("cpu"))
    parts = parallelize(build_stages(spec, mesh, torch.float32, core), mesh, parallel, memory=memory, compile=compile)
    init_weights(parts.named_parameters(), spec, 0)
    # torch.compile refuses to work under a mode, and FlexAttention under one it does not know
    with nullcontext(Count()) if compile or core == "flex" else Count() as count:
        parts.forward_backward([packed_batch(1)], CrossEntropy(), scale=1.0)
    return {name: p.grad for name, p in parts.named_parameters()}, count.seen


MODES = {
    "selective": (MemoryConfig("selective"), 4, 0),
    "full": (MemoryConfig("full"), 4, 4),
    "every second": (MemoryConfig("full", recompute_every=2), 2, 2),
    "selective every third": (MemoryConfig("selective", recompute_every=3), 2, 0),
}


@pytest.mark.parametrize("mode", MODES)
def test_bit_equal_and_runs_again_what_it_says(mode: str) -> None:
    """Of 4 blocks: how many run their activation a second time, and how many their matrix products and attention."""
    memory, again, matmuls = MODES[mode]
    expected, before = gradients(MemoryConfig())
    got, after = gradients(memory)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    aten = torch.ops.aten
    assert after[aten.silu.default] - before[aten.silu.default] == again
    assert (after[aten.mm.default] - before[aten.mm.default]) == matmuls * 6  # q, k, v, o, gate, up; down's output is not needed
    attend = torch.ops.torchft.attend_blocks.default
    assert before[attend] == 4 and after[attend] - before[attend] == matmuls


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_with_compile(mode: str) -> None:
    """Compiled blocks keep the same gradients."""
    got, _ = gradients(MemoryConfig(mode), CompileConfig(enabled=True, backend="aot_eager"))
    expected, _ = gradients(MemoryConfig())
    assert all(relative_error(got[name], expected[name]) <= 1e-5 for name in expected)


def test_flex_attention_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 blocks of FlexAttention: selective runs the attention once each, full twice; gradients keep their bits."""
    module, runs = sys.modules["torch._higher_order_ops.flex_attention"], []
    math_attention = module.math_attention
    monkeypatch.setattr(module, "math_attention", lambda *args: runs.append(1) or math_attention(*args))
    expected, counts = None, []
    for mode in ("none", "selective", "full"):
        before = len(runs)
        with flex_on_cpu():
            got, _ = gradients(MemoryConfig(mode), core="flex")
        counts.append(len(runs) - before)
        expected = expected or got
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert counts == [4, 4, 8]


def test_every_attention_is_kept() -> None:
    """FlexAttention's operator is on the list, and variable-length attention's from its import on."""
    from torch.nn.attention import varlen

    assert varlen and flex_attention in kept_ops() and torch.ops.torch_attn._varlen_attn.default in kept_ops()
    create_selective_checkpoint_contexts(kept_ops())  # refuses what it can't keep


def test_interval_is_checked() -> None:
    """0 blocks make no interval."""
    assert [p.key for p in MemoryConfig(recompute_every=0).check()] == ["memory.recompute_every"]
