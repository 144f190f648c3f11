"""The LoRA recipe end to end on the debug model: what it saves, resumes, exports, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.dist import run_dist
from tests.helpers.models import make_model
from tests.helpers.recipe import arguments, load_recipe, rows
from torchft.checkpoint.hf import open_weights
from torchft.checkpoint.reader import read_index
from torchft.checkpoint.tensor_files import open_file
from torchft.cli.main import main
from torchft.models.build import read_config
from torchft.train.validate import validate

OPTIONS = [
    "model.init=weights",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "validate.every_steps=0",
    "schedule.warmup_steps=1",
]


def argv(folder: Path, base: Path, *more: str) -> list[str]:
    return arguments(folder, folder.parent / "cache", f"model.path={base}", *OPTIONS, *more)


def run(arguments_: list[str]) -> int:
    return load_recipe("lora_finetune").main(arguments_)


def adapter_of(run_folder: Path, step: int) -> dict[str, torch.Tensor]:
    path = run_folder / "adapter" / f"step_{step:08d}" / "adapter_model.safetensors"
    return {name: tensor.read(()) for name, tensor in open_file(path).items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "hf", seed=5)


def test_checkpoints_hold_the_adapter_alone_and_resume_is_exact(tmp_path: Path, base: Path) -> None:
    """8 steps are 4 and 4 more, bit for bit; a checkpoint has no weight of the base, and no optimizer state for one."""
    assert run(argv(tmp_path / "whole", base, "train.steps=8")) == 0
    halves = ["schedule.allow_change=true", "schedule.name=constant"]
    assert run(argv(tmp_path / "whole2", base, "train.steps=8", *halves)) == 0
    assert run(argv(tmp_path / "part", base, "train.steps=4", *halves)) == 0
    assert run(argv(tmp_path / "part", base, "train.steps=8", *halves)) == 0
    expected, got = adapter_of(tmp_path / "whole2", 8), adapter_of(tmp_path / "part", 8)
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    saved = read_index(tmp_path / "part" / "checkpoints" / "step_00000008" / "model")
    assert saved and all(".lora_" in name for name in saved)
    optimizer = read_index(tmp_path / "part" / "checkpoints" / "step_00000008" / "optimizer")
    assert optimizer and all(".lora_" in name for name in optimizer)
    assert rows(tmp_path / "whole")[-1]["loss"] < rows(tmp_path / "whole")[0]["loss"]


def test_dora_over_a_narrow_base_is_dora(tmp_path: Path, base: Path) -> None:
    """A frozen base in bf16 under an fp32 adapter: the first lengths are those of the base's rows, and the losses those of fp32."""
    losses = []
    for name, *options in (("narrow", "precision.compute=bf16"), ("wide",)):
        assert run_dist(run, 1, argv(tmp_path / name, base, "train.steps=3", "adapter.dora=true", "optim.lr=1e-3", *options)) == [0]
        losses.append([row["loss"] for row in rows(tmp_path / name)])
    assert all(abs(a - b) <= 2e-2 * b for a, b in zip(*losses, strict=True))
    lengths = {name: value for name, value in adapter_of(tmp_path / "narrow", 3).items() if "magnitude" in name}
    weights = open_weights(base, read_config(base)[0]).tensors
    for name, value in lengths.items():
        of = weights[name.removeprefix("base_model.model.model.").replace("lora_magnitude_vector", "weight")].read(()).norm(dim=1)
        assert value.dtype == torch.float32 and (value / of - 1).abs().max() < 1e-2, name


def test_ranks_change_nothing_but_rounding(tmp_path: Path, base: Path) -> None:
    """Two processes train the adapter that one trains."""
    assert run(argv(tmp_path / "one", base, "train.steps=3")) == 0
    assert run_dist(run, 2, argv(tmp_path / "two", base, "train.steps=3")) == [0, 0]
    one, two = adapter_of(tmp_path / "one", 3), adapter_of(tmp_path / "two", 3)
    assert all((one[name] - two[name]).abs().max() <= 1e-5 * one[name].abs().max() for name in one)


def test_merged_model_at_the_end_and_by_hand(tmp_path: Path, base: Path) -> None:
    """export.hf, `torchft export RUN` and `torchft merge` give the same weights: the base with the adapter added."""
    assert run(argv(tmp_path / "run", base, "train.steps=3", "export.hf=true", "adapter.rslora=true")) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "later")]) == 0
    assert main(["merge", str(tmp_path / "run" / "adapter" / "step_00000003"), "--out", str(tmp_path / "merged")]) == 0
    spec = read_config(base)[0]
    folders = [tmp_path / "run" / "export" / "step_00000003", tmp_path / "later", tmp_path / "merged"]
    first, *others = (open_weights(folder, spec).tensors for folder in folders)
    for other in others:
        assert all(torch.equal(first[name].read(()), other[name].read(())) for name in first)
    before = open_weights(base, spec).tensors
    changed = {name for name in first if not torch.equal(first[name].read(()), before[name].read(()))}
    assert changed and all(name.endswith("_proj.weight") for name in changed) and len(changed) == 7 * spec.num_layers


