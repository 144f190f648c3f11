"""A resized vocabulary that no layout divides, padded: loaded, stepped and exported on every layout as on one process."""

import pytest
import torch

from tests.dist.test_families_dist import loss_and_gradients
from tests.helpers.dist import mesh_of, run_pooled
from tests.helpers.tiny import global_steps, tiny_llama
from torchft.checkpoint.assets import Assets
from torchft.checkpoint.hf import load_hf, save_hf
from torchft.checkpoint.new_rows import NewRows
from torchft.models.decoder import build_decoder
from torchft.models.init import init_weights
from torchft.models.vocabulary import VocabConfig, resize_spec
from torchft.parallel.apply import parallelize
from torchft.parallel.fsdp import PrecisionConfig
from torchft.parallel.mesh import ParallelConfig, check_degrees, resolve_degrees
from torchft.parallel.pp import build_stages

BASE_SIZE = tiny_llama().vocab_size
VOCAB = VocabConfig(size=BASE_SIZE + 3, multiple_of=8, noise=0.1)  # 3 new tokens, and padding that tp can cut in two
LAYOUTS = {"fsdp2": (2, {}), "tp2": (2, {"tp": 2}), "tp2 x fsdp2": (4, {"tp": 2}), "pp2": (2, {"pp": 2})}


def load_step_save(source, target, world: int, degrees: dict, tied: bool):
    base = tiny_llama(tied=tied)
    spec, cfg = resize_spec(base, VOCAB), ParallelConfig(**degrees)
    mesh = mesh_of(cfg, world)
    parts = parallelize(build_stages(spec, mesh, torch.float64), mesh, cfg, precision=PrecisionConfig(params="fp64"))
    load_hf(source, spec, parts.named_parameters(copies=True), new_rows=NewRows(base, 5, VOCAB.noise))
    save_hf(target, spec, parts.named_parameters(), Assets())
    return loss_and_gradients(parts, global_steps(1)[0], mesh)


def reference(source, tied: bool):
    """One process, without padding: whole logits, torch's cross-entropy."""
    base = tiny_llama(tied=tied)
    spec = resize_spec(base, VocabConfig(size=VOCAB.size))
    model = build_decoder(spec, device="cpu", dtype=torch.float64)
    load_hf(source, spec, model.named_parameters(), new_rows=NewRows(base, 5, VOCAB.noise))
    batches = global_steps(1)[0]
    total, count = 0.0, sum(b.weights.double().sum() for b in batches)
    for b in batches:
        logits = model(b.tokens, layout=b.layout(), positions=b.positions)
        ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), b.labels.flatten(), reduction="none")
        loss = (ce * b.weights.flatten()).sum() / count
        loss.backward()
        total += loss.item()
    return model, total, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(tmp_path, layout, tied):
    """Loss and gradients in fp64 to 1e-9; padding rows get none; the exported weights are the reference's, byte for byte."""
    world, degrees = LAYOUTS[layout]
    base = tiny_llama(tied=tied)
    first = build_decoder(base, device="cpu", dtype=torch.float64)
    init_weights(first.named_parameters(), base, 0)
    save_hf(tmp_path / "base", base, first.named_parameters(), Assets())
    model, total, want = reference(tmp_path / "base", tied)
    save_hf(tmp_path / "want", model.spec, model.named_parameters(), Assets())
    for loss, grads in run_pooled(load_step_save, world, tmp_path / "base", tmp_path / "got", world, degrees, tied):
        assert abs(loss - total) <= 1e-9 * abs(total)
        for name, grad in grads.items():
            rows = len(want[name])
            assert (grad[:rows] - want[name]).abs().max() <= 1e-9 * want[name].abs().max(), name
            assert not grad[rows:].any(), name
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("want", "got")]
    assert files[0] == files[1]


def test_a_size_that_does_not_divide_needs_no_padding():
    """Tensor parallelism cuts it unevenly (test_tp_uneven.py holds the numbers), so nothing is refused."""
    spec = resize_spec(tiny_llama(), VocabConfig(size=BASE_SIZE + 3))
    cfg = ParallelConfig(tp=2)
    assert spec.vocab_size % 2 and not list(check_degrees(resolve_degrees(cfg, 2), spec, cfg))
