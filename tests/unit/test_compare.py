"""`torchft compare`: one column a run, the keys that differ and no others, curves of every run; a run without rows does not stop it."""

import json
from pathlib import Path

import pytest

from tests.unit.test_report import EVIL, parse
from torchft.cli.main import main
from torchft.config.compare import differing_keys
from torchft.metrics.rows import encode_row, train_row
from torchft.train.compare import comparison_html, comparison_text, names
from torchft.train.record import read_run

REST = {"grad_norm": 1.0, "tokens": 8, "tokens_per_s": 10.0, "mfu": None, "memory_gib": 0.5, "data_wait_s": 0.0}


def make(folder: Path, losses: list[float], **config) -> Path:
    folder.mkdir(parents=True)
    rows = [train_row(step=i, time=i, loss=loss, lr=0.1, tokens_total=8 * i, **REST) for i, loss in enumerate(losses, start=1)]
    rows += [{"step": len(losses), "time": 9, "val/main/loss": losses[-1] + 0.5}] if losses else []
    (folder / "metrics.jsonl").write_text("".join(encode_row(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(json.dumps({"output_dir": str(folder), "seed": 1, **config}))
    (folder / "run.json").write_text(json.dumps({"outcome": "finished", "num_steps": len(losses)}))
    return folder


def test_numbers_and_differences(tmp_path, capsys):
    """Aligned columns with the runs' own last losses; output_dir and equal keys are left out; the page has both curves."""
    a = make(tmp_path / "a", [3.0, 2.0, 1.25], optim={"lr": 0.1, "betas": [0.9, 0.95]})
    b = make(tmp_path / "b", [3.0, 2.5], optim={"lr": 0.2, "betas": [0.9, 0.95]}, loss={"z": 0.1})
    assert main(["compare", str(a), str(b), "--html", str(tmp_path / "out.html")]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = {line.split("  ")[0]: line.split()[-2:] for line in lines if line and not line.startswith(" ")}
    assert table["loss_last"] == ["1.25", "2.5"] and table["tokens"] == ["24", "16"] and table["val/main/loss best"] == ["1.75", "3"]
    assert table["optim.lr"] == ["0.1", "0.2"] and table["loss.z"] == ["-", "0.1"]
    assert not {"seed", "output_dir", "optim.betas.0", "steps_skipped"} & set(table)
    html = (tmp_path / "out.html").read_text()
    text = parse(html).text
    assert "optim.lr" in text and "finished, step 3 of 3" in text and html.count("<polyline") == 6  # a point alone is drawn as a circle


def test_odd_runs(tmp_path):
    """Equal names get their parents'; a run without rows is a column of dashes; hostile names stay text."""
    runs = [
        read_run(make(tmp_path / path, losses)) for path, losses in (("x/run", [1.0]), ("y/run", []), ("z/" + EVIL.replace("/", ""), [2.0]))
    ]
    assert names(runs[:2]) == [str(tmp_path / "x/run"), str(tmp_path / "y/run")] and names(runs[1:])[0] == "run"
    line = next(line for line in comparison_text(runs).splitlines() if line.startswith("loss_last"))
    assert line.split() == ["loss_last", "1", "-", "2"]
    assert not {"script", "img"} & parse(comparison_html(runs)).tags


@pytest.mark.parametrize("count", [1, 2])
def test_wrong_use(tmp_path, capsys, count):
    """One run, or a folder that is none: exit 2 and a way out."""
    folders = [str(make(tmp_path / "a", [1.0])), str(tmp_path / "absent")][:count]
    assert main(["compare", *folders]) == 2
    captured = capsys.readouterr()
    assert "expected" in captured.out + captured.err


def test_differing_keys_of_several_configs():
    """By value, absent ones as -, lists of numbers whole, secrets redacted."""
    trees = [{"a": 1, "b": {"c": 1e-5}}, {"a": 1, "b": {"c": 2e-5}, "d": [4, 5]}, {"a": 1, "b": {"c": 1e-05}, "api_key": "x"}]
    assert differing_keys(trees) == {"b.c": ["1e-05", "2e-05", "1e-05"], "d": ["-", "[4, 5]", "-"], "api_key": ["-", "-", "<redacted>"]}
