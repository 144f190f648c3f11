"""The pretraining recipe end to end, from scratch on a tokenizer of ours: resume, world sizes, layouts, continued training, wrong input."""

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.dist import run_dist
from tests.helpers.recipe import ROOT, load_recipe, rows
from torchft.checkpoint.manifest import verify
from torchft.errors import CheckpointError, TorchftError

SENTENCES = (
    "The red boat sails over the lake.",
    "A teacher answers a hard question?",
    "Nobody counts 12 apples and 7 pears!",
    "Why, so I do.",
)
STEPS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A corpus of ragged documents in text and JSON, held-out text and a tokenizer."""
    folder = tmp_path_factory.mktemp("pretrain")
    for i in range(3):
        (folder / f"part{i}.txt").write_text("\n\n".join(" ".join(SENTENCES[(i + j + k) % 4] for k in range(1 + j % 5)) for j in range(5)))
    lines = [json.dumps({"text": " ".join(SENTENCES[(i * k) % 4] for k in range(1 + i))}) for i in range(9)]
    (folder / "more.jsonl").write_text("\n".join(lines))
    (folder / "heldout.txt").write_text("\n".join(SENTENCES))
    module_spec = importlib.util.spec_from_file_location("train_tokenizer", ROOT / "scripts" / "train_tokenizer.py")
    script = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(script)
    assert script.main([str(folder / "tok"), str(folder / "*.txt"), "--vocab-size", "320"]) == 0
    return folder


def arguments(place: Path, output_dir: Path, *overrides: str) -> list[str]:
    """Twelve steps of 8 rows of 32 tokens (three epochs of about 4 steps), a model of two layers."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 320}
    return [
        f"output_dir={output_dir}",
        "model.family=llama",
        "model.init=random",
        *(f"model.spec.{name}={value}" for name, value in sizes.items()),
        "model.spec.init_std=0.1",
        f"tokenizer.path={place / 'tok'}",
        f"data.train=[{{path: {place}/part*.txt, separator: blank_lines}}, {{path: {place}/more.jsonl}}]",
        f"data.validation={{heldout: {{path: {place}/heldout.txt}}}}",
        f"data.cache={place / 'cache'}",
        "data.seq_len=32",
        "data.window=10",
        "optim.lr=3e-3",
        f"train.steps={STEPS}",
        "train.global_batch_size=8",
        "train.micro_batch_size=2",
        "validate.every_steps=6",
        "checkpoint.every_steps=6",
        *overrides,
    ]


def train(argv: list[str], world_size: int = 1) -> int:
    codes = [_main(argv)] if world_size == 1 else run_dist(_main, world_size, argv)
    assert len(set(codes)) == 1, codes
    return codes[0]


def _main(argv: list[str]) -> int:
    return load_recipe("pretrain").main(argv)


@pytest.fixture(scope="module")
def straight(place) -> Path:
    """The run of one process without a stop."""
    assert train(arguments(place, place / "straight")) == 0
    return place / "straight"


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "export").glob("step_*")) / "model.safetensors")


def test_leaves_a_whole_run_folder(straight):
    """Rows of every step, the loss falling from ln 320; the tokens of full rows; validation, checkpoints, export with the tokenizer."""
    losses = [row["loss"] for row in rows(straight)]
    assert len(losses) == STEPS and abs(losses[0] - math.log(320)) < 0.6 and losses[-1] < losses[0] - 1
    assert rows(straight)[0]["tokens"] == 8 * 32
    assert [verify(straight / "checkpoints" / f"step_{n:08d}", "full") for n in (6, 12)] == [[], []]
    assert json.loads((straight / "summary.json").read_text())["validation"]["val/heldout/loss"]["last"] < losses[0]
    folder = next((straight / "export").glob("step_*"))
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (32, 2, 320)
    assert (folder / "tokenizer.json").is_file() and not (folder / "chat_template.jinja").exists()


def test_every_token_of_an_epoch_is_trained(straight, place):
    """An epoch's tokens in the metrics are those of the documents: nothing dropped, nothing padded but the last row."""
    tokens = [row["tokens"] for row in rows(straight)]
    caches = [json.loads(path.read_text())["counts"] for path in (place / "cache").glob("*/meta.json")]
    total = sum(counts["tokens"] for counts in caches if counts["total"] > 1)  # the held-out file is one document
    steps = -(-total // (8 * 32))
    assert sum(tokens[:steps]) == total and steps < STEPS and all(t == 8 * 32 for t in tokens[: steps - 1])


@pytest.mark.parametrize("world", [1, 2])
def test_resume_is_bit_equal(straight, place, tmp_path, world):
    """6 steps, resume, 6 steps on 1 and on 2 ranks: weights and metrics of every step bit-equal to 12 straight ones on as many."""
    whole = straight if world == 1 else tmp_path / "whole"
    if world > 1:
        assert train(arguments(place, whole), world) == 0
    folder = tmp_path / "resumed"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000012")
    shutil.rmtree(folder / "export")
    (folder / "checkpoints" / "latest").write_text("step_00000006\n")
    assert train(arguments(place, folder), world) == 0
    ours, theirs = exported(folder), exported(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for got, want in zip(rows(folder), rows(whole), strict=True):
        assert all(got[key] == want[key] for key in ("step", "loss", "lr", "grad_norm", "tokens", "tokens_total"))


def test_world_sizes_1_2_1_keep_the_order(straight, place, tmp_path):
    """6 steps on 2 ranks, then resumed on 1: the same tokens in every step, losses within 1e-5 of one process."""
    folder = tmp_path / "elastic"
    assert train(arguments(place, folder), 2) == 0
    for name in ("checkpoints/step_00000012", "export"):
        shutil.rmtree(folder / name)
    (folder / "checkpoints" / "latest").write_text("step_00000006\n")
    assert train(arguments(place, folder, "train.micro_batch_size=4")) == 0
    _same_losses(folder, straight)


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (2, []),
        (2, ["parallel.tp=2"]),
        pytest.param(2, ["parallel.pp=2"], marks=pytest.mark.full),
        pytest.param(4, ["parallel.dp_replicate=2", "parallel.dp_shard=2"], marks=pytest.mark.full),
    ],
    ids=["fsdp", "tp", "pp", "hsdp"],
)
def test_layouts_train_the_same_model(straight, place, tmp_path, world, overrides):
    """Every layout: losses within 1e-5 of one process, and weights within 1e-3 of their largest after 12 steps."""
    folder = tmp_path / "layout"
    assert train(arguments(place, folder, "train.micro_batch_size=1", *overrides), world) == 0
    _same_losses(folder, straight)
    ours, reference = exported(folder), exported(straight)
    assert ours.keys() == reference.keys()
    for name, tensor in ours.items():
        assert (tensor - reference[name]).abs().max() <= 1e-3 * reference[name].abs().max(), name


