"""HF folders: what is read, what is refused, what is written. The files are made here, byte by byte where they are hostile."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.tiny import tiny_llama
from torchft.checkpoint.assets import Assets, read_assets
from torchft.checkpoint.hf import load_hf, open_weights, same_bytes, save_hf
from torchft.checkpoint.tensor_files import INDEX, SINGLE, LazyTensor, open_tensors
from torchft.errors import CheckpointError, ConfigError
from torchft.models.build import read_config
from torchft.models.decoder import Decoder, build_decoder
from torchft.models.init import init_weights

TIED, UNTIED = tiny_llama(tied=True, num_layers=2), tiny_llama(tied=False, num_layers=2)


def model(spec=UNTIED, dtype=torch.float32, seed=0) -> Decoder:
    made = build_decoder(spec, device="cpu", dtype=dtype)
    init_weights(made.named_parameters(), spec, seed)
    return made


def saved(folder: Path, spec=UNTIED, **options) -> Path:
    save_hf(folder, spec, model(spec).named_parameters(), Assets(), **options)
    return folder


def rewrite(folder: Path, change) -> Path:
    """The folder with its tensors changed by `change(dict)`."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / SINGLE)
    return folder


def refused(folder: Path, words: str, spec=UNTIED) -> str:
    """load_hf raises with these words, and not one parameter has changed."""
    target = model(spec, seed=1)
    before = {name: p.detach().clone() for name, p in target.named_parameters()}
    with pytest.raises(CheckpointError, match=words) as error:
        load_hf(folder, spec, target.named_parameters())
    assert all(torch.equal(before[name], p) for name, p in target.named_parameters())
    assert "fix:" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("spec", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 9000, 1])
def test_save_then_load_is_the_identity(tmp_path, spec, shard_bytes):
    """In one file or many: every tensor comes back bit by bit, and shards keep to their size unless one tensor alone is larger."""
    saved(tmp_path / "m", spec, shard_bytes=shard_bytes)
    target = model(spec, seed=1)
    report = load_hf(tmp_path / "m", spec, target.named_parameters())
    expected = dict(model(spec).named_parameters())
    assert all(same_bytes(p.detach(), expected[name].detach()) for name, p in target.named_parameters())
    assert report.num_tensors == len(expected) and report.num_bytes == sum(p.nbytes for p in expected.values())
    assert read_config(tmp_path / "m")[0] == spec
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    assert (len(files) == 1) == (shard_bytes == 1 << 30)
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= shard_bytes
    if len(files) > 1:
        index = json.loads((tmp_path / "m" / INDEX).read_text())
        assert index["metadata"]["total_size"] == report.num_bytes and set(index["weight_map"].values()) == {f.name for f in files}


def test_values_are_cast_to_the_parameters_dtype(tmp_path):
    """fp32 file into a bf16 model and back to an fp32 file: rounded once."""
    folder = saved(tmp_path / "m")
    target = model(dtype=torch.bfloat16, seed=1)
    assert load_hf(folder, UNTIED, target.named_parameters()).dtypes == {"float32": 21}
    expected = dict(model().named_parameters())
    assert all(torch.equal(p, expected[name].bfloat16()) for name, p in target.named_parameters())
    save_hf(tmp_path / "n", UNTIED, target.named_parameters(), Assets(), dtype=torch.float16)
    assert {t.dtype for t in load_file(tmp_path / "n" / SINGLE).values()} == {torch.float16}
    assert json.loads((tmp_path / "n" / "config.json").read_text())["torch_dtype"] == "float16"


def test_a_pipeline_stage_reads_its_own_weights(tmp_path):
    """Only the tensors of its layers are read, and the rest of the folder is checked all the same."""
    folder = saved(tmp_path / "m")
    stage = build_decoder(UNTIED, range(1, 2), first=False, last=True, device="cpu")
    report = load_hf(folder, UNTIED, stage.named_parameters())
    assert report.num_bytes == sum(p.nbytes for p in stage.parameters())
    assert torch.equal(stage.lm_head.weight, model().lm_head.weight)
    rewrite(folder, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"missing \(1\): model.layers.0.mlp.up_proj.weight"):
        load_hf(folder, UNTIED, stage.named_parameters())


def test_missing_extra_and_misshapen_tensors(tmp_path):
    """Never strict=False: each is named with its HF name."""
    folder = saved(tmp_path / "m")
    rewrite(folder, lambda t: t.update({"model.layers.1.mlp.extra.weight": torch.ones(2)}))
    refused(folder, r"unexpected \(1\): model.layers.1.mlp.extra.weight")
    rewrite(folder, lambda t: t.pop("model.layers.1.mlp.extra.weight"))
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(33)}))
    refused(folder, r"norm.weight: \(33,\), expected \(32,\)")
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    refused(folder, "model.norm.weight has dtype I8")
    refused(saved(tmp_path / "tied", TIED), "without lm_head.weight the head may be tied")


