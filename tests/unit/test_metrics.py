"""What a run reports: times and rates by an injected clock, FLOPs against torch's counter, rows that survive kills, sinks that may fail."""

import io
import json
import math
import mmap
import re
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.dist import run_dist
from tests.helpers.tiny import tiny_llama
from torchft import dist
from torchft.batch import Layout
from torchft.errors import DataError
from torchft.metrics.flops import attention_flops, flops_per_token, matmul_parameters, mfu, peak_of_name, peak_tflops
from torchft.metrics.memory import now_gib, peak_gib
from torchft.metrics.meters import StepMeter
from torchft.metrics.rows import TRAIN_KEYS, decode_row, encode_row, read_rows, rewind_rows, train_row, validation_row
from torchft.metrics.sinks import ConsoleSink, JsonlSink, MetricsConfig, Sinks, build_sinks
from torchft.metrics.summary import summarise, summary_text, write_summary
from torchft.models.decoder import build_decoder
from torchft.models.init import init_weights
from torchft.models.spec import LayerSpec

CPU = torch.device("cpu")


class Clock:
    """A clock that a test sets."""

    def __init__(self):
        self.at = 100.0

    def __call__(self) -> float:
        return self.at

    def wait(self, seconds: float) -> None:
        self.at += seconds


def row(step: int, **changes) -> dict:
    values = {"loss": 2.0 / step, "lr": 1e-5, "grad_norm": 0.83, "tokens": 50, "tokens_total": 50 * step, "tokens_per_s": 1234.4}
    values |= {"mfu": None, "memory_gib": 3.14, "data_wait_s": 0.012, "time": 1000.0 + step}
    return train_row(step=step, **(values | changes))


def test_meter_by_hand():
    """Rate, wait and totals are those of start..stop; time between steps is not counted; a resumed run goes on counting."""
    clock = Clock()
    meter = StepMeter(10, tokens_total=1000, clock=clock, now=lambda: 7.5)
    meter.start()
    with meter.waiting():
        clock.wait(0.5)
    clock.wait(1.0)
    with meter.waiting():
        clock.wait(0.5)
    timing = meter.stop(3, 80)
    assert (timing.time, timing.step_s, timing.data_wait_s, timing.tokens_per_s) == (7.5, 2.0, 1.0, 40.0)
    assert (timing.tokens, timing.tokens_total, timing.eta_s) == (80, 1080, 14.0)
    clock.wait(1000)  # a validation
    meter.start()
    clock.wait(2.0)
    timing = meter.stop(4, 20)
    assert (timing.step_s, timing.data_wait_s, timing.tokens_per_s, timing.tokens_total) == (2.0, 0.0, 10.0, 1100)


def test_eta_is_not_moved_by_one_slow_step():
    """The time left is the median step's, over the last 50; it is 0 at the last step."""
    clock, etas = Clock(), []
    meter = StepMeter(100, clock=clock)
    for step in range(1, 101):
        meter.start()
        clock.wait(60.0 if step == 1 else 1.0 if step <= 40 else 3.0)
        etas.append(meter.stop(step, 1).eta_s)
    assert etas[9] == 90.0 and etas[39] == 60.0
    assert etas[69] == 90.0 and etas[89] == 30.0 and etas[99] == 0.0


@pytest.mark.parametrize("tied", [True, False])
def test_flops_equal_torch_s_count(tied):
    """Forward and backward of a decoder cost what torch's counter says of its matmuls; attention there is the whole square, of
    which a causal token needs (t + 1) / 2 keys instead of t."""
    spec, t = tiny_llama(tied=tied, num_layers=3), 24
    model = build_decoder(spec, device="cpu")
    init_weights(model.named_parameters(), spec, seed=0)
    index = torch.arange(t, dtype=torch.int32)
    documents = torch.zeros(1, t, dtype=torch.int32)
    layout = Layout(documents, documents, index, index, plain_causal=True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, t, dtype=torch.int64), layout=layout, positions=index[None]).sum().backward()
    square = attention_flops(spec, t) * 2 * t / (t + 1)
    assert counter.get_total_flops() == pytest.approx(t * (6 * matmul_parameters(spec) + 3 * square), rel=1e-12)
    assert flops_per_token(spec, t) == pytest.approx(6 * matmul_parameters(spec) + 3 * attention_flops(spec, t))


