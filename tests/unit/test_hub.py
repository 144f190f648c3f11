"""Models by hub id, against a hub on this machine: what is fetched, revisions, gated and missing models, offline, publishing."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.families import tiny_spec
from tests.helpers.hub import COMMIT, OLD_COMMIT, Hub, serve
from tests.helpers.tokenizers import make_hf_tokenizer
from torchft.checkpoint.assets import read_assets
from torchft.checkpoint.hf import save_hf
from torchft.checkpoint.hub import is_hub_id
from torchft.models.decoder import build_decoder
from torchft.models.init import init_weights

TOKEN = "hf_" + "c" * 30
OTHER = {"pytorch_model.bin": b"\x80\x04evil", "modeling_x.py": b"raise SystemExit", "original/params.json": b"{}"}
OTHER |= {"consolidated.safetensors": b"twice", "onnx/model.safetensors": b"x", "README.md": b"# hello"}

Torchft = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny exported model."""
    folder, spec = tmp_path_factory.mktemp("model"), tiny_spec("qwen2")
    decoder = build_decoder(spec, device="cpu")
    init_weights(decoder.named_parameters(), spec, 0)
    assets = read_assets(make_hf_tokenizer(folder / "tokenizer"))
    save_hf(folder / "hf", spec, decoder.named_parameters(), assets, dtype=torch.float32)
    return folder / "hf"


@pytest.fixture
def hub(model):
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    with serve({"org/tiny": files | OTHER, "org/closed": files, "org/none": {"README.md": b"-"}}, gated={"org/closed"}) as hub:
        yield hub


@pytest.fixture
def torchft(hub: Hub, tmp_path: Path) -> Torchft:
    """`torchft ...` in a process that knows that hub and an empty cache."""

    def call(*argv: str, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "torchft.cli.main", *argv]
        env = hub.environment(tmp_path / "home", **environment)
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    return call


def test_only_weights_json_and_tokenizer_come(hub, torchft, model):
    """No pickle, no code, no second copy of the weights in another format; the folder is the model, byte for byte."""
    done = torchft("download", "org/tiny")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.name == COMMIT
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in model.iterdir()}
    assert not [asked for asked in hub.requests if any(name in asked for name in (*OTHER, "onnx", "original"))]


def test_a_revision_and_a_folder_of_ones_own(torchft, tmp_path):
    """@v1 is that commit; --to puts plain files there; an unknown revision is named."""
    assert Path(torchft("download", "org/tiny@v1").stdout.strip()).name == OLD_COMMIT
    done = torchft("download", "org/tiny", "--to", str(tmp_path / "mine"))
    assert done.returncode == 0 and (tmp_path / "mine/model.safetensors").is_file() and not (tmp_path / "mine/modeling_x.py").exists()
    done = torchft("download", "org/tiny@v9")
    assert done.returncode != 0 and "no such revision" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "name, words",
    [
        ("org/closed", ("gated model, and no token", "ask for access")),
        ("org/absent", ("no such model on the hub, or a private one and no token", "spelling")),
        ("org/none", ("no safetensors",)),
        ("tiny", ("no hub id", "org/name")),
    ],
)
def test_what_can_not_be_had_is_said(name, words, torchft):
    """Gated, missing, without weights, no id: given, expected, fix; no traceback."""
    done = torchft("download", name)
    assert done.returncode == 2 and all(word in done.stderr for word in (*words, "given", "expected", "fix")), done.stderr
    assert "Traceback" not in done.stderr


def test_offline_what_was_downloaded_is_found(torchft, hub):
    """The cache serves without a network; a model that is not there says how to get it, at once."""
    folder = torchft("download", "org/tiny").stdout
    asked = len(hub.requests)
    assert torchft("download", "org/tiny", HF_HUB_OFFLINE="1").stdout == folder and len(hub.requests) == asked
    done = torchft("download", "org/closed", HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "no complete copy in the cache" in done.stderr and "torchft download org/closed" in done.stderr
    dead = torchft("download", "org/closed", HF_ENDPOINT="http://127.0.0.1:9")
    assert dead.returncode == 2 and "can't be reached" in dead.stderr


def test_a_hub_id_is_a_model_everywhere(torchft, tmp_path, model):
    """convert and generate take it; the same weights come out."""
    done = torchft("convert", "org/tiny", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_folders_come_first(tmp_path, monkeypatch):
    """A folder that exists, or could be misspelt inside one that does, is never asked of the hub."""
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("org/name") and is_hub_id("org/name@v1.0") and is_hub_id("a/b@refs/pr/1")
    (tmp_path / "models").mkdir()
    for path in ("models/absent", "name", "./a/b", "/a/b", "~/a", "a/b/c", "../a", "org/name@", "a/.."):
        assert not is_hub_id(path), path


def test_publishing(torchft, hub, model, tmp_path):
    """Everything of the folder that is the model, nothing that lies beside it; private unless asked; the token is only in the header."""
    (model / "optimizer.pt").write_bytes(b"x")
    done = torchft("push", str(model), "me/mine", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert hub.created["me/mine"]["visibility"] == "private" and f"/me/mine/commit/{COMMIT}" in done.stdout
    sent = hub.pushed["me/mine@main"]
    assert sent == {path.name: path.read_bytes() for path in model.iterdir() if path.name != "optimizer.pt"}
    assert torchft("push", str(model), "me/open@next", "--public", HF_TOKEN=TOKEN).returncode == 0
    assert hub.created["me/open"]["visibility"] == "public" and "me/open@next" in hub.pushed
    assert hub.tokens == {f"Bearer {TOKEN}"} and TOKEN not in done.stdout + done.stderr


def test_publishing_needs_a_token_and_a_model(torchft, hub, model, tmp_path):
    """Without either nothing is made on the hub."""
    done = torchft("push", str(model), "me/mine")
    assert done.returncode == 2 and "no token" in done.stderr and "hf auth login" in done.stderr
    done = torchft("push", str(tmp_path), "me/mine", HF_TOKEN=TOKEN)
    assert done.returncode == 2 and "nothing to publish" in done.stderr and not hub.created
