"""Saving and resuming in one process: modes, retention, best, and every way a checkpoint can be of another model."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.toys import ToyParts, fill, fingerprint, toy, toy_optimizer, train
from torchft.checkpoint.load import load_weights_only
from torchft.checkpoint.manifest import read_manifest, verify
from torchft.checkpoint.reader import read_index
from torchft.checkpoint.state import materialise
from torchft.checkpoint.store import CheckpointConfig, Store
from torchft.errors import CheckpointError, ConfigError


def make(folder: Path, seed: int = 0, parts: ToyParts | None = None, kind: type = torch.optim.AdamW, options: dict | None = None, **cfg):
    parts = parts or toy("plain", seed)
    optimizer = toy_optimizer(parts, kind, **(options or {}))
    base = cfg.pop("base", None)
    config = CheckpointConfig(**({"every_steps": 1} | cfg))
    assert not list(config.check())
    return parts, optimizer, Store(folder, parts, optimizer, config, extra_state=lambda: {"tokens": 5, "counters": {"z": 0.1}}, base=base)


def save_steps(folder: Path, last: int, **cfg):
    parts, optimizer, store = make(folder, **cfg)
    for step in range(1, last + 1):
        train(optimizer, step, step)
        assert store.save_if_due(step)
    return parts, optimizer, store


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Counting(torch.optim.SGD):
    """Keeps a counter and a running value in its group, and a plain number beside its tensors, as schedule-free and Prodigy do."""

    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            group["lr"] = group["lr"] / (1 + group["k"])
        super().step()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.state[param]["calls"] = self.state[param].get("calls", 0) + 1
                    self.state[param]["sum"] = self.state[param].get("sum", 0) + group["k"] * param.grad
                    param.data.add_(self.state[param]["sum"], alpha=-0.01 * self.state[param]["calls"])


OPTIMIZERS = {
    "group and plain state": (Counting, {"momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {}),
    "adamw fused": (torch.optim.AdamW, {"fused": True}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "tensor lr": (torch.optim.AdamW, {"lr": torch.tensor(0.01), "foreach": False}),
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "adafactor": (torch.optim.Adafactor, {}),
    "rmsprop": (torch.optim.RMSprop, {"centered": True}),
    "adagrad": (torch.optim.Adagrad, {}),
    "nadam": (torch.optim.NAdam, {}),
    "asgd": (torch.optim.ASGD, {}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_is_exact_for_any_optimizer(tmp_path: Path, name: str) -> None:
    """6 steps = 3 + resume + 3, to the bit, whatever the optimizer keeps."""
    kind, options = OPTIMIZERS[name]
    parts, optimizer, store = make(tmp_path, kind=kind, options=options)
    train(optimizer, 1, 3)
    store.save(3, required=True)
    train(optimizer, 4, 6)
    again, other, resumed = make(tmp_path, seed=9, kind=kind, options=options)
    state = resumed.resume()
    assert (state["step"], state["tokens"], state["counters"]) == (3, 5, {"z": 0.1})
    train(other, 4, 6)
    assert fingerprint(again, other) == fingerprint(parts, optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_materialise_changes_nothing_but_state(name: str) -> None:
    """Parameters, gradients and options are the same bits after the optimizer allocated its state."""
    kind, options = OPTIMIZERS[name]
    parts = toy("plain", 0)
    optimizer = toy_optimizer(parts, kind, **options)
    parts.named["mid.bias"].grad = torch.ones(9)
    before = {name: param.detach().clone() for name, param in parts.named.items()}, repr(optimizer)
    materialise(optimizer)
    assert all(param.equal(before[0][name]) for name, param in parts.named.items()) and repr(optimizer) == before[1]
    assert {name for name, param in parts.named.items() if param.grad is not None} == {"mid.bias"}
    assert parts.named["mid.bias"].grad.equal(torch.ones(9))


def test_parameters_without_state_stay_without(tmp_path: Path) -> None:
    """A parameter that never had a gradient has no state after a resume either: its first step is a first step."""
    parts, optimizer, store = make(tmp_path)
    train(optimizer, 1, 1)
    optimizer.state.pop(parts.named["last.bias"])
    store.save(1, required=True)
    train(optimizer, 2, 3)
    again, other, resumed = make(tmp_path, seed=9)
    resumed.resume()
    assert again.named["last.bias"] not in other.state
    train(other, 2, 3)
    assert fingerprint(again, other) == fingerprint(parts, optimizer)


def test_before_the_first_step(tmp_path: Path) -> None:
    """A checkpoint of step 0 has no optimizer state and resumes to exactly that."""
    parts, optimizer, store = make(tmp_path)
    store.save(0, required=True)
    again, other, resumed = make(tmp_path, seed=9)
    assert resumed.resume()["step"] == 0 and not other.state
    assert fingerprint(again, other) == fingerprint(parts, optimizer)


def test_options_that_moved_are_state_and_others_are_config(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """lr was moved by the schedule: restored. eps is configuration: the new run's value is used, with a warning."""
    _, optimizer, store = make(tmp_path, options={"eps": 1e-8, "betas": (0.9, 0.99)})
    train(optimizer, 1, 4)
    store.save(4, required=True)
    _, other, resumed = make(tmp_path, options={"eps": 1e-6, "betas": (0.9, 0.99), "lr": 0.5})
    resumed.resume()
    assert {group["lr"] for group in other.param_groups} == {0.01 / 4}
    assert {group["eps"] for group in other.param_groups} == {1e-6}
    assert "optimizer option eps" in caplog.text and "1e-08" in caplog.text and "betas" not in caplog.text


