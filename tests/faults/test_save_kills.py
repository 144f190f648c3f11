"""A save that is killed or runs out of room costs the steps since the last one, and nothing else."""

import os
import resource
from pathlib import Path

import pytest

from tests.helpers.dist import run_dist
from tests.helpers.toys import fingerprint, toy, toy_optimizer, train
from torchft.checkpoint.manifest import verify
from torchft.checkpoint.store import CheckpointConfig, Store
from torchft.faults import POINTS

SAVE_POINTS = [point for point in POINTS if point.startswith("save.")]


def make(layout: str, folder: Path, seed: int = 0) -> tuple:
    parts = toy(layout, seed)
    optimizer = toy_optimizer(parts)
    return parts, optimizer, Store(folder, parts, optimizer, CheckpointConfig(keep_last=1), extra_state=dict)


def run(folder: Path, last: int) -> list[dict[str, str]]:
    """Trains and saves steps 1..last; the state after each."""
    parts, optimizer, store = make("fsdp2", folder)
    states = []
    for step in range(1, last + 1):
        train(optimizer, step, step)
        states.append(fingerprint(parts, optimizer))
        store.save(step, required=True)
    return states


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """The states of a run that nobody kills."""
    return run_dist(run, 2, tmp_path_factory.mktemp("straight"), 3)[0]


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("point", SAVE_POINTS)
def test_kill_in_a_save(point: str, victim: int, straight: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 of either rank at any point of the third save: the peer fails at once; one `latest` names a good checkpoint; a run on one
    process resumes with exactly its state, removes what was left, and saves again."""
    monkeypatch.setenv("TORCHFT_FAULT", f"kill:{point}:rank={victim}:step=3")
    with pytest.raises(RuntimeError, match=f"rank {1 - victim}:"):
        run_dist(run, 2, tmp_path, 3, timeout=60)
    monkeypatch.delenv("TORCHFT_FAULT")
    published = point in ("save.after_rename", "save.in_retention")
    assert [path.name for path in tmp_path.glob("latest*") if ".tmp-" not in path.name] == ["latest"]
    latest = tmp_path / (tmp_path / "latest").read_text().strip()
    assert latest.name in ("step_00000002", "step_00000003" if published else "") and verify(latest) == []
    whole = sorted(path for path in tmp_path.glob("step_*") if ".tmp-" not in path.name)
    assert [verify(path) for path in whole] == [[]] * len(whole) and len(whole) >= 2

    parts, optimizer, store = make("plain", tmp_path, seed=7)
    step = store.resume()["step"]
    assert step == (3 if published else 2)
    assert fingerprint(parts, optimizer) == straight[step - 1]
    assert (tmp_path / "latest").read_text() == f"step_{step:08d}\n"
    assert not list(tmp_path.glob("*.tmp-*"))
    train(optimizer, step + 1, step + 1)
    assert store.save(step + 1) and verify(tmp_path / f"step_{step + 1:08d}") == []


def full_disk(folder: Path) -> list[Path | None]:
    _, optimizer, store = make("fsdp2", folder)
    saved = []
    for step, limit in ((1, resource.RLIM_INFINITY), (2, 3000), (3, resource.RLIM_INFINITY)):
        train(optimizer, step, step)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        saved.append(store.save(step))
    return saved


def test_full_disk(tmp_path: Path) -> None:
    """Writing fails half-way on both ranks: a warning, the old checkpoint stays, the next save works."""
    assert run_dist(full_disk, 2, tmp_path) == [[tmp_path / "step_00000001", None, tmp_path / "step_00000003"]] * 2
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000001", "step_00000003"]
    assert verify(tmp_path / "step_00000001") == verify(tmp_path / "step_00000003") == []
