"""Methods that are no LoRA, and LoRA-FA and LoftQ, through the recipe on the debug model: what is saved, resumed, merged, and refused."""

from pathlib import Path

import pytest
import torch

from tests.helpers.dist import run_dist
from tests.helpers.models import make_model
from tests.helpers.recipe import rows
from tests.recipes.test_lora_recipe import adapter_of, argv, run
from torchft.checkpoint.hf import open_weights
from torchft.checkpoint.reader import read_index
from torchft.checkpoint.tensor_files import open_file
from torchft.cli.main import main
from torchft.errors import ConfigError
from torchft.models.build import read_config
from torchft.peft.linear import is_adapter

STEADY = ["schedule.allow_change=true", "schedule.name=constant", "schedule.warmup_steps=0", "optim.lr=1e-2"]
MERGED = {
    "ia3": ["adapter.method=ia3"],
    "vera": ["adapter.method=vera", "adapter.vera.rank=8", "adapter.vera.seed=4", "adapter.vera.d_initial=0.2"],
    "oft": ["adapter.method=oft", "adapter.oft.block_size=8", "adapter.oft.neumann_terms=0"],
    "lora_fa": ["adapter.lora_fa=projected", "adapter.dora=true"],
}
VIRTUAL = {
    "prompt": ["adapter.method=prompt", "adapter.prompt.num_tokens=4"],
    "p_tuning": ["adapter.method=p_tuning", "adapter.p_tuning.num_tokens=4", "adapter.p_tuning.hidden_size=16"],
    "prefix": ["adapter.method=prefix", "adapter.prefix.num_tokens=4", "data.packing=false"],
}
FULL = pytest.mark.full  # what another of them shows too


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "hf", seed=5)


@pytest.mark.parametrize(
    "kind", ["ia3", pytest.param("vera", marks=FULL), "oft", "lora_fa", "prompt", pytest.param("p_tuning", marks=FULL), "prefix"]
)
def test_resumes_merges_and_goes_on(tmp_path: Path, base: Path, kind: str) -> None:
    """2 steps and 2 more after a resume are 4, bit for bit; a checkpoint holds the adapter alone. What a weight can carry: the adapter's
    files merged by hand, a step exported, and export.hf are one model, not the base. A run from the files begins with their loss."""
    method, merges = (MERGED | VIRTUAL)[kind], kind in MERGED
    assert run(argv(tmp_path / "whole", base, "train.steps=4", f"export.hf={str(merges).lower()}", *method, *STEADY)) == 0
    assert run(argv(tmp_path / "part", base, "train.steps=2", *method, *STEADY)) == 0
    assert run(argv(tmp_path / "part", base, "train.steps=4", *method, *STEADY)) == 0
    expected, got = adapter_of(tmp_path / "whole", 4), adapter_of(tmp_path / "part", 4)
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    saved = read_index(tmp_path / "part" / "checkpoints" / "step_00000004" / "model")
    assert saved and all(is_adapter(name) and not name.endswith("lora_a") for name in saved)
    folder = tmp_path / "whole" / "adapter" / "step_00000004"
    if kind != "p_tuning":  # its file has no MLP to go on with
        again = ["train.steps=1", f"adapter.path={folder}", "schedule.warmup_steps=0"]
        assert run(argv(tmp_path / "again", base, *again, *(["data.packing=false"] if kind == "prefix" else []))) == 0
        assert rows(tmp_path / "again")[0]["loss"] < rows(tmp_path / "whole")[0]["loss"]
    if not merges:
        assert main(["merge", str(folder), "--out", str(tmp_path / "merged")]) != 0
        return
    assert main(["export", str(tmp_path / "whole"), "--out", str(tmp_path / "later")]) == 0
    assert main(["merge", str(folder), "--out", str(tmp_path / "merged")]) == 0
    spec, before = read_config(base)[0], open_weights(base, read_config(base)[0]).tensors
    folders = [tmp_path / "whole" / "export" / "step_00000004", tmp_path / "later", tmp_path / "merged"]
    first, *others = (open_weights(folder, spec).tensors for folder in folders)
    changed = 0
    for name, weight in ((name, tensor.read(())) for name, tensor in first.items()):
        changed += not torch.equal(weight, before[name].read(()))
        assert all((weight - other[name].read(())).norm() <= 1e-5 * weight.norm() for other in others), name
    assert changed == len({name.rpartition(".")[0] for name in saved})