def test_retention_keeps_the_newest_best_and_two_good_ones(tmp_path: Path) -> None:
    """keep_last newest and best stay; a damaged one doesn't count among the two good ones; 0 keeps all."""
    _, optimizer, store = make(tmp_path, keep_last=2, best_by="val/x/loss")
    for step, loss in enumerate([3.0, 1.0, 2.0, float("nan"), 1.5, 1.0], start=1):
        train(optimizer, step, step)
        store.note_metric(step, {"val/x/loss": loss, "val/y/loss": 0.0})
        store.save_if_due(step)
    assert names(tmp_path) == ["best", "latest", "step_00000002", "step_00000005", "step_00000006"]
    assert (tmp_path / "latest").read_text() == "step_00000006\n"
    assert (tmp_path / "best").read_text().splitlines()[:2] == ["step_00000002", "val/x/loss 1.0"]
    (tmp_path / "step_00000006" / "state.json").write_bytes(b"")
    train(optimizer, 7, 7)
    store.save(7)
    assert {"step_00000005", "step_00000007"} < set(names(tmp_path)) and "step_00000006" in names(tmp_path)
    save_steps(tmp_path / "all", 5, keep_last=0)
    assert len(names(tmp_path / "all")) == 6
    save_steps(tmp_path / "one", 5, keep_last=1)
    assert names(tmp_path / "one") == ["latest", "step_00000004", "step_00000005"]


def test_best_survives_resume_and_may_come_after_the_save(tmp_path: Path) -> None:
    """The best value so far is remembered over a restart; best_mode max turns it round; a validation after the save counts."""
    _, optimizer, store = save_steps(tmp_path, 1, best_by="val/x/acc", best_mode="max")
    store.note_metric(1, {"val/x/acc": 0.5})
    assert (tmp_path / "best").read_text().splitlines()[:2] == ["step_00000001", "val/x/acc 0.5"]
    _, optimizer, store = make(tmp_path, best_by="val/x/acc", best_mode="max")
    store.resume()
    for step, value in ((2, 0.4), (3, 0.6)):
        train(optimizer, step, step)
        store.save(step)
        store.note_metric(step, {"val/x/acc": value})
        assert (tmp_path / "best").read_text().split()[0] == ("step_00000001" if step == 2 else "step_00000003")


def test_a_metric_that_never_comes_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """best_by with a misspelt name warns at the first save."""
    save_steps(tmp_path, 1, best_by="val/x/los")
    assert "best_by=val/x/los" in caplog.text


