"""Checkpoints over several ranks: any layout loads what any other saved, and all ranks share one outcome."""

import filecmp
import logging
from pathlib import Path

import pytest

from tests.helpers.dist import run_dist, run_pooled
from tests.helpers.toys import LAYOUTS, fingerprint, toy, toy_optimizer, train
from torchft.checkpoint.load import load_weights_only
from torchft.checkpoint.manifest import verify
from torchft.checkpoint.reader import _read_metadata
from torchft.checkpoint.store import CheckpointConfig, Store
from torchft.errors import CheckpointError


def make(layout: str, folder: Path, seed: int = 0, **cfg: object) -> tuple:
    parts = toy(layout, seed)
    optimizer = toy_optimizer(parts, fused=True)
    store = Store(folder, parts, optimizer, CheckpointConfig(**cfg), extra_state=lambda: {"tokens": 7, "loader": {"pack": 3}})
    return parts, optimizer, store


def save(layout: str, folder: Path, steps: int = 3) -> dict[str, str]:
    parts, optimizer, store = make(layout, folder)
    train(optimizer, 1, steps)
    assert store.save(steps, required=True)
    return fingerprint(parts, optimizer)


def load(layout: str, folder: Path) -> dict[str, str]:
    parts, optimizer, store = make(layout, folder, seed=99)
    assert store.resume()["loader"] == {"pack": 3}
    return fingerprint(parts, optimizer)


def on(layout: str, fn: object, *args: object) -> list:
    return [fn(layout, *args)] if LAYOUTS[layout] == 1 else run_pooled(fn, LAYOUTS[layout], layout, *args)


@pytest.mark.parametrize("saved", LAYOUTS)
def test_every_layout_loads_what_another_saved_bit_for_bit(saved: str, tmp_path: Path) -> None:
    """Parameters and optimizer state after save -> load on 1, 2, 4 ranks, HSDP 2x2 and two pipeline stages have the same bits."""
    before = on(saved, save, tmp_path)[0]
    assert verify(tmp_path / "step_00000003", "full") == []
    assert "mid.weight.exp_avg_sq" in before and "mid.weight.step" in before
    for layout in LAYOUTS:
        for after in on(layout, load, tmp_path):
            assert after == before, (saved, layout)


