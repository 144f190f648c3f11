"""report.html: everything a run left is on it, escaped, with no request to elsewhere; a damaged checkpoint shows as one."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.helpers.recipe import CONFIG, ROOT, arguments, load_recipe
from torchft.checkpoint.listing import checkpoint_at
from torchft.cli.main import main
from torchft.config.changes import changed_from_defaults
from torchft.config.load import load_config
from torchft.dist import child_environment
from torchft.errors import CheckpointError, DataError
from torchft.metrics.rows import encode_row, train_row
from torchft.train.record import read_run
from torchft.train.report import report_html

EVIL = "<script src=//evil.example/x.js></script><img src=x onerror=alert(1)>\"'&"
TAGS = {"svg", "g", "rect", "line", "text", "polyline", "circle"}


class Strict(HTMLParser):
    """Collects tags and attributes, and checks that every tag that is opened is closed."""

    VOID = {"meta"}

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def parse(html: str) -> Strict:
    parser = Strict()
    parser.feed(html)
    assert parser.open == []
    return parser


@pytest.fixture
def evil(tmp_path) -> Path:
    """A run whose every text is hostile."""
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    (folder / "samples").mkdir()
    row = dict.fromkeys(("lr", "grad_norm", "tokens_per_s", "memory_gib", "data_wait_s"), 1.0) | {
        "tokens": 2,
        "tokens_total": 2,
        "mfu": None,
    }
    rows = [train_row(step=i, time=0.0, loss=float("nan") if i == 2 else 3.0 / i, **row) for i in (1, 2, 3)]
    rows.append({"step": 3, "time": 0.0, f"val/{EVIL}/loss": 1.0})
    (folder / "metrics.jsonl").write_text("".join(encode_row(r) + "\n" for r in rows))
    (folder / "events.jsonl").write_text(json.dumps({"time": 0, "step": 3, "event": EVIL, EVIL: EVIL}) + "\n")
    (folder / "config.yaml").write_text(json.dumps({"a": EVIL}))
    source = {"use": "train", "name": EVIL, "lengths": [1, 2, 3, 4], "total": 5, "kept": 4, "truncated": 0, "too_long": 1, "untrained": 0}
    facts = {
        "command": [EVIL],
        "changed": {EVIL: [EVIL, None]},
        "host": EVIL,
        "data": [source | {"tokens": 9, "trained": 5}],
        "num_steps": 3,
    }
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "logs/rank_0.log").write_text(f"2026-01-01 00:00:00,0 INFO fine\n2026-01-01 00:00:01,0 WARNING {EVIL}\nmore of it\n")
    (folder / "samples/step_3.jsonl").write_text(json.dumps({"prompt": EVIL}) + "\n")
    return folder


def test_hostile_texts_stay_texts(evil):
    """No tag or attribute but ours, all of them closed, nothing that could make a request; every text is there to read."""
    html = report_html(read_run(evil))
    parser = parse(html)
    ours = {"html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "section", "table", "tr", "th", "td"}
    ours |= {"dl", "div", "dt", "dd", "small", "details", "summary", "pre"} | TAGS
    assert parser.tags <= ours, parser.tags - ours
    assert not parser.attributes & {"src", "href", "onerror", "onload", "srcset", "data", "action"}
    assert "default-src 'none'" in html and not re.search(r"url\(|@import", html)
    assert parser.text.count(EVIL) > 8 and "more of it" in parser.text and "fine" not in parser.text
    assert "1 records were dropped" in parser.text and "failed, step 3 of 3" in parser.text


def test_a_run_writes_its_report(tmp_path, capsys):
    """A real run: its numbers, config changes, counts of data, checkpoints and state; a flipped byte shows after `torchft report`."""
    out = tmp_path / "run"
    overrides = [
        f"output_dir={out}",
        f"data.cache={tmp_path / 'cache'}",
        "train.steps=4",
        "checkpoint.every_steps=2",
        "validate.every_steps=2",
    ]
    assert load_recipe().main(["--config", str(CONFIG), *overrides]) == 0
    text = parse((out / "report.html").read_text()).text
    summary, facts = json.loads((out / "summary.json").read_text()), json.loads((out / "run.json").read_text())
    assert "finished, step 4 of 4" in text and f"{summary['loss_last']:.4f}" in text and "106,816 parameters" in text
    assert facts["changed"]["optim.lr"] == [3e-3, 1e-5] and "checkpoint.keep_last" not in facts["changed"]
    train, heldout = facts["data"]
    assert (train["use"], train["total"], train["kept"], heldout["name"], heldout["kept"]) == ("train", 304, 304, "heldout", 80)
    shortest, median, most, longest = train["lengths"]
    assert 0 < shortest <= median <= most <= longest <= 256 and train["tokens"] > train["trained"] > 0
    assert "INFO" in (out / "logs/rank_0.log").read_text() and "none in logs/" in text
    data = next((out / "checkpoints/step_00000002/model").iterdir())
    *rest, last = data.read_bytes()
    data.write_bytes(bytes([*rest, last ^ 1]))
    assert main(["report", str(out), "--out", str(tmp_path / "r.html"), "--quick"]) == 0
    assert "damaged" not in (tmp_path / "r.html").read_text()
    assert main(["report", str(out)]) == 0
    assert f"model/{data.name}: damaged, SHA-256" in (out / "report.html").read_text()
    assert [c.step for c in read_run(out).checkpoints() if c.state == "good" and "latest" in c.pointers] == [4]
    assert checkpoint_at(out, "2").name == "step_00000002" and checkpoint_at(out, "latest").name == "step_00000004"
    for which in ("best", "3", "x"):
        with pytest.raises(CheckpointError, match=r"expected: latest, best, or a step: 2, 4"):
            checkpoint_at(out, which)
    capsys.readouterr()


@pytest.mark.slow
def test_a_run_killed_midway_has_a_whole_report(tmp_path, capsys):
    """kill -9 in step 4, a line half written: every section is there, the numbers are those of step 3, nothing says None or nan."""
    out = tmp_path / "run"
    argv = arguments(
        out, tmp_path / "cache", "train.steps=6", "checkpoint.every_steps=2", "validate.every_steps=2", "metrics.every_steps=1"
    )
    command = [sys.executable, str(ROOT / "recipes/full_finetune.py"), *argv]
    env = child_environment(TORCHFT_FAULT="kill:step:step=4", PYTHONPATH=str(ROOT))
    assert subprocess.run(command, env=env, capture_output=True, timeout=200).returncode == -9
    assert (out / "lock").exists() and not (out / "summary.json").exists() and not (out / "report.html").exists()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 1.')
    assert main(["report", str(out)]) == 0
    html = (out / "report.html").read_text()
    text = parse(html).text
    for part in ("Curves", "Validation", "Config: what differs", "Data", "Model and environment", "Checkpoints", "Warnings", "Events"):
        assert part in text, part
    assert "killed, step 3 of 6" in text and "106,816 parameters" in text and "304" in text and "optim.lr" in text
    assert not re.search(r"\b(None|nan|null|NaN)\b", text.split("The whole config")[0])
    assert not re.search(r"""(src|href|url|@import)\s*[=(:]|https?://(?!www\.w3\.org/2000/svg)""", html.split("The whole config")[0])
    assert [(c.step, c.state) for c in read_run(out).checkpoints()] == [(2, "good")]
    assert main(["compare", str(out), str(out)]) == 0 and "killed, step 3 of 6" in capsys.readouterr().out


def test_a_folder_without_its_facts_still_has_a_report(evil):
    """run.json, events, logs and samples gone: what is left is shown."""
    for name in ("run.json", "events.jsonl", "logs/rank_0.log", "samples/step_3.jsonl"):
        (evil / name).unlink()
    text = parse(report_html(read_run(evil))).text
    assert "failed, step 3" in text and "None" not in text and "Curves" in text


def test_a_run_killed_before_its_first_step_has_a_report(evil):
    """No row yet: no curve and no loss, and nothing made up in their place."""
    (evil / "metrics.jsonl").unlink()
    (evil / "lock").write_text("elsewhere.example 1 x\n")
    os.utime(evil / "lock", (0, 0))
    run = read_run(evil)
    text = parse(report_html(run)).text
    assert run.state == "killed, step 0 of 3" and "None" not in text and "training loss" not in text and "Curves" not in text


def test_a_folder_that_is_no_run_is_named(tmp_path, capsys):
    """Exit 2 and the path; nothing is written."""
    assert main(["report", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err and not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="no run"):
        read_run(tmp_path / "absent")


def test_changes_of_a_config_are_those_that_were_given(tmp_path):
    """Each changed key with value and default, in a list's items too; a default given again is none; references stay as written."""
    cls = load_recipe().Config
    argv = [
        "output_dir=${oc.env:HOME}",
        "model.path=m",
        "data.train=[{path: a, max_samples: 3}]",
        "train.steps=2",
        "seed=0",
        "optim.betas=[0.9,0.9]",
    ]
    changed = changed_from_defaults(load_config(cls, argv, description=""))
    assert changed["output_dir"] == ["${oc.env:HOME}", "required"]
    assert changed["data.train.0.max_samples"] == [3, None] and changed["data.train.0.path"] == ["a", "required"]
    assert changed["optim.betas"][0] == [0.9, 0.9] and "seed" not in changed and "data.train.0.format" not in changed