def test_resume_modes(tmp_path: Path) -> None:
    """none refuses a folder with checkpoints unless overwrite; auto takes the newest; a path takes that one and leaves one line."""
    assert make(tmp_path / "a")[2].resume() is None
    assert make(tmp_path / "a", resume="none")[2].resume() is None
    save_steps(tmp_path / "a", 3)
    with pytest.raises(ConfigError, match="holds 3 checkpoints"):
        make(tmp_path / "a", resume="none")[2].resume()
    assert make(tmp_path / "a")[2].resume()["step"] == 3
    _, optimizer, store = make(tmp_path / "a", resume=str(tmp_path / "a" / "step_00000002"))
    assert store.resume()["step"] == 2
    assert names(tmp_path / "a")[:3] == ["latest", "step_00000001", "step_00000002"]
    assert names(tmp_path / "a")[3].startswith("step_00000003.aside-")
    assert (tmp_path / "a" / "latest").read_text() == "step_00000002\n"
    train(optimizer, 3, 3)
    assert store.save(2) == tmp_path / "a" / "step_00000002"
    assert store.save(3) and read_manifest(tmp_path / "a" / "step_00000003").parent == "step_00000002"
    assert make(tmp_path / "a", resume="none", overwrite=True)[2].resume() is None
    assert [name for name in names(tmp_path / "a") if ".aside-" not in name] == []


def test_resume_from_another_run(tmp_path: Path) -> None:
    """A path outside the folder: this folder's own checkpoints are of another line; the parent is recorded."""
    save_steps(tmp_path / "a", 2)
    save_steps(tmp_path / "b", 3)
    _, optimizer, store = make(tmp_path / "b", resume=str(tmp_path / "a" / "step_00000002"))
    assert store.resume()["step"] == 2
    assert all(".aside-" in name for name in names(tmp_path / "b"))
    train(optimizer, 3, 3)
    assert read_manifest(store.save(3)).parent == str(tmp_path / "a" / "step_00000002")


def test_a_restart_by_a_launcher_goes_on_where_the_run_was(tmp_path: Path) -> None:
    """After a crash, resume=none and a path mean the run's own newest checkpoint."""
    save_steps(tmp_path, 3)
    for resume in ("none", str(tmp_path / "step_00000001")):
        assert make(tmp_path, resume=resume)[2].resume(restarted=True)["step"] == 3


def test_fallback_names_the_file_and_all_damaged_is_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The newest good one is used, with a warning that names what is damaged; a path never falls back; nothing good is an error."""
    save_steps(tmp_path, 3)
    data = tmp_path / "step_00000003" / "optimizer" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-5])
    (tmp_path / "step_00000002" / "model" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"step_00000003/optimizer/__0_0.distcp: damaged"):
        make(tmp_path, resume=str(tmp_path / "step_00000003"))[2].resume()
    assert make(tmp_path)[2].resume()["step"] == 1
    assert str(data) in caplog.text and "step_00000002/model/.metadata: missing" in caplog.text
    (tmp_path / "step_00000001" / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="all 1 checkpoints"):
        make(tmp_path)[2].resume()


def test_quick_does_not_hash(tmp_path: Path) -> None:
    """verify=quick trusts the tensors' bytes but still hashes what is parsed."""
    save_steps(tmp_path, 1)
    folder = tmp_path / "step_00000001"
    state = bytearray((folder / "state.json").read_bytes())
    state[-4] ^= 1
    (folder / "state.json").write_bytes(state)
    with pytest.raises(CheckpointError, match=r"state.json: damaged"):
        make(tmp_path, verify="quick")[2].resume()


def test_leftovers_go_and_foreign_files_stay(tmp_path: Path) -> None:
    """Temporary names of dead runs are removed at the start, what is not ours is left."""
    save_steps(tmp_path, 1)
    (tmp_path / "step_00000002.tmp-0a1b2c3d" / "model").mkdir(parents=True)
    (tmp_path / "latest.tmp-0a1b2c3d").write_text("x")
    (tmp_path / "notes.tmp-keep").write_text("mine")
    make(tmp_path)[2].resume()
    assert names(tmp_path) == ["latest", "notes.tmp-keep", "step_00000001"]