def test_flops_by_hand():
    """A window bounds the keys; a frozen base needs no weight gradients; attention is 4 FLOPs a key, head and dimension."""
    spec = tiny_llama(num_layers=2)
    assert attention_flops(spec, 5) == 2 * 4 * 32 * (1 + 2 + 3 + 4 + 5) / 5
    windowed = replace(spec, layers=(LayerSpec(window=2), LayerSpec(window=9)))
    assert attention_flops(windowed, 5) == pytest.approx(4 * 32 * ((1 + 2 + 2 + 2 + 2) + (1 + 2 + 3 + 4 + 5)) / 5)
    n, attention = matmul_parameters(spec), 3 * attention_flops(spec, 5)
    assert n == 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64) + 32 * 96
    assert flops_per_token(spec, 5) - attention == 6 * n and flops_per_token(spec, 5, trained_share=0) - attention == 4 * n


def test_mfu_and_peaks():
    """MFU is the share of all devices' peaks; unknown, sliced and mobile devices have no peak and no MFU."""
    assert mfu(1e4, 1e10, 2, 100.0) == pytest.approx(0.5)
    assert mfu(1e4, 1e10, 2, None) is None and peak_tflops(CPU) is None
    names = {"NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA H100 80GB HBM3": 989.5, "NVIDIA H100 PCIe": 756.5, "NVIDIA H100 NVL": 835.5}
    names |= {"NVIDIA L4": 121.0, "NVIDIA L40": 181.0, "NVIDIA L40S": 362.0, "NVIDIA A10G": 70.0, "NVIDIA A10": 125.0}
    names |= {"NVIDIA GH200 480GB": 989.5, "NVIDIA GB200": 2500.0, "NVIDIA B200": 2250.0, "NVIDIA GeForce RTX 4090": 165.2}
    names |= {"NVIDIA RTX A1000": None, "Tesla V100-SXM2-16GB": None, "NVIDIA GeForce RTX 4090 Laptop GPU": None}
    names |= {"NVIDIA A100-SXM4-40GB MIG 1g.5gb": None, "AMD Instinct MI300X": 1307.4}
    assert {name: peak_of_name(name) for name in names} == names


def test_memory_counts_what_is_held():
    """64 MiB more held are 64 MiB more in use, and the peak is at least what is in use."""
    before = now_gib(CPU)
    held = mmap.mmap(-1, 64 << 20)  # fresh pages: an allocator may hand out memory that the process had already
    held.write(b"x" * (64 << 20))
    after = now_gib(CPU)
    assert 0.05 < after - before < 0.2
    assert after <= peak_gib(CPU) + 0.01 < 64


def test_row_has_the_fixed_keys():
    """A training row has exactly C10's keys, in their order, in memory and on disk; a missing one is our bug."""
    keys = ["step", "time", "loss", "lr", "grad_norm", "tokens", "tokens_total", "tokens_per_s", "mfu", "memory_gib", "data_wait_s"]
    assert list(row(3)) == list(TRAIN_KEYS) == list(json.loads(encode_row(row(3)))) == keys
    with pytest.raises(AssertionError, match="tokens_total"):
        train_row(**{key: 0 for key in keys if key != "tokens_total"})
    got = validation_row(7, 5.0, {"main": {"loss": 1.5}, "code": {"loss": 2.5}})
    assert got == {"step": 7, "time": 5.0, "val/main/loss": 1.5, "val/code/loss": 2.5}


def test_non_finite_numbers_are_strict_json():
    """NaN and infinities are null for a strict parser, named beside, and come back as numbers; other rows carry no flag."""

    def refuse(text: str):
        raise AssertionError(f"{text} is not JSON")

    text = encode_row(row(1, loss=float("nan"), grad_norm=float("inf"), lr=float("-inf")))
    strict = json.loads(text, parse_constant=refuse)
    assert strict["loss"] is None and strict["nonfinite"] == {"loss": "nan", "lr": "-inf", "grad_norm": "inf"}
    back = decode_row(text)
    assert list(back) == list(TRAIN_KEYS) and math.isnan(back["loss"]) and (back["grad_norm"], back["lr"]) == (math.inf, -math.inf)
    assert "nonfinite" not in encode_row(row(1)) and decode_row(encode_row(row(1))) == row(1)