def test_saving_is_deterministic(tmp_path: Path) -> None:
    """Two saves of one state on two ranks give the same bytes in every file."""
    for name in ("a", "b"):
        run_pooled(save, 2, "fsdp2", tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 9
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", files, shallow=False)[0] == files


def resumed(layout: str, folder: Path) -> dict[str, str]:
    parts, optimizer, store = make(layout, folder, seed=5)
    state = store.resume()
    train(optimizer, state["step"] + 1, 8)
    return fingerprint(parts, optimizer)


def straight(layout: str) -> dict[str, str]:
    parts = toy(layout, 0)
    optimizer = toy_optimizer(parts, fused=True)
    train(optimizer, 1, 8)
    return fingerprint(parts, optimizer)


def test_resume_is_exact(tmp_path: Path) -> None:
    """8 steps = 4 + resume + 4 on the same two ranks, to the bit."""
    run_pooled(save, 2, "fsdp2", tmp_path, 4)
    assert run_pooled(resumed, 2, "fsdp2", tmp_path) == run_pooled(straight, 2, "fsdp2")


def weights_only(layout: str, folder: Path) -> tuple[dict[str, str], int]:
    parts, optimizer, _ = make(layout, folder / "other", seed=1)
    load_weights_only(folder, parts)
    return fingerprint(parts, optimizer), len(optimizer.state)


def test_weights_only_reaches_every_holder(tmp_path: Path) -> None:
    """A start from weights fills all parameters, the tied copy on the last stage too, and leaves the optimizer empty."""
    before = run_pooled(save, 2, "fsdp2", tmp_path)[0]
    for after, num_states in run_pooled(weights_only, 2, "pp", tmp_path):
        assert after == {name: value for name, value in before.items() if name in after} and "embed.weight" in after
        assert num_states == 0


def failing(folder: Path) -> list[Path | None]:
    _, optimizer, store = make("fsdp2", folder)
    saved = []
    for step in range(1, 4):
        train(optimizer, step, step)
        saved.append(store.save(step))
    with pytest.raises(CheckpointError, match="InjectedFault"):
        store.save(4, required=True)
    return saved


@pytest.mark.parametrize("point", ["before_data", "mid_data", "before_manifest", "before_rename"])
def test_a_rank_that_fails_leaves_nobody_waiting(point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault on rank 1 alone fails the save on both, training goes on, the next save works; a required save raises on both."""
    monkeypatch.setenv("TORCHFT_FAULT", f"raise:save.{point}:rank=1:step=2,raise:save.{point}:rank=1:step=4")
    good = [tmp_path / "step_00000001", None, tmp_path / "step_00000003"]
    assert run_dist(failing, 2, tmp_path) == [good, good]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001", "step_00000003"]


def three_failures(folder: Path) -> str:
    _, optimizer, store = make("fsdp2", folder)
    train(optimizer, 1, 1)
    assert store.save(1) is None and store.save(2) is None
    with pytest.raises(CheckpointError, match="3 times in a row") as error:
        store.save(3)
    return str(error.value)


def test_the_third_failure_in_a_row_is_an_error_on_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two failed saves are warnings, the third raises the same message on every rank."""
    monkeypatch.setenv("TORCHFT_FAULT", "raise:save.mid_data:rank=0")
    first, second = run_dist(three_failures, 2, tmp_path)
    assert first == second and "rank 0" in first


def fall_back(folder: Path) -> tuple[int, list[str]]:
    _, _, store = make("fsdp2", folder, seed=2)
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("torchft").addHandler(handler)
    return store.resume()["step"], records


@pytest.mark.parametrize("victim", ["model/__1_0.distcp", "optimizer/__1_0.distcp", "state.json"])
def test_all_ranks_fall_back_together(victim: str, tmp_path: Path) -> None:
    """One flipped bit in a file of the newest checkpoint: both ranks resume from the one before, rank 0 names the file."""
    run_pooled(save, 2, "fsdp2", tmp_path, 1)
    run_pooled(save, 2, "fsdp2", tmp_path, 2)
    path = tmp_path / "step_00000002" / victim
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    (step, records), (other, _) = run_pooled(fall_back, 2, tmp_path)
    assert step == other == 1
    assert any("DAMAGED" in line and str(path) in line for line in records)
    assert (tmp_path / "latest").read_text() == "step_00000001\n"


def mismatch(folder: Path) -> tuple[str, bool]:
    parts, optimizer, _ = make("pp", folder, seed=3)
    name = next(iter(parts.named))
    parts.named[name + "_renamed"] = parts.named.pop(name)
    parts.trainable = parts.trainable - {"embed.weight", "norm.weight"} | {"embed.weight_renamed", "norm.weight_renamed"}
    store = Store(folder, parts, optimizer, CheckpointConfig(), extra_state=dict)
    before = fingerprint(parts, optimizer)
    with pytest.raises(CheckpointError) as error:
        store.resume()
    return str(error.value), before == fingerprint(parts, optimizer)


def test_keys_are_compared_over_all_stages(tmp_path: Path) -> None:
    """Names missing and extra on different pipeline stages are listed on every rank, and nothing was touched."""
    run_pooled(save, 2, "fsdp2", tmp_path)
    (first, clean), (second, also_clean) = run_pooled(mismatch, 2, tmp_path)
    assert first == second and clean and also_clean
    for key in ("embed.weight ", "embed.weight_renamed ", "norm.weight ", "norm.weight_renamed "):
        assert f"model {key}" in first


def test_one_file_a_rank_without_duplicates(tmp_path: Path) -> None:
    """HSDP writes each shard once: the files together are about the size of the tensors, not twice."""
    run_pooled(save, 4, "hsdp", tmp_path)
    save("plain", tmp_path / "plain")
    sizes = {}
    for folder, num_files in ((tmp_path / "step_00000003", 4), (tmp_path / "plain" / "step_00000003", 1)):
        assert sorted(path.name for path in (folder / "model").iterdir()) == [
            ".metadata",
            *(f"__{rank}_0.distcp" for rank in range(num_files)),
        ]
        index = _read_metadata(folder / "model")
        sizes[num_files] = sum(chunk.sizes.numel() for entry in index.state_dict_metadata.values() for chunk in entry.chunks)
    assert sizes[4] == sizes[1]
