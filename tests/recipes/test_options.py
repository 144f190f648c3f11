"""Options of the recipe, each by its effect on a run of the debug model."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.recipe import ROOT, arguments, rows, train
from torchft.checkpoint.reader import load_tensors
from torchft.errors import CheckpointError, ConfigError, NumericError
from torchft.metrics.sinks import Sinks
from torchft.models.block import Block
from torchft.models.build import read_config
from torchft.optim.schedules import ScheduleConfig
from torchft.parallel.parts import Parts
from torchft.train.run import Run
from torchft.train.setup import check_schedule
from torchft.train.step import NonFinite, StepStats

SHORT = ("train.steps=3", "validate.every_steps=0", "checkpoint.every_steps=0", "schedule.warmup_steps=0", "export.hf=false")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """One token cache for all runs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def plain(tmp_path_factory, cache) -> list[float]:
    """Losses of three steps with every option at its default."""
    return losses(tmp_path_factory.mktemp("plain"), cache)


def losses(folder: Path, cache: Path, *overrides: str, world: int = 1) -> list[float]:
    assert train(arguments(folder / "run", cache, *SHORT, *overrides), world) == 0
    return [row["loss"] for row in rows(folder / "run")]


def validation(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if "val/heldout/loss" in row]


def test_neftune_is_layout_free(cache, plain, tmp_path):
    """Noise moves the losses, the same on one rank, two, TP, PP and for any micro-batch; validation before the first step is without."""
    noisy = ("train.neftune=20", "validate.every_steps=3", "validate.at_start=true")
    one = losses(tmp_path / "one", cache, *noisy)
    assert all(abs(a - b) > 1e-4 for a, b in zip(one, plain, strict=True))
    layouts = {
        "small": (1, "train.micro_batch_size=1"),
        "two": (2, "train.micro_batch_size=4"),
        "tp": (2, "parallel.tp=2"),
        "tp whole": (2, "parallel.tp=2 parallel.sequence_parallel=false"),
        "pp": (2, "parallel.pp=2"),
    }
    for name, (world, overrides) in layouts.items():
        other = losses(tmp_path / name, cache, *noisy, *overrides.split(), world=world)
        assert other == pytest.approx(one, rel=1e-5), name
    losses(tmp_path / "quiet", cache, "validate.every_steps=3", "validate.at_start=true")
    assert validation(tmp_path / "one")[0]["val/heldout/loss"] == validation(tmp_path / "quiet")[0]["val/heldout/loss"]


@pytest.mark.parametrize("option", ["loss.smoothing=0.1", "loss.z=0.01"])
def test_smoothing_and_z_loss_reach_the_loss(option, cache, plain, tmp_path):
    """The first loss is the formula's, from the same logits: a random model's cross-entropy is near log v, smoothing moves it little,
    z adds z * logsumexp^2; later losses differ too, so the gradient has it."""
    first, second, *_ = losses(tmp_path, cache, option)
    if "z" in option.split("=")[0]:
        assert 0.01 * 5.5**2 < first - plain[0] < 0.01 * 6.5**2
    else:
        assert 0 < abs(first - plain[0]) < 0.05 * plain[0]
    assert abs((second - first) - (plain[1] - plain[0])) > 1e-6


def test_early_stop_ends_and_stays_ended(cache, tmp_path):
    """With an impossible min_delta the second validation without a better value ends the run, saved and exported; started again it
    makes no step. Without early stopping it goes on."""
    options = ("train.steps=12", "validate.every_steps=2", "validate.early_stop.patience=2", "export.hf=true")
    stopping = (*options, "validate.early_stop.metric=val/heldout/loss", "validate.early_stop.min_delta=100")
    for _ in range(2):
        assert len(losses(tmp_path, cache, *stopping)) == 6
    assert (tmp_path / "run" / "export" / "step_00000006").is_dir()
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().split()[0] == "step_00000006"
    assert "ended early" in (tmp_path / "run" / "events.jsonl").read_text()


@pytest.mark.parametrize("world", [1, 2])
def test_the_best_checkpoint_is_exported(world, cache, tmp_path):
    """With export.best the folder is named by the best step and holds its weights, not the last step's; the last step is still saved."""
    options = ("train.steps=6", "validate.every_steps=2", "checkpoint.every_steps=2", "checkpoint.keep_last=0", "export.hf=true")
    best = ("checkpoint.best_by=val/heldout/loss", "checkpoint.best_mode=max")  # the loss falls, so the first is "best"
    losses(tmp_path, cache, *options, *best, "export.best=true", world=world)
    folder, checkpoints = tmp_path / "run" / "export", tmp_path / "run" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step_00000002"]
    assert (checkpoints / "latest").read_text().split()[0] == "step_00000006"
    weights = load_file(folder / "step_00000002" / "model.safetensors")
    for step, same in (("step_00000002", True), ("step_00000006", False)):
        saved = {"norm.weight": torch.empty(weights["model.norm.weight"].shape)}
        load_tensors(checkpoints / step / "model", saved, alone=True)
        assert torch.equal(saved["norm.weight"], weights["model.norm.weight"]) == same