def test_rows_survive_a_kill(tmp_path):
    """A last line cut off anywhere is left out; a broken line before others is an error with its number."""
    path = tmp_path / "metrics.jsonl"
    whole = "".join(encode_row(row(step)) + "\n" for step in (1, 2, 3))
    last = len(encode_row(row(3))) + 1
    for cut in range(2, last):
        path.write_text(whole[:-cut])
        assert [r["step"] for r in read_rows(path)] == [1, 2]
    path.write_text(whole.replace('"step": 2', '"step" 2'))
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        read_rows(path)
    assert read_rows(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("resumed, kept", [(0, []), (1, [0, 1]), (2, [0, 1, 2, 2]), (9, [0, 1, 2, 2, 3])])
def test_resume_drops_the_rows_it_will_write_again(tmp_path, resumed, kept):
    """Rows behind the resumed step go, its own validation and earlier ones stay byte for byte, a torn line goes; 0 starts anew."""
    path = tmp_path / "metrics.jsonl"
    rows = [validation_row(0, 1.0, {"m": {"loss": 3.0}}), row(1), row(2), validation_row(2, 1.0, {"m": {"loss": 2.0}}), row(3)]
    lines = [encode_row(r) + "\n" for r in rows]
    path.write_text("".join(lines) + '{"step": 4, "ti')
    assert rewind_rows(path, resumed) == len(rows) + 1 - len(kept)
    assert path.read_text() == "".join(lines[: len(kept)])
    assert [r["step"] for r in read_rows(path)] == kept
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_console_lines():
    """One line a step, with everything on it; an unknown MFU is "-"; validations, events with line breaks and NaN keep to one line."""
    out = io.StringIO()
    sink = ConsoleSink(100, out)
    sink.write(row(12, loss=1.23454, mfu=0.3123), 83.2)
    sink.write(row(5, loss=float("nan")), None)
    sink.write(validation_row(12, 0.0, {"main": {"loss": 1.5}, "code": {"loss": 2.0}}), None)
    sink.event({"time": 0.0, "step": 7, "event": "skipped", "reason": "two\nlines"})
    sink.event({"time": 0.0, "step": 8, "event": "skipped", "samples": list("abcdefghij")})
    assert out.getvalue().splitlines() == [
        "step  12/100  loss 1.2345  lr 1.0e-05  grad 0.83  1,234 tok/s  mfu 31.2%  mem 3.1 GiB  wait 0.01 s  eta 0:01:23",
        "step   5/100  loss nan  lr 1.0e-05  grad 0.83  1,234 tok/s  mfu -  mem 3.1 GiB  wait 0.01 s",
        "step  12/100  val/main/loss 1.5000  val/code/loss 2.0000",
        "step   7/100  skipped  reason=two lines",
        "step   8/100  skipped  samples=a, b, c, d, e, f, g, h and 2 more",
    ]


def test_jsonl_is_flushed_line_by_line(tmp_path):
    """Each row and event is in its file when the call returns; events of earlier attempts stay when rows are dropped."""
    sink = JsonlSink(tmp_path, 0)
    for step in (1, 2, 3):
        sink.write(row(step), None)
        assert read_rows(tmp_path / "metrics.jsonl")[-1] == row(step)
    sink.event({"time": 1.0, "step": 3, "event": "checkpoint"})
    again = JsonlSink(tmp_path, 2)
    again.write(row(3), None)
    again.event({"time": 2.0, "step": 3, "event": "resumed"})
    assert [r["step"] for r in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [r["event"] for r in read_rows(tmp_path / "events.jsonl")] == ["checkpoint", "resumed"]


class Failing:
    """A sink whose disk is full."""

    def __init__(self):
        self.calls = 0

    def write(self, row, eta_s):
        self.calls += 1
        raise OSError(28, "No space left on device")

    event = close = write


@pytest.mark.parametrize("call", ["write", "event"])
def test_a_failing_sink_is_named_once_and_switched_off(call, caplog):
    """The other sinks get every row, nothing is raised, and one warning says which sink failed and why."""
    out, bad = io.StringIO(), Failing()
    bad.event = lambda event: bad.write(event, None)
    sinks = Sinks({"bad": bad, "console": ConsoleSink(9, out)})
    for step in (1, 2, 3):
        sinks.write(row(step)) if call == "write" else sinks.event("checkpoint", step)
    sinks.close()
    assert len(out.getvalue().splitlines()) == 3 and bad.calls == 1
    assert len(caplog.records) == 1 and re.search("'bad'.*No space left", caplog.text)


def test_a_sink_that_can_not_open(tmp_path, caplog):
    """A folder that can't be written costs the jsonl sink, with a warning, not the run."""
    (tmp_path / "metrics.jsonl").mkdir()
    sinks = build_sinks(MetricsConfig(), tmp_path, num_steps=5)
    assert list(sinks.active) == ["console"] and "'jsonl'" in caplog.text
    sinks.write(row(1))


def _log_on_each_rank(folder):
    sinks = build_sinks(MetricsConfig(), folder, num_steps=2)
    sinks.write(row(1, loss=10.0 + dist.rank()))
    sinks.event("checkpoint", 1)
    sinks.close()
    return len(sinks.active)


def test_rank_0_alone_reports(tmp_path):
    """Of two ranks that log, one row and one event arrive, rank 0's."""
    run_dist(_log_on_each_rank, 2, tmp_path)
    assert [r["loss"] for r in read_rows(tmp_path / "metrics.jsonl")] == [10.0]
    assert len(read_rows(tmp_path / "events.jsonl")) == 1


def test_config_problems():
    """Each impossible setting is one problem under its key; the defaults are none."""
    assert not list(MetricsConfig().check())
    bad = MetricsConfig(every_steps=0, sinks=["console", "wandbb"], peak_tflops=0.0)
    assert [problem.key for problem in bad.check()] == ["metrics.every_steps", "metrics.sinks", "metrics.peak_tflops"]


def test_summary_by_hand(tmp_path):
    """Steps, tokens, median rate, losses and the best validation are those of the rows; NaN is counted and is no loss."""
    rows = [row(step, loss=loss, tokens_per_s=rate) for step, loss, rate in [(1, 3.0, 10), (2, 1.0, 30), (3, math.nan, 500), (4, 2.0, 20)]]
    rows += [validation_row(step, 0.0, {"main": {"loss": loss}}) for step, loss in [(0, 4.0), (2, 1.5), (4, 1.75)]]
    rows += [validation_row(4, 0.0, {"bad": {"loss": math.nan}})]
    summary = summarise(rows, run_dir=tmp_path, wall_s=65.4, skipped=1, checkpoints=["step_00000004"])
    assert (summary["steps"], summary["tokens"], summary["tokens_per_s_median"], summary["wall_s"]) == (4, 200, 25, 65.4)
    assert [summary[f"loss_{key}"] for key in ("first", "last", "lowest", "lowest_step")] == [3.0, 2.0, 1.0, 2]
    assert summary["validation"] == {"val/main/loss": {"first": 4.0, "last": 1.75, "best": 1.5, "best_step": 2}}
    assert (summary["rows_not_finite"], summary["steps_skipped"], summary["checkpoints"]) == (1, 1, ["step_00000004"])
    write_summary(tmp_path / "summary.json", summary)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    text = summary_text(summary)
    for part in ("1 of them skipped", "1 min 05 s", "3.0000 -> 2.0000", "best 1.5000 at step 2", "step_00000004", str(tmp_path)):
        assert part in text


def test_summary_of_nothing(tmp_path):
    """A run without a row, or with no finite loss, has a summary too."""
    for rows in ([], [row(1, loss=math.nan)]):
        summary = summarise(rows, run_dir=tmp_path, wall_s=0.0)
        write_summary(tmp_path / "summary.json", summary)
        assert summary["loss_last"] is None and str(tmp_path) in summary_text(summary)
