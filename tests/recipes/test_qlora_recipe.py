"""QLoRA through the recipe on the debug model: what is saved, resumed, merged, on two ranks, from packed folders, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.dist import run_dist
from tests.helpers.models import make_model
from tests.helpers.packed import packed_model
from tests.recipes.test_lora_recipe import adapter_of, argv, run
from torchft.checkpoint.hf import open_weights
from torchft.checkpoint.quantised import open_base
from torchft.cli.main import main
from torchft.errors import CheckpointError, ConfigError
from torchft.models.build import read_config
from torchft.quant.swap import QuantConfig

NF4 = ["quant.format=nf4", "quant.block_size=32"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "hf", seed=5)


def test_resume_is_exact_and_another_base_is_refused(tmp_path: Path, base: Path) -> None:
    """4 steps and 4 more are 8, bit for bit; resuming over another quantisation of the same files is an error that names both."""
    steps = ["schedule.allow_change=true", "schedule.name=constant", *NF4]
    assert run(argv(tmp_path / "whole", base, "train.steps=4", *steps)) == 0
    assert run(argv(tmp_path / "part", base, "train.steps=2", *steps)) == 0
    assert run(argv(tmp_path / "part", base, "train.steps=4", *steps)) == 0
    expected, got = adapter_of(tmp_path / "whole", 4), adapter_of(tmp_path / "part", 4)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    with pytest.raises(CheckpointError, match="quant of the frozen base"):
        run(argv(tmp_path / "part", base, "train.steps=6", *steps, "quant.double=false"))


def test_two_ranks_train_what_one_trains(tmp_path: Path, base: Path) -> None:
    """FSDP2 over an NF4 base, through the files: adapters equal to rounding."""
    assert run(argv(tmp_path / "one", base, "train.steps=3", *NF4)) == 0
    assert run_dist(run, 2, argv(tmp_path / "two", base, "train.steps=3", *NF4)) == [0, 0]
    one, two = adapter_of(tmp_path / "one", 3), adapter_of(tmp_path / "two", 3)
    assert all((one[name] - two[name]).abs().max() <= 1e-5 * one[name].abs().max() for name in one)


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_the_export_is_what_was_trained(tmp_path: Path, base: Path, init: str) -> None:
    """export.hf merges onto the dequantised values, also where the adapter began as a part of them: what the adapter leaves out is
    exactly the quantised base, and `torchft merge` of the adapter onto those values gives the same."""
    assert (
        run(argv(tmp_path / "run", base, "train.steps=3", "export.hf=true", f"adapter.init={init}", "adapter.targets=[q_proj]", *NF4)) == 0
    )
    spec = read_config(base)[0]
    exported = open_weights(tmp_path / "run" / "export" / "step_00000003", spec).tensors
    values = open_base(base, spec, quant=QuantConfig(format="nf4", block_size=32))
    plain = open_weights(base, spec).tensors
    adapter = adapter_of(tmp_path / "run", 3)
    for name, tensor in exported.items():
        if "q_proj" not in name:
            assert torch.equal(tensor.read(()), values[name].read(())), name
            continue
        stem = f"base_model.model.model.{name.removesuffix('.weight')}"
        a, b = adapter[f"{stem}.lora_A.weight"], adapter[f"{stem}.lora_B.weight"]
        want = values[name].read(()) + 2.0 * (b @ a)
        assert (tensor.read(()) - want).abs().max() <= 1e-5 * want.abs().max(), name
        assert not torch.equal(values[name].read(()), plain[name].read(()))
    folder = tmp_path / "run" / "adapter" / "step_00000003"
    assert main(["merge", str(folder), "--out", str(tmp_path / "merged"), "--values", "dequantised"]) == 0
    merged = open_weights(tmp_path / "merged", spec).tensors
    assert all((merged[n].read(()) - exported[n].read(())).abs().max() <= 1e-5 for n in exported)


def test_a_merge_onto_far_original_weights_is_refused(tmp_path: Path, base: Path, capsys) -> None:
    """--values original: the distance of the two bases in adapter's changes is the one that follows from the files; above 1 nothing is
    written without --force; an adapter whose changes are larger than the distance is merged as it is."""
    assert run(argv(tmp_path / "run", base, "train.steps=2", *NF4)) == 0
    folder, spec = tmp_path / "run" / "adapter" / "step_00000002", read_config(base)[0]
    plain, seen = open_weights(base, spec).tensors, open_base(base, spec, quant=QuantConfig(format="nf4", block_size=32))

    def merge(name: str, *options: str) -> int:
        capsys.readouterr()
        return main(["merge", str(folder), "--out", str(tmp_path / name), "--values", "original", *options])

    assert merge("refused") != 0 and not (tmp_path / "refused").exists()
    said = capsys.readouterr()
    assert "leave --values out" in said.err
    assert merge("forced", "--force") == 0
    merged = open_weights(tmp_path / "forced", spec).tensors
    names = [name for name in plain if not torch.equal(plain[name].read(()), seen[name].read(()))]
    lost = sum((seen[n].read(()) - plain[n].read(())).double().square().sum() for n in names)
    change = sum((merged[n].read(()) - plain[n].read(())).double().square().sum() for n in names)
    apart = float((lost / change).sqrt())
    assert apart > 1 and f"lie {apart:.1f} times" in said.out
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: t * (2 * apart if "lora_B" in name else 1) for name, t in tensors.items()}, weights)
    assert merge("near") == 0 and "lie 0.5 times" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_packed_folders_are_bases(tmp_path: Path, method: str) -> None:
    """A GPTQ or AWQ folder trains as it is stored; without quant.format it is refused, and so is training it in full."""
    dense = packed_model(tmp_path / "base", method, act_order=method == "gptq")
    packed = tmp_path / "base"
    assert run(argv(tmp_path / "run", packed, "train.steps=2", f"quant.format={method}", "export.hf=true")) == 0
    adapter = adapter_of(tmp_path / "run", 2)
    assert all(torch.isfinite(t).all() for t in adapter.values()) and len(adapter) == 2 * len(dense)
    assert run_dist(run, 2, argv(tmp_path / "two", packed, "train.steps=2", f"quant.format={method}")) == [0, 0]
    two = adapter_of(tmp_path / "two", 2)
    assert all((adapter[name] - two[name]).abs().max() <= 1e-5 * adapter[name].abs().max() for name in adapter)
    with pytest.raises(ConfigError, match=f"quant.format={method}"):
        run(argv(tmp_path / "other", packed, "train.steps=2"))


def test_what_does_not_go_with_a_quantised_base_is_refused(tmp_path: Path, base: Path) -> None:
    """Random weights, a block that does not divide a row, and the packed format of a plain folder: each names its key and a fix."""
    for key, *options in (
        ("quant.format", "model.init=random", "quant.format=nf4"),
        ("quant.block_size", "quant.format=nf4", "quant.block_size=128"),
        ("quant.format", "quant.format=awq"),
    ):
        with pytest.raises(ConfigError, match=key):
            run(argv(tmp_path / "run", base, "train.steps=2", *options))