def test_best_needs_a_metric_and_a_checkpoint(cache, tmp_path, capfd):
    """export.best without best_by is refused; a best that never met a checkpoint is a warning, and the last step is exported."""
    with pytest.raises(ConfigError, match=r"checkpoint.best_by"):
        losses(tmp_path, cache, "export.best=true")
    apart = ("train.steps=3", "validate.every_steps=2", "checkpoint.save_at_end=false", "export.hf=true", "export.best=true")
    losses(tmp_path, cache, *apart, "checkpoint.best_by=val/heldout/loss")
    assert "the last step is exported" in capfd.readouterr().err
    assert (tmp_path / "run" / "export" / "step_00000003").is_dir()


def test_model_only_checkpoints_start_another_run(cache, tmp_path):
    """Such a checkpoint is refused by resume; a run that starts from it has, before its first step, the validation loss it was saved at."""
    options = ("train.steps=4", "checkpoint.every_steps=2", "checkpoint.model_only=true", "validate.every_steps=2")
    losses(tmp_path / "first", cache, *options)
    step = tmp_path / "first" / "run" / "checkpoints" / "step_00000002"
    with pytest.raises(CheckpointError, match="model_only"):
        losses(tmp_path / "second", cache, *options, f"checkpoint.resume={step}")
    losses(tmp_path / "third", cache, *options, f"checkpoint.load={step}", "validate.at_start=true")
    saved, started = (validation(tmp_path / name)[0] for name in ("first", "third"))
    assert (saved["step"], started["step"]) == (2, 0) and started["val/heldout/loss"] == saved["val/heldout/loss"]


def test_level_of_messages(cache, tmp_path, capfd):
    """At level warning a run's information is not printed; at info it is."""
    losses(tmp_path / "info", cache)
    assert "random weights" in capfd.readouterr().err
    losses(tmp_path / "warning", cache, "metrics.level=warning")
    assert "random weights" not in capfd.readouterr().err


def test_validation_batch_size_changes_no_metric(cache, tmp_path):
    """Rows at once in validation are a matter of speed; the loss is the same to rounding."""
    options = ("train.steps=1", "validate.every_steps=1")
    for name, size in (("one", "1"), ("five", "5")):
        losses(tmp_path / name, cache, *options, f"validate.micro_batch_size={size}")
    one, five = (validation(tmp_path / name)[0]["val/heldout/loss"] for name in ("one", "five"))
    assert one == pytest.approx(five, rel=1e-6)


def test_validation_batch_size_is_used(cache, tmp_path, monkeypatch):
    """The rows of a validation's micro-batches are validate.micro_batch_size."""
    seen, forward_only = [], Parts.forward_only

    def spy(self, batches, fn):
        seen.extend(len(batch.tokens) for batch in batches)
        return forward_only(self, batches, fn)

    monkeypatch.setattr(Parts, "forward_only", spy)
    losses(tmp_path, cache, "train.steps=1", "validate.every_steps=1", "validate.micro_batch_size=5")
    assert set(seen) == {5}


def test_deterministic_mode(cache, plain, tmp_path, monkeypatch):
    """Deterministic algorithms are on during the run and change nothing on a CPU; the next run without has them off."""
    seen, forward_backward = [], Parts.forward_backward

    def spy(self, *args, **kwargs):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return forward_backward(self, *args, **kwargs)

    monkeypatch.setattr(Parts, "forward_backward", spy)
    assert losses(tmp_path / "on", cache, "debug.deterministic=true") == plain
    losses(tmp_path / "off", cache)
    assert seen == [True] * 3 + [False] * 3


def test_the_ledger_is_in_the_rows(cache, plain, tmp_path):
    """With debug.ledger each row has count, bytes and seconds by axis, of a run with prefetch and offload too; the losses stay."""
    options = ("parallel.fsdp.forward_prefetch=1", "parallel.fsdp.backward_prefetch=2", "parallel.fsdp.cpu_offload=true")
    got = losses(tmp_path, cache, "debug.ledger=true", "optim.offload_state=true", *options, world=2)
    assert all(abs(a - b) <= 1e-5 * b for a, b in zip(got, plain, strict=True))
    for row in rows(tmp_path / "run"):
        assert row["comm/fsdp/count"] > 0 and row["comm/fsdp/bytes"] > 1000 and row["comm/fsdp/seconds"] > 0
        assert "comm/tp/count" not in row