def test_nothing_is_written_over(tmp_path: Path) -> None:
    """A folder of the checkpoint's name that this run didn't write fails the save and is left as it was."""
    _, optimizer, store = make(tmp_path)
    train(optimizer, 1, 1)
    (tmp_path / "step_00000001").mkdir(parents=True)
    assert store.save(1) is None
    assert names(tmp_path) == ["step_00000001"] and names(tmp_path / "step_00000001") == []


def test_too_little_room_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The free space is compared with the size of the tensors first."""
    _, optimizer, store = make(tmp_path)
    train(optimizer, 1, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    assert store.save(1) is None and "GiB free: make room" in caplog.text and names(tmp_path) == []


def renamed(parts: ToyParts) -> ToyParts:
    named = {name.replace("mid", "middle"): param for name, param in parts.named.items()}
    return ToyParts(named, frozenset(named))


def reshaped(parts: ToyParts) -> ToyParts:
    parts.named["last.weight"] = torch.nn.Parameter(torch.zeros(4, 9))
    return parts


def recast(parts: ToyParts) -> ToyParts:
    parts.named["last.weight"] = torch.nn.Parameter(parts.named["last.weight"].detach().bfloat16())
    return parts


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (renamed, [r"model mid.weight +float32 \[9, 6\] +not there", r"model middle.weight +missing +float32 \[9, 6\]"]),
        (
            reshaped,
            [
                r"model last.weight +float32 \[3, 9\] +float32 \[4, 9\]",
                r"optimizer last.weight.exp_avg +float32 \[3, 9\] +float32 \[4, 9\]",
            ],
        ),
        (recast, [r"model last.weight +float32 \[3, 9\] +bfloat16 \[3, 9\]"]),
    ],
)
def test_another_model_is_refused_with_a_table(tmp_path: Path, change, rows: list[str]) -> None:
    """Names both ways, shapes and dtypes; parameters and optimizer are exactly as before."""
    save_steps(tmp_path, 1)
    parts, optimizer, store = make(tmp_path, parts=change(toy("plain", 3)))
    before = fingerprint(parts, optimizer)
    for row in ["given .checkpoint. +expected", *rows]:
        with pytest.raises(CheckpointError, match=row):
            store.resume()
    assert fingerprint(parts, optimizer) == before


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    """Its class and the keys of its state are compared."""
    save_steps(tmp_path, 1)
    for kind, row in ((torch.optim.SGD, "class +AdamW +SGD"), (torch.optim.Adam, "class +AdamW +Adam")):
        with pytest.raises(CheckpointError, match=row):
            make(tmp_path, kind=kind)[2].resume()


def test_frozen_parameters_are_not_saved_but_their_base_is(tmp_path: Path) -> None:
    """Only trainable tensors are in the checkpoint; state.json has the base, and another base is refused."""
    frozen = ("embed.weight", "mid.weight")
    base = {"path": "base", "sha256": "aa"}
    with pytest.raises(CheckpointError, match="2 parameters are frozen"):
        make(tmp_path, parts=toy("plain", 0, frozen))
    source, optimizer, store = make(tmp_path, parts=toy("plain", 0, frozen), base=base)
    train(optimizer, 1, 1)
    folder = store.save(1, required=True)
    assert not {key for keys in read_manifest(folder).tensors.values() for key in keys if key.startswith(frozen)}
    assert json.loads((folder / "state.json").read_text())["base"] == base
    assert make(tmp_path, parts=toy("plain", 1, frozen), base=base)[2].resume()["step"] == 1
    with pytest.raises(CheckpointError, match=r"sha256 of the frozen base +aa +bb"):
        make(tmp_path, parts=toy("plain", 1, frozen), base={"path": "elsewhere", "sha256": "bb"})[2].resume()
    with pytest.raises(CheckpointError, match=r"model embed.weight +missing"):
        make(tmp_path)[2].resume()
    with pytest.raises(CheckpointError, match=r"model embed.weight +missing"):
        load_weights_only(folder, toy("plain", 2))
    parts = toy("plain", 2, frozen)
    base_weight = parts.named["embed.weight"].clone()
    load_weights_only(folder, parts, base=base)
    assert parts.named["last.weight"].equal(source.named["last.weight"]) and parts.named["embed.weight"].equal(base_weight)


def test_weights_only_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From a checkpoint, a run folder or its checkpoints/; frozen ones are filled too, another dtype is cast, a wrong shape refused."""
    source, _, _ = save_steps(tmp_path / "run" / "checkpoints", 2)
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints", tmp_path / "run" / "checkpoints" / "step_00000002"):
        parts = toy("plain", 4, frozen=("mid.weight",))
        assert load_weights_only(path, parts).step == 2
        assert all(param.equal(source.named[name]) for name, param in parts.named.items())
    parts = recast(toy("plain", 4))
    load_weights_only(tmp_path / "run", parts)
    assert parts.named["last.weight"].equal(source.named["last.weight"].bfloat16()) and "are cast" in caplog.text
    with pytest.raises(CheckpointError, match=r"model last.weight +shape \[3, 9\] +shape \[4, 9\]"):
        load_weights_only(tmp_path / "run", reshaped(toy("plain", 4)))
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        load_weights_only(tmp_path, toy("plain", 4))