def test_starts_from_an_adapter(tmp_path: Path, base: Path) -> None:
    """adapter.path begins where that adapter is: its first loss is lower than a new adapter's, and its shape is kept."""
    assert run(argv(tmp_path / "a", base, "train.steps=6", "adapter.rank=3", "adapter.targets=[q_proj,up_proj]")) == 0
    again = tmp_path / "a" / "adapter" / "step_00000006"
    assert run(argv(tmp_path / "b", base, "train.steps=1", "schedule.warmup_steps=0", f"adapter.path={again}", "export.hf=true")) == 0
    assert rows(tmp_path / "b")[0]["loss"] < rows(tmp_path / "a")[0]["loss"]
    configs = [json.loads(next((tmp_path / name / "adapter").glob("*/adapter_config.json")).read_text()) for name in "ab"]
    assert configs[0] == configs[1] and configs[0]["r"] == 3 and configs[0]["target_modules"] == ["q_proj", "up_proj"]


@pytest.mark.parametrize(
    "more, expected",
    [
        (["adapter.targets=[w_proj]"], "w_proj"),
        (["adapter.rank=0"], "adapter.rank"),
        (["adapter.targets=[lm_head]"], "lm_head"),
        (["adapter.layers=[99]"], "adapter.layers"),
        (["adapter.rank_pattern={nothing: 4}"], "adapter.rank_pattern"),
        (["model.freeze=[norm.weight]"], "model.freeze"),
        (["adapter.path=nowhere"], "adapter.path"),
        (["model.init=random", "export.hf=true"], "model.init=random"),
        (["export.hf=true", "checkpoint.save_at_end=false"], "save_at_end"),
        (["adapter.dropout=1"], "adapter.dropout"),
        (["adapter.dropout=0.1", "compile.enabled=true", "memory.recompute=full"], "adapter.dropout"),
        (["adapter.lora_bias=true", "adapter.dora=true"], "adapter.lora_bias"),
        (["adapter.bias=all"], "adapter.bias"),
        (["adapter.modules_to_save=[nothing]"], "adapter.modules_to_save"),
        (["adapter.modules_to_save=[lm_head]"], "lm_head"),
        (["adapter.modules_to_save=[up_proj]"], "up_proj"),
        (["adapter.targets=[q_proj,embed_tokens]", "adapter.dora=true"], "embed_tokens with adapter.dora"),
        (["adapter.trainable_tokens=[1,99999]"], "adapter.trainable_tokens"),
        (["adapter.trainable_tokens=[1,1]"], "adapter.trainable_tokens"),
        (["adapter.trainable_tokens=[1]", "adapter.targets=[q_proj,embed_tokens]"], "rows beside embed_tokens"),
        (["checkpoint.load=."], "checkpoint.load"),
        (["optim.groups=[{pattern: 'embed_tokens.*', lr_scale: 2}]"], "optim.groups.0.pattern"),
    ],
)
def test_wrong_input(tmp_path: Path, base: Path, more: list[str], expected: str) -> None:
    """Each is a message that names the key, before anything is trained."""
    from torchft.errors import ConfigError

    with pytest.raises(ConfigError, match=expected.replace("[", r"\[")):
        run(argv(tmp_path / "run", base, "train.steps=2", *more))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_torch_cannot_compile_is_refused(tmp_path: Path, base: Path) -> None:
    """Tensor parallelism, compiled blocks and full recomputation with an adapter; one process of the three goes on."""
    more = ["train.steps=2", "compile.enabled=true", "memory.recompute=full"]
    assert validate(load_recipe("lora_finetune"), argv(tmp_path, base, *more), 1) == []
    problems = validate(load_recipe("lora_finetune"), argv(tmp_path, base, *more, "parallel.tp=2"), 2)
    assert len(problems) == 1 and "memory.recompute" in problems[0]


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, base: Path) -> None:
    """Files whose shapes are another model's don't load."""
    from torchft.errors import TorchftError

    assert (
        run(argv(tmp_path / "a", base, "train.steps=1", "schedule.warmup_steps=0", "schedule.name=constant", "adapter.targets=[q_proj]"))
        == 0
    )
    folder = tmp_path / "a" / "adapter" / "step_00000001"
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 4}))
    with pytest.raises(TorchftError, match="its config says 4"):
        run(argv(tmp_path / "b", base, "train.steps=1", "schedule.warmup_steps=0", f"adapter.path={folder}"))


