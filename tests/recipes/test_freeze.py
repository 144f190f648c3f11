"""model.train and model.freeze: which parameters move, what is saved of the others, resume, pipeline stages."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.recipe import arguments, rows, train
from torchft.checkpoint.reader import read_index
from torchft.errors import ConfigError
from torchft.models.build import read_config
from torchft.models.decoder import build_decoder
from torchft.models.init import init_weights
from torchft.train.freeze import chosen

NAMES = [
    "embed_tokens.weight",
    *(f"layers.{i}.{part}.weight" for i in range(12) for part in ("self_attn.q_proj", "mlp.up_proj")),
    "norm.weight",
]
SHORT = ("train.steps=4", "checkpoint.every_steps=2", "validate.every_steps=0", "schedule.warmup_steps=0", "train.global_batch_size=4")


def test_globs_and_layer_ranges() -> None:
    """Globs, first:N and last:N select by layer number, not by text; freeze is taken from train."""
    last = chosen(NAMES, 12, ["last:2"], [])
    assert last == {f"layers.{i}.{part}.weight" for i in (10, 11) for part in ("self_attn.q_proj", "mlp.up_proj")}
    assert chosen(NAMES, 12, [], ["first:12", "embed_tokens.*"]) == {"norm.weight"}
    assert chosen(NAMES, 12, ["layers.1.*"], ["*.mlp.*"]) == {"layers.1.self_attn.q_proj.weight"}
    assert chosen(NAMES, 12, [], []) == set(NAMES)


@pytest.mark.parametrize("entry", ["q_proj", "last:0", "first:13", "layers.12.*", "last:"])
def test_an_entry_that_selects_nothing_is_an_error(entry: str) -> None:
    """Misspelt globs and impossible counts are named with the key they stand at; so is a model without anything to train."""
    with pytest.raises(ConfigError, match=r"model.freeze.1"):
        chosen(NAMES, 12, [], ["norm.weight", entry])
    with pytest.raises(ConfigError, match="left to train"):
        chosen(NAMES, 12, ["norm.*"], ["norm.weight"])


def exported(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(next((folder / "export").glob("step_*")) / "model.safetensors")
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(("world", "overrides"), [(1, ()), (2, ()), (2, ("parallel.tp=2",))], ids=["one", "fsdp2", "tp2"])
def test_only_the_chosen_parameters_move(world: int, overrides: tuple, tmp_path: Path) -> None:
    """After 4 steps the frozen weights have their first bits, the others moved; the export is whole, the checkpoint holds only what
    trains; and a resume at step 2 gives the same bits."""
    options = ("model.train=[last:1, norm.weight]", "model.freeze=['*.mlp.*']")
    argv = arguments(tmp_path / "run", tmp_path / "cache", *SHORT, *overrides, *options)
    assert train(argv, world) == 0
    spec, _ = read_config(Path("configs/debug/tiny-llama"))
    model = build_decoder(spec, device="cpu")
    init_weights(model.named_parameters(), spec, 0)
    after = exported(tmp_path / "run")
    trained = {name for name, p in model.named_parameters() if name in after and not torch.equal(p, after[name])}
    last = spec.num_layers - 1
    expected = {name for name in after if name == "norm.weight" or (name.startswith(f"layers.{last}.") and ".mlp." not in name)}
    assert trained == expected and len(after) == len(dict(model.named_parameters()))
    step = tmp_path / "run" / "checkpoints" / "step_00000002"
    assert set(read_index(step / "model")) == expected
    assert {name.rsplit(".", 1)[0] for name in read_index(step / "optimizer")} == expected
    assert json.loads((step / "state.json").read_text())["base"]["path"] == "random weights"
    resumed = arguments(tmp_path / "again", tmp_path / "cache", *SHORT, *overrides, *options, f"checkpoint.resume={step}")
    assert train(resumed, world) == 0
    again = exported(tmp_path / "again")
    assert all(torch.equal(again[name], after[name]) for name in after)


def test_frozen_layouts_train_the_same(tmp_path: Path) -> None:
    """Pipeline stages and one process with a frozen top: losses within 1e-5. A pipeline with a frozen bottom is refused."""
    options = (*SHORT, "model.freeze=[last:1, embed_tokens.*]")
    for world, name, more in ((1, "one", ()), (2, "pp", ("parallel.pp=2",))):
        assert train(arguments(tmp_path / name, tmp_path / "cache", *options, *more), world) == 0
    for got, want in zip(rows(tmp_path / "pp"), rows(tmp_path / "one"), strict=True):
        assert abs(got["loss"] - want["loss"]) <= 1e-5 * want["loss"]
    with pytest.raises(RuntimeError, match="first stage"):
        train(arguments(tmp_path / "bad", tmp_path / "cache", *SHORT, "model.train=[last:1]", "parallel.pp=2"), 2)


def test_a_base_of_weights_is_named_by_its_hash(tmp_path: Path) -> None:
    """Frozen weights of a HF folder: resume with another folder is refused; checkpoint.load beside freezing too."""
    assert train(arguments(tmp_path / "first", tmp_path / "cache", *SHORT, "train.steps=2")) == 0
    folder = next((tmp_path / "first" / "export").glob("step_*"))
    options = (*SHORT, "model.freeze=[embed_tokens.*]", "model.init=weights", f"model.path={folder}")
    assert train(arguments(tmp_path / "run", tmp_path / "cache", *options)) == 0
    base = json.loads((tmp_path / "run/checkpoints/step_00000004/state.json").read_text())["base"]
    assert base["path"] == str(folder) and len(base["sha256"]) == 64
    assert torch.equal(exported(tmp_path / "run")["embed_tokens.weight"], exported(tmp_path / "first")["embed_tokens.weight"])
    other = next((tmp_path / "run" / "export").glob("step_*"))
    resume = f"checkpoint.resume={tmp_path}/run/checkpoints/step_00000002"
    with pytest.raises(Exception, match="frozen base"):
        train(arguments(tmp_path / "second", tmp_path / "cache", *options, f"model.path={other}", resume))
    with pytest.raises(ConfigError, match=r"checkpoint.load"):
        train(arguments(tmp_path / "third", tmp_path / "cache", *options, f"checkpoint.load={tmp_path / 'first'}"))