def test_loftq_begins_nearer_to_the_original(tmp_path: Path, base: Path) -> None:
    """On an NF4 base the first loss with LoftQ is nearer to the base's in full precision than without; 1 step and 1 more are 2."""
    nf4 = ["quant.format=nf4", "quant.block_size=32", "train.steps=2", *STEADY]
    assert run(argv(tmp_path / "plain", base, "train.steps=1", *STEADY)) == 0
    assert run(argv(tmp_path / "nf4", base, *nf4)) == 0
    assert run(argv(tmp_path / "loftq", base, *nf4, "adapter.init=loftq", "adapter.rank=32", "adapter.alpha=96")) == 0
    plain, coarse, nearer = (rows(tmp_path / name)[0]["loss"] for name in ("plain", "nf4", "loftq"))
    assert abs(nearer - plain) < 0.5 * abs(coarse - plain)
    halves = [*nf4, "adapter.init=loftq", "adapter.rank=32", "adapter.alpha=96"]
    assert run(argv(tmp_path / "part", base, *halves, "train.steps=1")) == 0
    assert run(argv(tmp_path / "part", base, *halves)) == 0
    expected, got = adapter_of(tmp_path / "loftq", 2), adapter_of(tmp_path / "part", 2)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_llama_pro_makes_a_whole_model(tmp_path: Path, base: Path) -> None:
    """2 steps and 2 more are 4, bit for bit; a checkpoint holds the new blocks alone; the exported model has them between the old ones,
    which are the base's byte for byte; `torchft export` of the checkpoint gives the same."""
    method = ["adapter.method=llama_pro", "adapter.llama_pro.num_new=2", *STEADY]
    assert run(argv(tmp_path / "whole", base, "train.steps=4", *method)) == 0
    assert run(argv(tmp_path / "part", base, "train.steps=2", *method)) == 0
    assert run(argv(tmp_path / "part", base, "train.steps=4", *method)) == 0
    folders = [tmp_path / name / "export" / "step_00000004" for name in ("whole", "part")]
    assert main(["export", str(tmp_path / "whole"), "--out", str(tmp_path / "later")]) == 0
    spec = read_config(folders[0])[0]
    first, *others = (open_weights(folder, spec).tensors for folder in [*folders, tmp_path / "later"])
    assert spec.num_layers == 4 and all(torch.equal(first[n].read(()), other[n].read(())) for other in others for n in first)
    saved = read_index(tmp_path / "part" / "checkpoints" / "step_00000004" / "model")
    assert {name.split(".")[1] for name in saved} == {"1", "3"}
    before = open_weights(base, read_config(base)[0]).tensors
    for name, tensor in before.items():
        now = name.replace("layers.1.", "layers.2.")
        assert torch.equal(tensor.read(()), first[now].read(()))
    assert rows(tmp_path / "whole")[-1]["loss"] < rows(tmp_path / "whole")[0]["loss"]
    assert not (tmp_path / "whole" / "adapter").exists()


def test_eva_starts_once_for_every_layout(tmp_path: Path, base: Path) -> None:
    """What EVA finds is a file of the run: 2 steps and 2 more are 4, bit for bit, and two ranks start from the same; ranks are dealt anew
    and their sum stays; export and merge agree."""
    eva = ["adapter.init=eva", "adapter.rank=4", "adapter.eva.batches=3", *STEADY]
    assert run(argv(tmp_path / "whole", base, "train.steps=4", "export.hf=true", *eva)) == 0
    assert run(argv(tmp_path / "part", base, "train.steps=2", *eva)) == 0
    assert run(argv(tmp_path / "part", base, "train.steps=4", *eva)) == 0
    assert run_dist(run, 2, argv(tmp_path / "two", base, "train.steps=1", *eva)) == [0, 0]
    expected, got = adapter_of(tmp_path / "whole", 4), adapter_of(tmp_path / "part", 4)
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    files = [tmp_path / name / "adapter" / "start" / "adapter_model.safetensors" for name in ("whole", "two")]
    one, two = (open_file(path) for path in files)
    assert all(torch.equal(one[name].read(()), two[name].read(())) for name in one | two)
    ranks = [tensor.shape[0] for name, tensor in one.items() if "lora_A" in name]
    assert len(set(ranks)) > 1 and sum(ranks) == 4 * 14
    assert main(["merge", str(tmp_path / "whole" / "adapter" / "step_00000004"), "--out", str(tmp_path / "merged")]) == 0
    spec = read_config(base)[0]
    first, other = (open_weights(tmp_path / folder, spec).tensors for folder in ("whole/export/step_00000004", "merged"))
    assert all((first[name].read(()) - other[name].read(())).norm() <= 1e-5 * first[name].read(()).norm() for name in first)


@pytest.mark.parametrize(
    "more, expected",
    [
        (["adapter.method=ia3", "adapter.rank=4"], "adapter.rank"),
        (["adapter.ia3.outputs=[q_proj]"], "adapter.ia3"),
        (["adapter.method=ia3", "adapter.ia3.outputs=[down_proj]"], "adapter.ia3.inputs"),
        (["adapter.method=ia3", "adapter.ia3.outputs=[nothing]"], "adapter.ia3.outputs"),
        (["adapter.method=vera", "adapter.vera.rank=0"], "adapter.vera.rank"),
        (["adapter.method=oft", "adapter.oft.block_size=7"], "adapter.oft.block_size"),
        (["adapter.method=oft", "adapter.oft.neumann_terms=2"], "adapter.oft.neumann_terms"),
        (["adapter.method=prompt", "export.hf=true"], "export.hf"),
        (["adapter.method=prompt", "adapter.prompt.num_tokens=256"], "data.seq_len"),
        (["adapter.method=prefix", "train.neftune=5"], "train.neftune"),
        (["adapter.init=loftq"], "adapter.init"),
        (["adapter.init=eva", "model.init=random"], "adapter.init"),
        (["adapter.init=eva", "adapter.eva.rho=0.5"], "adapter.eva.rho"),
        (["adapter.eva.rho=3"], "adapter.eva"),
        (["adapter.method=llama_pro", "adapter.llama_pro.num_new=3"], "adapter.llama_pro.num_new"),
        (["adapter.method=llama_pro", "adapter.llama_pro.num_new=1", "quant.format=nf4"], "quant.format"),
        (["adapter.init=pissa", "adapter.lora_fa=plain"], "adapter.init"),
    ],
)
def test_wrong_input(tmp_path: Path, base: Path, more: list[str], expected: str) -> None:
    """Each is a message that names the key, before anything is trained."""
    with pytest.raises(ConfigError, match=expected):
        run(argv(tmp_path / "run", base, "train.steps=2", *more))
    assert not (tmp_path / "run" / "checkpoints").exists()
