"""The benchmark against other libraries compares equal work: its data, its counting, its clock and its verdict on the losses."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from torchft.batch import SampleId
from torchft.data.collate import collate
from torchft.data.packing import plan_window
from torchft.data.types import Encoded

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "debug" / "tiny-llama"
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "peers")]  # as the scripts themselves are run

import vs_peers  # noqa: E402
from peers import cases, measure, table, workload  # noqa: E402
from run_bare import batches  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Both kinds of data, for the tiny model."""
    folder = tmp_path_factory.mktemp("data")
    workload.write_full_rows(folder / "full", TINY, cases.SOURCE, 4)
    workload.write_chats(folder / "chats", TINY, cases.SOURCE, 30)
    return folder


def measured(peer: str = "ours", mode: str = "eager", **changes) -> measure.Measured:
    """Four steps of 2048 tokens: one of 9 s, then 2, 4 and 8 s."""
    one = measure.Measured(
        measure.Case(peer, mode, "fp32"),
        load=0.0,
        cold=True,
        first_step_s=9.0,
        seconds=[2.0, 4.0, 8.0],
        losses=[2.0, 1.5, 1.25, 1.0],
        tokens=[2048, 2048, 2048, 1024],
        trained=[1000, 1000, 1000, 500],
        peak_mib=1024,
        peak_all_mib=2048,
        versions={},
    )
    return replace(one, **changes)


def test_full_rows_have_one_length_and_train_replies_only(data):
    """Every row has exactly 512 tokens, a prompt without labels and labels equal to the ids elsewhere."""
    for row in workload.read_rows(data / "full"):
        ids, labels = row["input_ids"], row["labels"]
        assert len(ids) == len(labels) == workload.SEQ_LEN
        assert {label == token for token, label in zip(ids, labels) if label != -100} == {True}
        assert labels[:8] == [-100] * 8 and 0.5 < sum(label != -100 for label in labels) / len(labels) < 1


def test_chats_differ_in_length(data):
    """From one turn to a full row, so that padding and packing make a difference."""
    lengths = [len(row["input_ids"]) for row in workload.read_rows(data / "chats")]
    assert max(lengths) <= workload.SEQ_LEN and max(lengths) > 2 * min(lengths)


def test_counts_of_our_steps_are_the_loaders(data):
    """The trained tokens computed from the lengths are those of the batches that our loader makes of the same chats."""
    samples = workload.read_rows(data / "chats")
    encoded = [Encoded(np.array(s["input_ids"]), (np.array(s["labels"]) != -100).astype(np.float32)) for s in samples]
    packs = plan_window([len(e.ids) for e in encoded], workload.SEQ_LEN)
    counts = []
    for start in range(0, len(packs), cases.ROWS):
        now = packs[start : start + cases.ROWS]
        rows = [[encoded[i] for i in pack] for pack in now]
        batch = collate(rows, [[SampleId("", 0, i) for i in pack] for pack in now], t=workload.SEQ_LEN, pad_id=0)
        counts.append(batch.num_trained)
    assert cases.count_trained(data / "chats", packed=True) == counts
    assert sum(counts) == sum(cases.count_trained(data / "chats", packed=False))


@pytest.mark.parametrize("mode", ["eager", "chat"])
def test_bare_batches_hold_every_sample_once(data, mode, tmp_path):
    """Ids and labels of each sample stand whole in one row, its positions from 0; nothing else is trained or counted."""
    folder = data / ("chats" if mode == "chat" else "full")
    job = make_job(folder, mode, tmp_path)
    samples = {tuple(s["input_ids"]): s["labels"] for s in workload.read_rows(folder)}
    seen, total, trained = set(), 0, 0
    for ids, labels, positions, tokens in batches(job):
        total, trained = total + tokens, trained + int((labels != -100).sum())
        for row in range(len(ids)):
            places = positions[row] if positions is not None else np.arange(workload.SEQ_LEN)
            starts = [i for i in range(workload.SEQ_LEN) if places[i] == 0]
            for start, end in zip(starts, [*starts[1:], workload.SEQ_LEN]):
                piece = tuple(ids[row, start:end].tolist())
                if piece in samples:
                    seen.add(piece)
                    assert labels[row, start:end].tolist() == samples[piece]
    assert seen == set(samples)
    assert (total, trained) == (sum(map(len, samples)), sum(label != -100 for labels in samples.values() for label in labels))


def make_job(folder: Path, mode: str, out: Path):
    """A job of the tiny model."""
    from report import Job  # the drivers' own name of the module

    paths = {"model": str(TINY), "data": str(folder / "tokens.jsonl"), "out": str(out / "rows.jsonl"), "scratch": str(out)}
    return Job(**paths, mode=mode, dtype="fp32", rows=cases.ROWS, seq_len=workload.SEQ_LEN, lr=0.0, max_norm=1.0, adapter="")


def test_speed_leaves_warm_up_and_a_short_last_step_out():
    """Full rows: tokens of the median step. Chats: real tokens over time, without the last step."""
    assert table.tokens_per_s(measured(), warmup=1) == 2048 / 4
    assert table.tokens_per_s(measured(), warmup=2) == 1536 / 6
    assert table.tokens_per_s(measured(mode="chat"), warmup=1) == 4096 / 6