def _same_losses(folder: Path, reference: Path) -> None:
    for got, want in zip(rows(folder), rows(reference), strict=True):
        assert got["tokens_total"] == want["tokens_total"] and abs(got["loss"] - want["loss"]) <= 1e-5 * want["loss"], got["step"]


def test_continues_from_a_folder(straight, place, tmp_path):
    """model.path: the exported model goes on from its weights with its own tokenizer; the first loss is about the last."""
    folder = tmp_path / "continued"
    model = [a for a in arguments(place, folder) if not a.startswith(("model.", "tokenizer."))]
    path = next((straight / "export").glob("step_*"))
    assert train([*model, f"model.path={path}", "train.steps=2", "validate.every_steps=0"]) == 0
    assert abs(rows(folder)[0]["loss"] - rows(straight)[-1]["loss"]) < 0.3


def test_epochs_are_known_beforehand(place, tmp_path):
    """train.epochs counts rows of all documents, not documents."""
    argv = [a for a in arguments(place, tmp_path / "run", "train.epochs=1", "validate.every_steps=0") if not a.startswith("train.steps")]
    assert train(argv) == 0
    done = rows(tmp_path / "run")
    state = json.loads((tmp_path / "run" / "checkpoints" / f"step_{len(done):08d}" / "state.json").read_text())["loader"]
    assert (state["epoch"], state["window"], state["pack"], state["step"]) == (1, 0, 0, len(done))


def test_changed_corpus_is_refused_on_resume(straight, place, tmp_path):
    """Another separator is another order of other documents: the resume stops and names the source."""
    folder = tmp_path / "changed"
    shutil.copytree(straight, folder)
    with pytest.raises(CheckpointError, match="number of sources"):
        train(arguments(place, folder, f"data.train=[{{path: {place}/part*.txt}}]", "train.steps=20", "schedule.allow_change=true"))


WRONG = {
    "key of chats": (["data.truncation=drop"], "data.truncation"),
    "no corpus": (["data.train=[{{path: {place}/nowhere.txt}}]"], "nowhere.txt"),
    "no text in the records": (["data.train=[{{path: {place}/more.jsonl, text_key: body}}]"], "text_key"),
    "chats as documents": ([f"data.train=[{{{{path: {ROOT}/configs/quickstart/data/train.jsonl}}}}]"], "keys are messages"),
    "no tokenizer": (["tokenizer.path=null"], "train_tokenizer.py"),
    "folder without tokenizer": (["tokenizer.path={place}"], "no tokenizer here"),
    "vocabulary too small": (["model.spec.vocab_size=300"], "model.spec.vocab_size=320"),
    "heads that do not divide": (["model.spec.num_kv_heads=3"], "model.spec.num_kv_heads"),
    "misspelt number": (["model.spec.hidden=3"], "model.spec.hidden_size"),
    "no size": (["model.spec.num_layers=null"], "model.size"),
    "seq_len too long": (["data.seq_len=4096"], "max_position_embeddings"),
    "batch that does not divide": (["train.global_batch_size=7"], "train.global_batch_size"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_a_message_and_exit_2(case, place, tmp_path, monkeypatch, capsys):
    """Exit code 2, no traceback, and the message names what is wrong."""
    overrides, expected = WRONG[case]
    argv = arguments(place, tmp_path / "run", *(o.format(place=place) for o in overrides))
    from torchft.train.run import run_recipe

    monkeypatch.setattr(sys, "argv", ["pretrain.py", *argv])
    with pytest.raises(SystemExit) as stop:
        run_recipe(load_recipe("pretrain").main)
    text = capsys.readouterr().err
    assert stop.value.code == 2 and expected in text and "Traceback" not in text, text
    assert not (tmp_path / "run" / "lock").exists()


def _error(argv: list[str]) -> str:
    try:
        load_recipe("pretrain").main(argv)
    except TorchftError as error:
        return str(error)
    return "no error"


def test_wrong_text_is_told_on_every_rank(place, tmp_path):
    """A bad byte in one rank's slice of the documents: all ranks stop with its place."""
    (tmp_path / "bad.txt").write_bytes(b"fine\n\n" * 20 + b"bad \xff")
    argv = arguments(place, tmp_path / "run", f"data.train=[{{path: {tmp_path}/bad.txt, separator: blank_lines}}]")
    for text in run_dist(_error, 2, argv):
        assert "bad.txt:41:5" in text