@pytest.mark.parametrize("option", ["memory.recompute=selective", "memory.recompute=full", "memory.recompute_every=2"])
def test_recomputation_keeps_the_losses(option, cache, plain, tmp_path):
    """Losses keep their bits."""
    assert losses(tmp_path, cache, "memory.recompute=full", option) == plain


def test_skipped_steps_in_a_row_end_the_run():
    """At max_in_row=2 two in a row are too many; a good step or an fp16 overflow, which has a limit of its own, starts the count anew."""
    run = Run.__new__(Run)
    run.skipped_steps, run._skipped_in_row, run.sinks = 0, 0, Sinks({})
    run.cfg = SimpleNamespace(train=SimpleNamespace(nonfinite=NonFinite("skip", max_in_row=2)))
    bad, good = StepStats({}, 1.0, float("nan"), 1, "not finite"), StepStats({}, 1.0, 1.0, 1)
    for step, stats in enumerate([bad, good, bad, replace(bad, overflow=True), bad]):
        run._count_skip(step, stats)
    assert run.skipped_steps == 4
    with pytest.raises(NumericError, match="max_in_row=2"):
        run._count_skip(5, bad)


def test_a_schedule_of_an_older_checkpoint_is_the_same_one():
    """Keys that came later count as their defaults: an older checkpoint's schedule is no change; another value of them is."""
    cfg = ScheduleConfig("cosine", warmup_steps=3)
    older = {"name": "cosine", "warmup_steps": 3, "warmup_ratio": 0.0, "min_ratio": 0.0, "lr": 1.0, "num_steps": 9}
    given = {**asdict(cfg), "lr": 1.0, "num_steps": 9}
    check_schedule(given, older)
    with pytest.raises(ConfigError, match="cycles"):
        check_schedule(given | {"cycles": 2}, older)


def events(folder: Path, kind: str) -> list[dict]:
    lines = map(json.loads, (folder / "run" / "events.jsonl").read_text().splitlines())
    return [line for line in lines if kind in json.dumps(line)]


def test_fp16_overflows_on_all_ranks_together_and_resumes(cache, plain, tmp_path):
    """A loss scale far too large: both ranks skip and halve until it fits, then train near fp32's losses; the scale is in the
    checkpoint, and a resumed run goes on to the same bits."""
    options = ("precision.compute=fp16", f"precision.loss_scale={2.0**24}", "train.steps=16", "optim.lr=1e-3", "checkpoint.every_steps=12")
    straight = losses(tmp_path / "two", cache, *options, world=2)
    assert abs(straight[0] - plain[0]) < 0.01 * plain[0]
    skipped = events(tmp_path / "two", "overflow")
    assert 3 < len(skipped) < 16 and straight[-1] < straight[0]
    state = json.loads((tmp_path / "two/run/checkpoints/step_00000012/state.json").read_text())
    assert state["scaler"]["scale"] == 2.0 ** (24 - len(skipped)) and state["counters"]["skipped_steps"] == len(skipped)
    resume = f"checkpoint.resume={tmp_path}/two/run/checkpoints/step_00000012"
    assert losses(tmp_path / "again", cache, *options, resume, world=2) == straight[12:]


FAKE_OOM = """
import torch
from torchft import dist
from torchft.parallel.parts import Parts

real = Parts._accumulate

def fake(self, batches, *rest):
    out = real(self, batches, *rest)
    if len(batches[0].tokens) > {rows} and dist.rank() == dist.world_size() - 1:
        raise torch.OutOfMemoryError("fake")
    return out

Parts._accumulate = fake
"""


INSIDE_OOM = """
import torch
from torchft.models.block import Block

real = Block.forward

calls = 0

def out_of_memory(*args):
    global calls
    calls += 1
    if calls > {after}:
        raise torch.OutOfMemoryError("fake")

def fake(self, h, *rest):
    out = real(self, h, *rest)
    if len(h) > 1 and "{where}" == "forward":
        out_of_memory()
    elif len(h) > 1:
        out.register_hook(out_of_memory)
    return out

Block.forward = fake
"""


@pytest.fixture
def _unpatched(monkeypatch):
    """Undoes what a plugin patched in this process."""
    monkeypatch.setattr(Parts, "_accumulate", Parts._accumulate)
    monkeypatch.setattr(Block, "forward", Block.forward)


@pytest.mark.parametrize("world", [1, 2])
def test_auto_micro_batch_halves_on_all_ranks(world, cache, tmp_path, _unpatched):
    """One rank runs out of memory at 4 and 2 rows after its backward: all go to 1 row and give the bits of a run that began with
    1 row, so nothing of the failed tries is left and the global batch is the same."""
    small = losses(tmp_path / "small", cache, "train.micro_batch_size=1", world=world)
    plugin = tmp_path / f"oom_{world}.py"
    plugin.write_text(FAKE_OOM.format(rows=1))
    options = (f"plugins=[{plugin}]", "train.micro_batch_size=4", "train.auto_micro_batch=true")
    assert losses(tmp_path / "auto", cache, *options, world=world) == small