def test_a_new_head_may_be_missing(tmp_path):
    """`require_all=False` leaves it as it is and reports it."""
    folder = rewrite(saved(tmp_path / "m"), lambda t: t.pop("lm_head.weight"))
    target = model(seed=1)
    report = load_hf(folder, UNTIED, target.named_parameters(), require_all=False)
    assert report.missing == ("lm_head.weight",) and torch.equal(target.lm_head.weight, model(seed=1).lm_head.weight)
    assert torch.equal(target.norm.weight, model().norm.weight)


def test_a_tied_folder_with_a_second_copy(tmp_path, monkeypatch):
    """An equal lm_head.weight is left out and reported; one that differs in one element, compared block by block, is an error."""
    monkeypatch.setattr("torchft.checkpoint.hf.COMPARE_BYTES", 12 * 32 * 4)  # 12 rows, a divisor of 96
    folder = rewrite(saved(tmp_path / "m", TIED), lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert load_hf(folder, TIED, model(TIED).named_parameters()).dropped == ("lm_head.weight",)
    rewrite(folder, lambda t: t["lm_head.weight"][-1, -1].add_(1))
    refused(folder, "differs from embed_tokens.weight", TIED)
    rewrite(folder, lambda t: t.update({"lm_head.weight": torch.cat([t["model.embed_tokens.weight"]] * 2)}))
    refused(folder, "differs from embed_tokens.weight", TIED)


def test_old_buffers_are_dropped_and_reported(tmp_path):
    """Llama 1 and 2 folders hold rotary_emb.inv_freq."""
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = rewrite(saved(tmp_path / "m"), lambda t: t.update({name: torch.ones(4)}))
    assert load_hf(folder, UNTIED, model().named_parameters()).dropped == (name,)


def sharded(folder: Path) -> tuple[Path, dict]:
    saved(folder, shard_bytes=9000)
    return folder, json.loads((folder / INDEX).read_text())


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../secret.safetensors", "a/b.safetensors", "a\\b.safetensors", "x\0.safetensors", "", "..", ".", "model.bin", 7]
    + ["C:x.safetensors", "link.safetensors", "folder.safetensors", None],
)
def test_a_hostile_index_opens_nothing_outside(tmp_path, name):
    """Absolute, traversal, NUL, backslash, empty, a pickle, a link out, a folder, no string: refused before any file is opened."""
    folder, index = sharded(tmp_path / "m")
    secret = tmp_path / "secret.safetensors"
    save_file({"model.norm.weight": torch.ones(32)}, secret)
    (folder / "link.safetensors").symlink_to(secret)
    (folder / "folder.safetensors").mkdir()
    index["weight_map"]["model.norm.weight"] = name
    (folder / INDEX).write_text(json.dumps(index))
    text = refused(folder, "names a file that won't be opened|lacks 1 of")
    assert str(folder / INDEX) in text or name == 7 or name is None


def test_links_of_the_hub_cache_are_followed(tmp_path):
    """huggingface_hub keeps files in blobs/ and links them from snapshots/; its layout, and no other, is accepted."""
    saved(tmp_path / "real")
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate((tmp_path / "real").iterdir()):
        os.rename(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    target = model(seed=1)
    load_hf(snapshot, UNTIED, target.named_parameters())
    assert all(torch.equal(p, want) for p, want in zip(target.parameters(), model().parameters(), strict=True))


def test_index_and_shards_must_agree(tmp_path):
    """A missing shard, a tensor in another shard, a tensor no index names, a named one no shard holds, both kinds of file."""
    folder, index = sharded(tmp_path / "a")
    shards = sorted(set(index["weight_map"].values()))
    os.rename(folder / shards[1], tmp_path / "away")
    assert shards[1] in refused(folder, f"lacks 1 of {len(shards)} shards")
    os.rename(tmp_path / "away", folder / shards[1])
    moved = {**index["weight_map"], "model.norm.weight": shards[0]}
    for weight_map, words in [
        (moved, "does not place there"),
        ({k: v for k, v in index["weight_map"].items() if k != "model.norm.weight"}, "does not place there"),
        ({**index["weight_map"], "model.ghost": shards[0]}, "names tensors that its shards lack: model.ghost"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ]:
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        refused(folder, words)
    (folder / INDEX).write_text("{")
    with pytest.raises(ConfigError, match=f"{INDEX}:1:2"):
        open_tensors(folder)
    save_file({"a": torch.ones(1)}, folder / SINGLE)
    refused(folder, "holds both")


def test_pickles_are_never_opened(tmp_path):
    """pytorch_model.bin alone: refused with the way out, and it is not even read."""
    folder = saved(tmp_path / "m")
    (folder / SINGLE).unlink()
    refused(folder, "holds no weights")
    bomb = folder / "pytorch_model.bin"
    torch.save({"x": torch.ones(1)}, bomb)
    bomb.chmod(0)
    refused(folder, "never opened here")


@pytest.mark.parametrize(
    "content, words",
    [
        (struct.pack("<Q", 1 << 62) + b"{}", "header of 4611686018427387904 bytes"),
        (struct.pack("<Q", 200_000_000) + b"{}", "header of 200000000 bytes"),
        (b"\x01", "no safetensors file"),
        (b"", "no safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "damaged"),
        (struct.pack("<Q", 8) + b"\xff" * 8, "damaged"),
        (struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,999999]}}'.ljust(60) + b"\0" * 16, "damaged"),
        (struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,16]}}'.ljust(60) + b"\0" * 16, "damaged"),
    ],
)
def test_damaged_files_are_named(tmp_path, content, words):
    """A huge header, a cut file, bad JSON, offsets outside the file, a shape that does not fit its bytes."""
    folder = saved(tmp_path / "m")
    (folder / SINGLE).write_bytes(content)
    assert SINGLE in refused(folder, words)


