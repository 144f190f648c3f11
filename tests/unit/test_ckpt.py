"""`torchft ckpt`: what it says of good, damaged and differing checkpoints, its JSON, and its exit codes."""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.toys import fill, toy, toy_optimizer, train
from torchft.checkpoint.folder import CheckpointFolder
from torchft.checkpoint.manifest import verify
from torchft.checkpoint.store import CheckpointConfig, Store
from torchft.cli.main import main


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with checkpoints of steps 1 to 4, the second the best."""
    run = tmp_path_factory.mktemp("runs") / "run"
    parts = toy("plain", 0)
    optimizer = toy_optimizer(parts)
    cfg = CheckpointConfig(every_steps=1, keep_last=0, best_by="val/x/loss")
    store = Store(run / "checkpoints", parts, optimizer, cfg, extra_state=lambda: {"tokens": 640, "loader": {"epoch": 0, "pack": 3}})
    for step, loss in enumerate([3.0, 1.0, 2.0, 1.5], start=1):
        train(optimizer, step, step)
        store.note_metric(step, {"val/x/loss": loss})
        store.save_if_due(step)
    return run


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


def ckpt(capsys: pytest.CaptureFixture, *words: object) -> tuple[int, str]:
    """Exit code and what is printed, to either stream."""
    capsys.readouterr()  # what saving said before
    code = main(["ckpt", *map(str, words)])
    out = capsys.readouterr()
    return code, out.out + out.err


def of_json(capsys: pytest.CaptureFixture, *words: object) -> tuple[int, dict]:
    code, text = ckpt(capsys, *words, "--json")
    return code, json.loads(text)


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step_{number:08d}"


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_ls(run: Path, capsys: pytest.CaptureFixture) -> None:
    """A row a checkpoint, oldest first, with tokens, pointers and state; what was set aside or left unfinished is named."""
    (step(run, 3) / "state.json").write_bytes(b"")
    step(run, 1).rename(run / "checkpoints" / "step_00000001.aside-1234")
    (run / "checkpoints" / "step_00000005.tmp-1234").mkdir()
    code, text = ckpt(capsys, "ls", run)
    rows = text.splitlines()
    assert code == 0 and [row.split()[0] for row in rows] == ["step", "2", "3", "4", "set", "unfinished:"]
    assert "640" in rows[1] and "best" in rows[1] and rows[1].endswith("good") and "state.json: damaged" in rows[2] and "latest" in rows[3]
    code, data = of_json(capsys, "ls", run / "checkpoints")
    assert code == 0 and [(c["step"], c["pointers"], len(c["problems"])) for c in data["checkpoints"]] == [
        (2, ["best"], 0),
        (3, [], 1),
        (4, ["latest"], 0),
    ]
    assert data["checkpoints"][0]["bytes"] == sum(path.stat().st_size for path in step(run, 2).rglob("*") if path.is_file())
    assert len(data["aside"]) == len(data["unfinished"]) == 1


def test_show(run: Path, capsys: pytest.CaptureFixture) -> None:
    """Counters, layout, optimizer, cursor; of a run the latest, best or a step; with --tensors every tensor."""
    code, text = ckpt(capsys, "show", run)
    assert code == 0 and all(
        part in text for part in ("step_00000004", "640", "AdamW", "weight_decay=0.1", "epoch=0, pack=3", "step_00000003")
    )
    assert "mid.weight" not in text and re.search(r"model/mid.weight +float32 \[9, 6\]", ckpt(capsys, "show", run, "--tensors")[1])
    for which, found in (("best", 2), ("1", 1), ("latest", 4)):
        assert of_json(capsys, "show", run, "--step", which)[1]["step"] == found
    code, text = ckpt(capsys, "show", run, "--step", "9")
    assert code == 2 and "given:    9" in text and "1, 2, 3, 4" in text
    (step(run, 4) / "manifest.json").unlink()
    code, text = ckpt(capsys, "show", step(run, 4))
    assert code == 2 and "manifest.json: No such file" in text


def test_verify_finds_any_flipped_bit_and_cut_byte(run: Path, capsys: pytest.CaptureFixture) -> None:
    """In every file below checkpoints/, the pointers too: exit 1, that file named and no other; cuts are found without --full as well."""
    assert ckpt(capsys, "verify", run, "--full") == (0, "4 of 4 checkpoints are good (every file hashed)\n")
    files = [path for path in (run / "checkpoints").rglob("*") if path.is_file() and "step_00000001" not in str(path)]
    assert {"latest", "best", ".metadata", "manifest.json", "state.json", "__0_0.distcp"} == {path.name for path in files}
    draw = random.Random(0)
    for path in files:
        content = path.read_bytes()
        for change in range(4):
            at = draw.randrange(len(content))
            flipped = content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
            path.write_bytes(content[:-1] if change == 0 else flipped)
            code, data = of_json(capsys, "verify", run, *(["--full"] if change else []))
            found = [line for lines in (*data["checkpoints"].values(), data["pointers"]) for line in lines]
            assert code == 1 and not data["good"] and len(found) == 1 and found[0].startswith(f"{path}: "), (path, change, found)
        path.write_bytes(content)
    assert ckpt(capsys, "verify", run, "--full")[0] == 0


def test_verify_one_checkpoint(run: Path, capsys: pytest.CaptureFixture) -> None:
    """Of a step's folder alone; without --full a bit in the tensors passes and the text says what was not looked at."""
    data = step(run, 3) / "model" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1] + b"\xff")
    assert ckpt(capsys, "verify", step(run, 2), "--full")[0] == 0
    code, text = ckpt(capsys, "verify", step(run, 3))
    assert code == 0 and "--full hashes every file" in text
    code, text = ckpt(capsys, "verify", step(run, 3), "--full")
    assert code == 1 and str(data) in text and "0 of 1" in text


