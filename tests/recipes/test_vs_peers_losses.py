"""The recipe, a plain loop and HF Trainer train the same thing: the benchmark's own drivers on the tiny model, with its verdict."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from torchft.checkpoint.assets import read_assets
from torchft.checkpoint.hf import save_hf
from torchft.models.build import read_config
from torchft.models.decoder import build_decoder
from torchft.models.init import init_weights

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "debug" / "tiny-llama"
sys.path[:0] = [str(ROOT / "benchmarks")]  # as the script itself is run

from peers import cases, measure, table, workload  # noqa: E402

pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> cases.Prepared:
    """A random tiny model and its data; the drivers run in this environment."""
    cache = tmp_path_factory.mktemp("vs_peers")
    spec = replace(read_config(TINY)[0], max_seq_len=workload.SEQ_LEN)
    model = build_decoder(spec, device="cpu")
    init_weights(model.named_parameters(), spec, seed=0)
    save_hf(cache / "model", spec, model.named_parameters(), read_assets(TINY))
    done = cases.Prepared(cache / "model", cache, {"hf": Path(sys.executable)})
    workload.write_full_rows(done.data("eager"), TINY, cases.SOURCE, 4 * cases.ROWS)
    workload.write_chats(done.data("chat"), TINY, cases.SOURCE, 40)
    workload.write_adapter(done.adapter, done.model, cases.LORA)
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("eager", marks=pytest.mark.full),
        pytest.param("chat", marks=pytest.mark.full),
        pytest.param("lora", marks=pytest.mark.full),
    ],
)
def test_ours_a_plain_loop_and_trainer_have_the_same_losses(prepared, mode, monkeypatch):
    """fp32: each step's loss on full rows; on chats the mean over all trained tokens, packed by two libraries and padded by the third; LoRA
    from the same first values, by the third with peft."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(cases, "LR", 1e-3)  # far enough for a wrong optimizer to show
    runs = {}
    for peer in ("ours", "bare", "trainer"):
        case = measure.Case(peer, mode, "fp32")
        runs[peer] = measure.run_case(case, cases.start_of(case, prepared, threads=1), warmup=1)
    for peer in ("bare", "trainer"):
        assert table.loss_difference(runs[peer], runs["ours"]) < table.TOLERANCE["fp32"], runs
    assert mode == "chat" or runs["ours"].losses[-1] < runs["ours"].losses[0]
