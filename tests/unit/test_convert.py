"""`torchft convert`: each kind of source to a HF folder, verified; wrong input ends with 2 and a way out."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.gguf_files import write
from tests.helpers.tiny import tiny_llama
from torchft.checkpoint import convert
from torchft.checkpoint.assets import Assets
from torchft.checkpoint.hf import save_hf
from torchft.checkpoint.manifest import hash_weights
from torchft.checkpoint.store import CheckpointConfig, Store
from torchft.cli.main import main
from torchft.models.decoder import Decoder, build_decoder
from torchft.models.init import init_weights

SPEC = tiny_llama(num_layers=2)


def model(seed: int = 0) -> Decoder:
    made = build_decoder(SPEC, device="cpu")
    init_weights(made.named_parameters(), SPEC, seed)
    return made


@pytest.fixture
def folder(tmp_path) -> Path:
    """A HF folder with a tokenizer file."""
    save_hf(tmp_path / "hf", SPEC, model().named_parameters(), Assets({"eos_token_id": 2}, {}, {"tokenizer.json": b"tok"}))
    return tmp_path / "hf"


def test_hf_to_hf_is_the_same_folder(folder, tmp_path, capsys):
    """File by file."""
    assert main(["convert", str(folder), str(tmp_path / "out"), "--verify"]) == 0
    assert "20 tensors equal byte for byte; logits of a 32-token prompt: max |difference| 0\n" in capsys.readouterr().out
    before, after = ({p.name: p.read_bytes() for p in path.iterdir()} for path in (folder, tmp_path / "out"))
    assert before == after


def test_dtype_and_shards(folder, tmp_path, capsys):
    """bf16, in files of at most 20 kB; the summary says what the cast costs."""
    size = 20_000
    args = [str(folder), str(tmp_path / "out"), "--verify", "--dtype", "bf16", "--shard-size", str(size / 2**30)]
    assert main(["convert", *args]) == 0
    out = capsys.readouterr().out
    assert "20 tensors equal byte for byte (cast to torch.bfloat16)" in out and "max |difference| 0\n" not in out
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 and all(sum(t.nbytes for t in load_file(f).values()) <= size for f in files)


def test_gguf(tmp_path, capsys):
    """With the tokenizer of another folder, since this file has none; without it the way out is told."""
    write(tmp_path / "m.gguf", SPEC)
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    assert main(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "out")]) == 2
    assert "--tokenizer FOLDER" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "out"), "--verify", "--tokenizer", str(tmp_path / "tok")]) == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensors[f"model.{name}"], p) for name, p in model().named_parameters())
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


class OneProcess:
    """What the store needs to know of a model."""

    def __init__(self, trained: Decoder, trainable: frozenset[str]):
        self.trained, self.trainable = trained, trainable

    def named_parameters(self, copies: bool = False):
        yield from self.trained.named_parameters()


def train(run: Path, base: Path, frozen: str = "") -> Decoder:
    """A run of one step from `base` with a checkpoint; the trained model. `frozen`: prefix of the parameters left alone."""
    trained = model(seed=0)
    names = frozenset(name for name, _ in trained.named_parameters() if not frozen or not name.startswith(frozen))
    parts = OneProcess(trained, names)
    groups = [
        {
            "params": [p for n, p in trained.named_parameters() if n in names],
            "names": sorted(names, key=list(dict(trained.named_parameters())).index),
        }
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for _, p in trained.named_parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    recorded = {"path": str(base), "sha256": hash_weights(base)} if frozen else None
    config = CheckpointConfig(every_steps=1)
    Store(run / "checkpoints", parts, optimizer, config, extra_state=dict, base=recorded).save(1, required=True)
    (run / "config.yaml").write_text(f"model: {{path: {json.dumps(str(base))}}}")
    return trained


@pytest.mark.parametrize("frozen", ["", "layers.0."])
def test_training_checkpoint(folder, tmp_path, frozen):
    """The trained weights, with frozen ones, config and tokenizer from the base that the run names."""
    trained = train(tmp_path / "run", folder, frozen)
    (step,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    assert main(["convert", str(step), str(tmp_path / "out"), "--verify"]) == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensors[f"model.{name}"], p) for name, p in trained.named_parameters())
    assert not torch.equal(trained.norm.weight, model().norm.weight)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"tok"


def test_training_checkpoint_without_a_usable_base(folder, tmp_path, capsys):
    """A base that moved: --base; a base that is another model's: refused; a damaged checkpoint: refused."""
    train(tmp_path / "run", folder, "layers.0.")
    (step,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    moved = folder.rename(tmp_path / "moved")
    args = [str(step), str(tmp_path / "out")]
    assert main(["convert", *args]) == 2
    assert "--base HF_FOLDER" in capsys.readouterr().err
    tensors = load_file(moved / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}, moved / "model.safetensors")
    assert main(["convert", *args, "--base", str(moved)]) == 2
    assert "not the base it was trained on" in capsys.readouterr().err
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    data = next((step / "model").glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert main(["convert", *args, "--base", str(moved)]) == 2
    assert "is damaged" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_verify_sees_a_changed_tensor(folder, tmp_path, monkeypatch, capsys):
    """A writer that changes one element of one tensor is caught."""
    write_all = convert.save_hf

    def careless(dst, *args, **options):
        write_all(dst, *args, **options)
        tensors = load_file(dst / "model.safetensors")
        tensors["model.norm.weight"][3] += 1e-6
        save_file(tensors, dst / "model.safetensors")

    monkeypatch.setattr(convert, "save_hf", careless)
    assert main(["convert", str(folder), str(tmp_path / "a")]) == 0
    assert main(["convert", str(folder), str(tmp_path / "b"), "--verify"]) == 2
    assert "norm.weight differs from its source" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind, words",
    [
        ("missing", "did you mean hf"),
        ("target exists", "exists and is not empty"),
        ("pickle", "never opened"),
        ("family", "one of"),
        ("key", "did you mean"),
    ],
)
def test_wrong_input_ends_with_2_and_says_what_to_do(folder, tmp_path, capsys, kind, words):
    """No traceback, nothing written."""
    src, dst = folder, tmp_path / "out"
    if kind == "missing":
        src = tmp_path / "hff"
    elif kind == "target exists":
        dst = folder
    elif kind == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    else:
        config = json.loads((folder / "config.json").read_text()) | ({"model_type": "bert"} if kind == "family" else {"rope_scalling": {}})
        (folder / "config.json").write_text(json.dumps(config))
    before = sorted(p.name for p in tmp_path.rglob("*"))
    assert main(["convert", str(src), str(dst)]) == 2
    err = capsys.readouterr().err
    assert words in err and "fix:" in err and "Traceback" not in err
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