def test_diff(run: Path, capsys: pytest.CaptureFixture) -> None:
    """Exit 0 of a checkpoint and its copy; else 1, with the keys, and with --values the tensors that moved."""
    copy = shutil.copytree(step(run, 4), run.parent / "other" / "step_00000004")
    code, text = ckpt(capsys, "diff", step(run, 4), copy)
    assert code == 0 and "no key differs" in text
    code, data = of_json(capsys, "diff", step(run, 3), run)
    assert code == 1 and data["differences"]["step"] == ["3", "4"] and data["differences"]["state.step"] == ["3", "4"]
    assert "files.model/__0_0.distcp" in data["differences"] and "tokens" not in data["differences"] and "values" not in data
    code, text = ckpt(capsys, "diff", step(run, 3), run, "--values")
    assert code == 1 and "7 tensors of the model differ" in text and "norm.weight" in text


def test_values_are_the_tensors(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One weight moved by 0.5: it alone is named, with that difference."""
    for name in ("a", "b"):
        parts = toy("plain", 0)
        fill(parts.named["mid.bias"], "ones")
        parts.named["mid.bias"].data.fill_(2.0)
        parts.named["mid.bias"].data[3] += 0.5 if name == "b" else 0
        Store(tmp_path / name, parts, toy_optimizer(parts), CheckpointConfig(), extra_state=dict).save(0, required=True)
    assert of_json(capsys, "diff", tmp_path / "a", tmp_path / "b", "--values")[1]["values"] == {"mid.bias": [0.5, 0.25]}


def test_keep_and_prune(run: Path, capsys: pytest.CaptureFixture) -> None:
    """prune names what it would delete and deletes it with --yes alone; kept, best, latest and two good ones stay; not of a live run."""
    assert ckpt(capsys, "keep", run, "--step", "1")[0] == 0 and "keep" in ckpt(capsys, "ls", run)[1]
    before = names(run)
    code, data = of_json(capsys, "prune", run, "--keep-last", "1")
    assert code == 0 and data == {"deleted": False, "paths": []} and names(run) == before
    ckpt(capsys, "keep", step(run, 1), "--undo")
    (run / "lock").write_text("elsewhere 1 x\n")
    code, text = ckpt(capsys, "prune", run, "--keep-last", "1", "--yes")
    assert code == 2 and "a run that is going" in text and step(run, 1).is_dir()
    (run / "lock").unlink()
    assert "1 would be deleted" in ckpt(capsys, "prune", run, "--keep-last", "1")[1]
    assert ckpt(capsys, "prune", run, "--keep-last", "1", "--yes")[0] == 0
    assert names(run) == ["best", "latest", "step_00000002", "step_00000003", "step_00000004"]
    step(run, 3).rename(run / "checkpoints" / "step_00000003.aside-1234")
    (run / "checkpoints" / "step_00000005.tmp-1234").mkdir()
    assert len(of_json(capsys, "prune", run, "--aside", "--yes")[1]["paths"]) == 2
    assert names(run) == ["best", "latest", "step_00000002", "step_00000004"]
    assert ckpt(capsys, "prune", run, "--keep-last", "0")[0] == 2


def test_kept_ones_survive_training(run: Path) -> None:
    """The store's own retention leaves a marked checkpoint alone; starting over deletes it and its mark."""
    CheckpointFolder(run / "checkpoints").keep(step(run, 1))
    for cfg in (CheckpointConfig(keep_last=1), CheckpointConfig(resume="none", overwrite=True)):
        parts = toy("plain", 0)
        optimizer = toy_optimizer(parts)
        store = Store(run / "checkpoints", parts, optimizer, cfg, extra_state=dict)
        state = store.resume()
        train(optimizer, 5, 5)
        store.save(5, required=True)
        kept = ["best", "latest", "step_00000001", "step_00000001.keep", "step_00000002", "step_00000004", "step_00000005"]
        assert names(run) == (kept if state else ["latest", "step_00000005"])


def test_a_damaged_best_is_not_believed(run: Path, capsys: pytest.CaptureFixture) -> None:
    """A changed value in `best` is found by its checksum; a file of two lines, as older versions wrote it, is read."""
    folder = CheckpointFolder(run / "checkpoints")
    lines = (folder.path / "best").read_text().splitlines()
    assert folder.read_best().value == 1.0
    (folder.path / "best").write_text("\n".join([lines[0], lines[1].replace("1.0", "0.0"), lines[2]]) + "\n")
    assert folder.read_best() is None and ckpt(capsys, "verify", run)[0] == 1
    (folder.path / "best").write_text("\n".join(lines[:2]) + "\n")
    assert folder.read_best().value == 1.0


def test_paths_that_hold_none(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Exit 2 with given, expected and fix, for every view."""
    for view in ("ls", "show", "verify", "prune", "keep"):
        code, text = ckpt(capsys, view, tmp_path)
        assert code == 2 and all(word in text for word in ("given:", "expected:", "fix:")), view
    assert main(["ckpt", "diff", str(tmp_path), str(tmp_path)]) == 2


def test_looking_needs_no_torch(run: Path) -> None:
    """ls, show, verify --full and each --help leave torch unimported."""
    code = f"""import sys
from torchft.cli.main import main
for words in (["ls", "RUN"], ["show", "RUN"], ["verify", "RUN", "--full"]):
    main(["ckpt", *[word.replace("RUN", {str(run)!r}) for word in words]])
print([name for name in ("torch", "numpy") if name in sys.modules])"""
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.endswith("[]\n")
    for view in ("ls", "show", "verify", "diff", "prune", "keep"):
        start = "import sys; from torchft.cli.main import main"
        code = f"{start}\ntry: main(['ckpt', {view!r}, '--help'])\nfinally: print('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("False\n")
    assert verify(step(run, 4)) == []