def test_a_truncated_file_is_found_before_copying(tmp_path):
    """The last byte missing."""
    folder = saved(tmp_path / "m")
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-1])
    refused(folder, "damaged or incomplete")


def test_a_huge_header_is_not_read(tmp_path):
    """200 MB of header in a file that really is that long (sparse) are refused by their length."""
    folder = saved(tmp_path / "m")
    with (folder / SINGLE).open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)
    refused(folder, "at most 100000000")


def test_saving_overwrites_nothing(tmp_path):
    """A folder with a file in it, or a file in its place, is refused; an empty folder is used."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("full", "file"):
        with pytest.raises(CheckpointError, match="exists and is not empty"):
            saved(tmp_path / name)
    (tmp_path / "empty").mkdir()
    saved(tmp_path / "empty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "full"]
    assert (tmp_path / "full" / "precious").read_text() == "x"


@pytest.mark.parametrize("point", ["torchft.checkpoint.tensor_files.save_file", "torchft.checkpoint.hf.write_assets", "os.rename"])
def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch, point):
    """Disk full while writing weights, at the config, at the rename: CheckpointError, no folder, no leftovers."""

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(point, full)
    with pytest.raises(CheckpointError, match="No space left"):
        saved(tmp_path / "m", shard_bytes=9000)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_fails_while_saving_leaves_nothing(tmp_path):
    """A lazily read tensor that can't be read: its own error, and no folder."""

    def broken(_part):
        raise CheckpointError("gone")

    lazy = {name: LazyTensor(tuple(p.shape), p.dtype, broken) for name, p in model().named_parameters()}
    with pytest.raises(CheckpointError, match="gone"):
        save_hf(tmp_path / "m", UNTIED, lazy.items(), Assets())
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_or_adapted_model_is_not_saved(tmp_path):
    """A weight short, or an adapter too many: refused before anything is written."""
    parameters = dict(model().named_parameters())
    short = {name: p for name, p in parameters.items() if name != "norm.weight"}
    for held, words in [(short, "missing .'norm.weight'"), (parameters | {"layers.0.lora_a": torch.ones(1)}, "lora_a")]:
        with pytest.raises(CheckpointError, match=words):
            save_hf(tmp_path / "m", UNTIED, held.items(), Assets())
    assert list(tmp_path.iterdir()) == []


def test_assets_travel_and_a_new_template_is_written_twice(tmp_path):
    """Tokenizer files byte by byte, token ids, generation settings; a template replaces the old one wherever readers look."""
    source = tmp_path / "src"
    saved(source)
    config = json.loads((source / "config.json").read_text()) | {"eos_token_id": [2, 3], "bos_token_id": 1}
    (source / "config.json").write_text(json.dumps(config))
    (source / "generation_config.json").write_text('{"temperature": 0.5, "eos_token_id": 3}')
    (source / "tokenizer.json").write_bytes(b"\x00\xff anything")
    (source / "tokenizer_config.json").write_text('{"chat_template": "old", "x": "\u00e9"}')
    (source / "README.md").write_text("not taken")
    assets = read_assets(source).with_template("new {{ \u00e9 }}")
    save_hf(tmp_path / "dst", UNTIED, model().named_parameters(), assets)
    dst = tmp_path / "dst"
    assert (dst / "tokenizer.json").read_bytes() == b"\x00\xff anything" and not (dst / "README.md").exists()
    assert json.loads((dst / "generation_config.json").read_text()) == {"temperature": 0.5, "eos_token_id": 3, "bos_token_id": 1}
    written = json.loads((dst / "config.json").read_text())
    assert (written["eos_token_id"], written["bos_token_id"], "pad_token_id" in written) == ([2, 3], 1, False)
    assert json.loads((dst / "tokenizer_config.json").read_text()) == {"chat_template": "new {{ \u00e9 }}", "x": "\u00e9"}
    assert (dst / "chat_template.jinja").read_text() == "new {{ \u00e9 }}"
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in dst.iterdir()), "readable by others, as an ordinary file"


def test_nothing_is_read_before_it_is_needed(tmp_path):
    """Opening a folder reads headers alone: weights replaced by zeros afterwards are what a later read gives."""
    folder = saved(tmp_path / "m")
    weights = open_weights(folder, UNTIED)
    content = (folder / SINGLE).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    with (folder / SINGLE).open("r+b") as file:
        file.seek(header)
        file.write(bytes(len(content) - header))
    assert not weights.tensors["embed_tokens.weight"].read(()).any()