@pytest.mark.parametrize(
    "changes", [{"losses": [2.0, 1.5, 1.25, 1.01]}, {"trained": [999, 1000, 1000, 500]}, {"tokens": [2047, 2048, 2048, 1024]}]
)
def test_other_work_is_named(changes):
    """One step's loss, one trained token or one token more or less: the table says that the work is not the same."""
    same, other = measured("bare"), measured("bare", **changes)
    assert table.sections([measured(), same], 1).count("| yes |") == 2
    assert table.sections([measured(), other], 1).count("| NO |") == 1
    assert table.sections([same], 1).rstrip().endswith("| - | - |"), "nothing to compare with"


def test_chats_are_compared_by_their_mean_over_trained_tokens():
    """Other steps, the same epoch: what counts is the mean over all trained tokens, not over steps."""
    ours = measured(mode="chat")
    other = measured("trl", "chat", losses=[1.25, 2.0, 1.0, 1.5], trained=[1000, 1000, 500, 1000], tokens=[2048, 2048, 1024, 2048])
    assert table.loss_difference(other, ours) < 1e-12
    assert table.loss_difference(replace(other, trained=[1000, 1000, 1000, 500]), ours) > 1e-2


SCRIPT = """
import json, sys, time
rows = open(sys.argv[1], "w")
def row(**values):
    rows.write(json.dumps(values) + "\\n"); rows.flush()
row(begin=time.time(), versions={"torch": "0"})
big = b"x" * (200 << 20)
time.sleep(0.3)
row(time=time.time(), loss=1.0, tokens=4, trained=2)
del big
for step in range(3):
    time.sleep(0.6)
    small = b"x" * (50 << 20)
    row(time=time.time(), loss=1.0, tokens=4, trained=2)
print("the end"); sys.exit(int(sys.argv[2]))
"""


def start(tmp_path: Path, code: int) -> measure.Start:
    """A process that takes 200 MiB in its first step and 50 MiB later."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "rows.jsonl"), str(code)]
    return measure.Start(command, tmp_path / "rows.jsonl", 1, tmp_path / "compiled", [])


def test_a_run_is_timed_and_its_peak_taken_after_the_warm_up(tmp_path):
    """Step times are the differences of the clock; memory of the first step does not count; the second run is not cold."""
    one = measure.run_case(measure.Case("bare", "eager", "fp32"), start(tmp_path, 0), warmup=1)
    assert one.cold and 0.25 < one.first_step_s < 2 and len(one.seconds) == 3 and min(one.seconds) > 0.55
    assert one.peak_all_mib > 200 and 50 < one.peak_mib < 150
    assert measure.Measured.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert not measure.run_case(one.case, start(tmp_path, 0), warmup=1).cold


def test_a_run_that_fails_shows_its_end(tmp_path):
    """A process that ends badly is no measurement, and its last words are shown."""
    with pytest.raises(RuntimeError, match=r"bare eager fp32 ended with 3 after 5 rows:\nthe end"):
        measure.run_case(measure.Case("bare", "eager", "fp32"), start(tmp_path, 3), warmup=1)


def test_requirements_are_pinned():
    """Every line of every list is exact, and torch is the version that torchft is tested with."""
    tested = re.search(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group()
    lists = {peer.env for peer in cases.PEERS.values() if peer.env}
    assert {path.stem for path in cases.DRIVERS.glob("requirements/*.txt")} == lists
    for name in lists:
        lines = (cases.DRIVERS / "requirements" / f"{name}.txt").read_text().split()
        assert tested in lines and all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in lines)


@pytest.mark.parametrize("args", [["--only", "ours,nobody"], ["--modes", "fast"], ["--dtypes", "fp8"], ["--steps", "3", "--warmup", "2"]])
def test_wrong_words_are_refused(args, capsys):
    """Unknown names and a warm-up that leaves nothing to time end with exit code 2 and say what is expected."""
    with pytest.raises(SystemExit) as ended:
        vs_peers.parse(args)
    assert ended.value.code == 2 and "expected" in capsys.readouterr().err


def test_each_section_names_its_commits():
    """Sections that were measured at different times say so; runs of before the commit was kept are unknown."""
    text = table.sections([measured(commit="abc"), measured("bare", commit="def"), measured(mode="chat")], 1)
    assert "Commit abc, def; load" in text and "Commit unknown; load" in text


def test_what_was_written_stands_when_the_cache_is_gone(tmp_path, monkeypatch):
    """--add with an empty cache begins with the written runs, so that writing again loses no section."""
    monkeypatch.setattr(vs_peers, "RESULTS", tmp_path)
    monkeypatch.setattr(vs_peers, "prepare", lambda *_: None)
    (tmp_path / "vs_peers.json").write_text(json.dumps({"runs": [measured(mode="chat").to_json()]}))
    arguments = ["--model", str(TINY), "--cache", str(tmp_path), "--rounds", "0", "--warmup", "1", "--write"]
    assert vs_peers.main([*arguments, "--add"]) == 0
    assert json.loads((tmp_path / "vs_peers.json").read_text())["runs"] == [measured(mode="chat").to_json()]
    assert "Chats, prompts masked" in (tmp_path / "vs_peers.md").read_text()


def test_the_adapter_does_something_and_is_the_same_each_time(tmp_path):
    """All linear layers of the blocks, B not zero; a second call writes the same numbers."""
    tensors = []
    for name in ("one", "two"):
        workload.write_adapter(tmp_path / name, TINY, cases.LORA)
        tensors.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    first, second = tensors
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert all(value.any() for value in first.values())
    assert {key.split(".")[-3] for key in first} == {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")}