def test_a_model_only_checkpoint_is_small_and_refuses_to_go_on(tmp_path: Path) -> None:
    """It verifies, holds no optimizer state and starts another run; a resume says what to do."""
    source, _, _ = save_steps(tmp_path, 2, model_only=True)
    newest = tmp_path / "step_00000002"
    assert not verify(newest, "full") and read_index(newest / "optimizer") == {} and read_index(newest / "model")
    parts = toy("plain", 4)
    load_weights_only(newest, parts)
    assert all(param.equal(source.named[name]) for name, param in parts.named.items())
    with pytest.raises(CheckpointError, match="checkpoint.load="):
        make(tmp_path, seed=1)[2].resume()


def test_state_that_is_no_json_fails_the_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What can't be written is found before anything is."""
    parts = toy("plain", 0)
    store = Store(tmp_path, parts, toy_optimizer(parts), CheckpointConfig(), extra_state=lambda: {"loader": object()})
    assert store.save(1) is None and "not JSON serializable" in caplog.text and names(tmp_path) == []


def test_saving_changes_nothing(tmp_path: Path) -> None:
    """Parameters, optimizer and what follows are the same with and without a save."""
    runs = []
    for saving in (True, False):
        parts, optimizer, store = make(tmp_path)
        train(optimizer, 1, 2)
        if saving:
            store.save(2, required=True)
        train(optimizer, 3, 4)
        runs.append(fingerprint(parts, optimizer))
    assert runs[0] == runs[1]


def test_config_check() -> None:
    """Each wrong key is named."""
    bad = CheckpointConfig(every_steps=-1, keep_last=-1, resume="/nowhere", load="/nowhere", best_mode="least", verify="some")
    expected = {"every_steps", "keep_last", "resume", "load", "best_mode", "verify"}
    assert {problem.key for problem in bad.check()} == {f"checkpoint.{key}" for key in expected}


def test_a_small_disk_is_told_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Room for three of the four checkpoints that keep_last=3 may need at once: a warning with both sizes; room for all: none."""
    parts, _, store = make(tmp_path / "new" / "checkpoints", keep_last=3)
    one = 3 * sum(p.numel() * 4 for _, p in parts.named_parameters())
    for free, warned in ((4 * one, False), (4 * one - 1, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        caplog.clear()
        assert store.resume() is None
        assert ("4 checkpoints need about" in caplog.text) == warned


def test_values_of_every_kind_survive(tmp_path: Path) -> None:
    """NaN with its payload, infinities, -0 and subnormals come back as the same bits, where check_finite=false lets them in."""
    parts, _, store = make(tmp_path, check_finite=False)
    bits = torch.tensor([0x7FC00001, 0x7F800000, -8388608, -(2**31), 1, 0x7F7FFFFF, 0, 3, 4], dtype=torch.int32)
    with torch.no_grad():
        parts.named["mid.bias"].copy_(bits.view(torch.float32))
    store.save(0, required=True)
    fill(parts.named["mid.bias"], "other")
    store.resume()
    assert parts.named["mid.bias"].detach().view(torch.int32).equal(bits)
    assert verify(tmp_path / "step_00000000") == []
