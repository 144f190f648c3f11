"""The manifest finds and names every changed, cut, missing and added file."""

import random
from pathlib import Path

import pytest

from tests.helpers.toys import toy, toy_optimizer, train
from torchft.checkpoint.manifest import MANIFEST, FileInfo, Manifest, TensorInfo, hash_file, read_manifest, verify, write_manifest
from torchft.checkpoint.store import CheckpointConfig, Store
from torchft.errors import CheckpointError

FILES = ["manifest.json", "state.json", *(f"{part}/{name}" for part in ("model", "optimizer") for name in (".metadata", "__0_0.distcp"))]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A real checkpoint of one process."""
    parts = toy("plain", 0)
    optimizer = toy_optimizer(parts)
    train(optimizer, 1, 2)
    return Store(tmp_path, parts, optimizer, CheckpointConfig(), extra_state=dict, mesh={"dp_shard": 1}).save(2, required=True)


def test_a_new_checkpoint_is_good(checkpoint: Path) -> None:
    """The layout is the documented one, and both checks pass."""
    assert sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()) == sorted(FILES)
    assert verify(checkpoint, "quick") == verify(checkpoint, "full") == []
    manifest = read_manifest(checkpoint)
    assert (manifest.step, manifest.world_size, manifest.mesh) == (2, 1, {"dp_shard": 1})
    assert manifest.tensors["model"]["mid.weight"] == TensorInfo((9, 6), "float32")
    assert manifest.tensors["optimizer"]["mid.weight.step"] == TensorInfo((), "float32")


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_found(checkpoint: Path, name: str) -> None:
    """A bit flipped anywhere in any file, the manifest's own white space and digest included, is found and the file named, once."""
    path = checkpoint / name
    content = path.read_bytes()
    draw = random.Random(name)
    for at in {0, len(content) - 1, *(draw.randrange(len(content)) for _ in range(120))}:
        flipped = bytearray(content)
        flipped[at] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        problems = verify(checkpoint, "full")
        assert len(problems) == 1 and problems[0].startswith(f"{path}: "), (at, problems)
    path.write_bytes(content)
    assert verify(checkpoint, "full") == []


@pytest.mark.parametrize("name", FILES)
def test_quick_finds_changed_sizes(checkpoint: Path, name: str) -> None:
    """A byte cut from or added to any file, and a missing file, are found without hashing."""
    path = checkpoint / name
    content = path.read_bytes()
    for changed in (content[:-1], content + b"\n", b""):
        path.write_bytes(changed)
        for how in ("quick", "full"):
            assert [problem.partition(": ")[0] for problem in verify(checkpoint, how)] == [str(path)]
    path.unlink()
    assert [problem.partition(": ")[0] for problem in verify(checkpoint, "quick")] == [str(path)]


def test_extra_files_links_and_swapped_shards_are_named(checkpoint: Path, tmp_path: Path) -> None:
    """A file nobody wrote, a link in place of a file, and two files in each other's place."""
    extra = checkpoint / "model" / "__7_0.distcp"
    extra.write_bytes(b"x")
    assert verify(checkpoint, "quick") == [f"{extra}: not in the manifest"]
    extra.unlink()
    state = checkpoint / "state.json"
    state.rename(tmp_path / "elsewhere")
    state.symlink_to(tmp_path / "elsewhere")
    assert verify(checkpoint, "quick") == [f"{state}: missing, or not a plain file"]
    state.unlink()
    (tmp_path / "elsewhere").rename(state)
    first, second = (checkpoint / part / ".metadata" for part in ("model", "optimizer"))
    first.rename(tmp_path / "held")
    second.rename(first)
    (tmp_path / "held").rename(second)
    assert sorted(problem.partition(": ")[0] for problem in verify(checkpoint, "full")) == sorted(map(str, (first, second)))


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a/../../b", "a\\b", "a\0b", "", "a//b", ".", "model/.."])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    """A manifest, digest and all, with such a file name is no manifest."""
    write_manifest(tmp_path, Manifest(1, 0, 1, {}, "", {}, None, {}, {name: FileInfo(1, "0")}))
    with pytest.raises(CheckpointError, match="leaves the checkpoint"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"\xff", b'{"digest": 1}', b"[" * 100_000])
def test_no_manifest_at_all(tmp_path: Path, content: bytes) -> None:
    """Whatever stands in manifest.json, the answer is CheckpointError with its path."""
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest.json: damaged"):
        read_manifest(tmp_path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    """A newer format says so instead of failing on its fields."""
    write_manifest(tmp_path, Manifest(1, 0, 1, {}, "", {}, None, {}, {}, format=2))
    with pytest.raises(CheckpointError, match="format 2; this version reads format 1"):
        read_manifest(tmp_path)
    assert hash_file(tmp_path / MANIFEST).size > 0