@pytest.mark.parametrize("compute", ["bf16", pytest.param("fp32", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("where", "passes"),
    [("backward", 1), *(pytest.param(*case, marks=pytest.mark.full) for case in (("forward", 0), ("backward", 0), ("forward", 1)))],
)
def test_auto_micro_batch_after_an_error_inside_a_block(where, passes, compute, cache, tmp_path, _unpatched):
    """Both ranks run out in the first block of a forward or the last one of a backward, of the first micro-batch or of the second: what
    FSDP2 had gathered, begun and summed up is given up, and the step has the bits of one in micro-batches of 1."""
    precision = f"precision.compute={compute}"
    small = losses(tmp_path / "small", cache, precision, "train.micro_batch_size=1", world=2)
    plugin = tmp_path / f"oom_{where}_{passes}_{compute}.py"
    plugin.write_text(INSIDE_OOM.format(where=where, after=passes * read_config(ROOT / "configs/debug/tiny-llama")[0].num_layers))
    options = (precision, f"plugins=[{plugin}]", "train.micro_batch_size=2", "train.auto_micro_batch=true")
    assert losses(tmp_path / "auto", cache, *options, world=2) == small


def test_a_row_that_never_fits_is_an_error(cache, tmp_path, _unpatched):
    """Out of memory with one row: an error that says what to do."""
    plugin = tmp_path / "oom_always.py"
    plugin.write_text(FAKE_OOM.format(rows=0))
    with pytest.raises(ConfigError, match="memory.recompute"):
        losses(tmp_path, cache, f"plugins=[{plugin}]", "train.micro_batch_size=2", "train.auto_micro_batch=true")


@pytest.mark.parametrize("world", [1, 2])
def test_prompts_are_sampled_at_each_validation(world, cache, tmp_path):
    """samples/step_N.jsonl at the start and at each validation, at most prompt_tokens new tokens; sampling moves no loss."""
    options = ("validate.every_steps=3", "validate.at_start=true")
    prompts = ("validate.prompts=['A table for two?', Hello]", "validate.prompt_tokens=5")
    with_prompts = losses(tmp_path / "with", cache, *options, *prompts, world=world)
    assert with_prompts == losses(tmp_path / "without", cache, *options, world=world)
    files = sorted((tmp_path / "with" / "run" / "samples").iterdir())
    assert [path.name for path in files] == ["step_00000000.jsonl", "step_00000003.jsonl"]
    for path in files:
        found = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row["prompt"] for row in found] == ["A table for two?", "Hello"]
        assert all(row["text"] and row["finish"] == "length" for row in found)


def test_prompts_leave_the_parameters_as_they_were(cache, tmp_path):
    """What a forward gathers in the compute precision is given back: the checkpoint after a sampling is that of a run without prompts."""
    options = ("validate.every_steps=3", "precision.compute=bf16", "parallel.fsdp.reshard_after_forward=false", "export.hf=true")
    losses(tmp_path / "without", cache, *options, world=2)
    losses(tmp_path / "with", cache, *options, "validate.prompts=[Hello]", "validate.prompt_tokens=2", world=2)
    one, two = (load_file(tmp_path / name / "run/export/step_00000003/model.safetensors") for name in ("without", "with"))
    assert all(two[name].dtype == torch.float32 and torch.equal(one[name], two[name]) for name in one)


def test_prompts_need_a_whole_model(cache, tmp_path):
    """Under TP a prompt is refused before anything is built."""
    with pytest.raises(RuntimeError, match=r"validate.prompts"):
        losses(tmp_path, cache, "validate.prompts=[a]", "validate.at_start=true", "parallel.tp=2", world=2)


def test_profile_window(cache, tmp_path):
    """The trace holds the two steps of the window and no third one; one file a rank."""
    losses(tmp_path, cache, "metrics.profile.first_step=2", "metrics.profile.num_steps=2", world=2)
    traces = sorted((tmp_path / "run" / "profile").iterdir())
    assert [path.name for path in traces] == ["trace_rank0.json", "trace_rank1.json"]
    names = [event.get("name") for event in json.loads(traces[0].read_text())["traceEvents"]]
    assert names.count("Optimizer.step#AdamW.step") == 2


def test_garbage_is_collected_when_told(cache, tmp_path, monkeypatch):
    """With gc_every_steps=2 the collector is off in steps, runs after step 2 of 3, and is on again afterwards."""
    import gc

    calls, real = [], gc.collect
    monkeypatch.setattr(gc, "collect", lambda *args: calls.append(gc.isenabled()) or real(*args))
    losses(tmp_path, cache, "memory.gc_every_steps=2")
    assert calls.count(False) == 1 and gc.isenabled()