def test_new_tokens_biases_and_dropout(tmp_path: Path, base: Path) -> None:
    """New tokens train as rows alone, with dropout: 4 steps are 2 and 2 more, bit for bit; the files say what vLLM rejects; the merged
    model, at the end and by hand, has the trained rows, and no other row of the embedding moved."""
    size = read_config(base)[0].vocab_size + 3
    options = [
        "adapter.dropout=0.2",
        f"model.vocab.size={size}",
        "adapter.trainable_tokens=[7]",
        "train.steps=4",
        "schedule.allow_change=true",
    ]
    options += ["schedule.name=constant", "schedule.warmup_steps=0"]
    assert run(argv(tmp_path / "whole", base, *options, "export.hf=true")) == 0
    assert run(argv(tmp_path / "part", base, *options, "train.steps=2")) == 0
    assert run(argv(tmp_path / "part", base, *options)) == 0
    expected, got = adapter_of(tmp_path / "whole", 4), adapter_of(tmp_path / "part", 4)
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    rows = expected["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    config = json.loads(next((tmp_path / "whole" / "adapter").glob("*/adapter_config.json")).read_text())
    assert config["trainable_token_indices"] == {"model.embed_tokens": [7, size - 3, size - 2, size - 1]} and config["lora_dropout"] == 0.2
    assert main(["export", str(tmp_path / "part"), "--out", str(tmp_path / "later")]) == 0
    spec = read_config(tmp_path / "later")[0]
    before = open_weights(base, read_config(base)[0]).tensors["embed_tokens.weight"].read(())
    for folder in (tmp_path / "later", tmp_path / "whole" / "export" / "step_00000004"):
        after = open_weights(folder, spec).tensors["embed_tokens.weight"].read(())
        assert torch.equal(after[[7, -3, -2, -1]], rows) and not torch.equal(after[7], before[7])
        assert torch.equal(after[8:-3], before[8:]) and torch.equal(after[:7], before[:7])


def test_larger_rate_for_b(tmp_path: Path, base: Path) -> None:
    """LoRA+ is a rule of optim.groups: B moves further, A as before in the first step."""
    start = ["train.steps=1", "schedule.name=constant", "schedule.warmup_steps=0", "optim.name=sgd", "optim.max_norm=null"]
    assert run(argv(tmp_path / "plain", base, *start)) == 0
    assert run(argv(tmp_path / "plus", base, *start, "optim.groups=[{pattern: '*.lora_b', lr_scale: 16}]")) == 0
    plain, plus = adapter_of(tmp_path / "plain", 1), adapter_of(tmp_path / "plus", 1)
    for name, tensor in plain.items():
        factor = 16 if "lora_B" in name else 1
        torch.testing.assert_close(plus[name], factor * tensor)


KINDS = [
    ["adapter.dora=true"],
    ["adapter.init=pissa"],
    ["adapter.init=olora", "adapter.dora=true"],
    ["adapter.init=pissa", "precision.params=bf16"],
    ["adapter.modules_to_save=[embed_tokens,norm]", "adapter.dropout=0.1", "precision.compute=bf16"],
]


@pytest.mark.parametrize("kind", KINDS, ids="/".join)
def test_other_adapters_resume_and_merge(tmp_path: Path, base: Path, kind: list[str]) -> None:
    """DoRA and PiSSA: 4 steps and 2 more after a resume are 6, bit for bit; the adapter's files merged by hand, a step of the run
    exported, and export.hf are one model, which differs from the base; a run from the files begins with its loss."""
    steady = ["schedule.allow_change=true", "schedule.name=constant", "schedule.warmup_steps=0", *kind]
    assert run(argv(tmp_path / "whole", base, "train.steps=6", "export.hf=true", *steady)) == 0
    assert run(argv(tmp_path / "part", base, "train.steps=4", *steady)) == 0
    assert run(argv(tmp_path / "part", base, "train.steps=6", *steady)) == 0
    expected, got = adapter_of(tmp_path / "whole", 6), adapter_of(tmp_path / "part", 6)
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    assert any("magnitude" in name for name in got) == ("adapter.dora=true" in kind)
    saved = read_index(tmp_path / "part" / "checkpoints" / "step_00000006" / "model")
    assert saved and all(".lora_" in name and ".lora_start_" not in name for name in saved)
    assert main(["export", str(tmp_path / "whole"), "--out", str(tmp_path / "later")]) == 0
    assert main(["merge", str(tmp_path / "whole" / "adapter" / "step_00000006"), "--out", str(tmp_path / "merged")]) == 0
    spec, before = read_config(base)[0], open_weights(base, read_config(base)[0]).tensors
    folders = [tmp_path / "whole" / "export" / "step_00000006", tmp_path / "later", tmp_path / "merged"]
    first, *others = (open_weights(folder, spec).tensors for folder in folders)
    for name in (name for name in first if name.endswith("_proj.weight")):
        whole = first[name].read(())
        assert (whole - before[name].read(())).norm() > 1e-3 * whole.norm()
        assert all((whole - other[name].read(())).norm() <= 1e-5 * whole.norm() for other in others), name
    options = [
        f"adapter.path={tmp_path / 'whole' / 'adapter' / 'step_00000006'}",
        "train.steps=1",
        "optim.lr=1e-9",
        "schedule.warmup_steps=0",
    ]
    assert run(argv(tmp_path / "again", base, *options, "schedule.warmup_steps=0")) == 0
    assert rows(tmp_path / "again")[0]["loss"] < rows(tmp_path / "whole")[0]["loss"]
