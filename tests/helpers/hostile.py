"""Artifacts that attack whoever loads them, made from good ones; and the process that loads them under an audit hook.

    build(folder) -> {name: Artifact}      python -m tests.helpers.hostile FOLDER < names and kinds > what each did, as JSON

Every trap, if it runs, makes the file PWNED or shows in the interpreter's audit events. The tensors of a checkpoint's artifacts are sealed
again: manifest and hashes agree with the files, as they would if the attacker had made the checkpoint.
"""

import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from tests.helpers.tiny import tiny_llama
from tests.helpers.toys import toy, toy_optimizer, train
from torchft.checkpoint.assets import Assets
from torchft.checkpoint.gguf import GgufFile
from torchft.checkpoint.hf import load_hf, save_hf
from torchft.checkpoint.manifest import MANIFEST, encode_json, hash_file, read_manifest, write_manifest
from torchft.checkpoint.store import CheckpointConfig, Store
from torchft.errors import CheckpointError, TorchftError
from torchft.models.build import read_config
from torchft.models.decoder import build_decoder

PWNED = "pwned"
INERT = ""  # in place of what the error must name: the folder loads, for what attacks is a key that real files have and nothing reads
SECONDS = 20  # an artifact may keep its reader busy for so long
STEP = "step_00000002"
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pty.spawn", "pickle.find_class", "ctypes.dlopen")
FORBIDDEN += ("socket.connect", "socket.getaddrinfo", "urllib.Request", "shutil.rmtree", "shutil.move", "os.chmod", "code.__new__")


@dataclass(frozen=True)
class Artifact:
    """kind: hf, checkpoint or gguf; names: what the error must name; change: makes it out of a good one, in its folder."""

    kind: str
    names: str
    change: Callable[[Path], None]


class Trap:
    """Unpickles to a call."""

    def __init__(self, function: Callable, *args: object):
        self.call = (function, args)

    def __reduce__(self) -> tuple:
        return self.call


def traps() -> list[Trap]:
    return [Trap(os.system, f"touch {PWNED}"), Trap(eval, f"open({PWNED!r}, 'w')"), Trap(exec, f"open({PWNED!r}, 'w')")]


# --- HF folders


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def header(text: str | bytes, data: bytes = b"\0" * 16) -> Callable[[Path], None]:
    """A safetensors file with this header, byte by byte."""
    raw = text.encode() if isinstance(text, str) else text
    return lambda folder: put(weights(folder), struct.pack("<Q", len(raw)) + raw + data)


def put(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def tensor(**fields: object) -> str:
    """One tensor's entry of a header."""
    return json.dumps({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | fields)


def tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        held = load_file(weights(folder))
        change(held)
        save_file(held, weights(folder), metadata={"format": "pt"})

    return apply


def zip_of(content: bytes, name: str = "archive/data.pkl") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return out.getvalue()


def torch_file(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def only_pickle(folder: Path) -> None:
    weights(folder).unlink()
    put(folder / "pytorch_model.bin", torch_file(traps()[0]))


def index(weight_map: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights(folder).rename(folder.parent / "secret.safetensors")
        (folder / "link.safetensors").symlink_to(folder.parent / "secret.safetensors")
        text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
        put(folder / "model.safetensors.index.json", text.encode())

    return apply


def big_header(folder: Path) -> None:
    with weights(folder).open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)


def link_to_zero(folder: Path) -> None:
    weights(folder).unlink()
    weights(folder).symlink_to("/dev/zero")


def config(**keys: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "evil.py").write_text(f"open({PWNED!r}, 'w')")
        put(folder / "config.json", json.dumps(json.loads((folder / "config.json").read_text()) | keys).encode())

    return apply


NORM = "model.norm.weight"
HF = {
    "a pickle under a safetensors name": Artifact("hf", "model.safetensors", lambda d: put(weights(d), pickle.dumps(traps()[0]))),
    "a torch file under a safetensors name": Artifact("hf", "model.safetensors", lambda d: put(weights(d), torch_file(traps()[1]))),
    "a zip bomb under a safetensors name": Artifact("hf", "model.safetensors", lambda d: put(weights(d), zip_of(bytes(50_000_000)))),
    "weights in a pickle": Artifact("hf", "pytorch_model.bin", only_pickle),
    "a header of 200 MB": Artifact("hf", "model.safetensors", big_header),
    "a header of 4 EiB": Artifact("hf", "model.safetensors", lambda d: put(weights(d), struct.pack("<Q", 1 << 62) + b"{}")),
    "no header": Artifact("hf", "model.safetensors", lambda d: put(weights(d), b"\1\2\3")),
    "a deeply nested header": Artifact("hf", "model.safetensors", header('{"a":' + "[" * 50_000 + "]" * 50_000 + "}")),
    "overlapping tensors": Artifact("hf", "model.safetensors", header(f'{{"a":{tensor()},"b":{tensor(data_offsets=[8, 24])}}}', bytes(24))),
    "two tensors in the same bytes": Artifact("hf", "model.safetensors", header(f'{{"a":{tensor()},"b":{tensor()}}}')),
    "a hole between tensors": Artifact(
        "hf", "model.safetensors", header(f'{{"a":{tensor()},"b":{tensor(data_offsets=[20, 36])}}}', bytes(36))
    ),
    "one name twice": Artifact("hf", "model.safetensors", header(f'{{"{NORM}":{tensor()},"{NORM}":{tensor(shape=[2, 2])}}}')),
    "a shape of NaN": Artifact("hf", "model.safetensors", header('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}')),
    "a negative shape": Artifact("hf", "model.safetensors", header(f'{{"a":{tensor(shape=[-4])}}}')),
    "a shape that overflows": Artifact("hf", "model.safetensors", header(f'{{"a":{tensor(shape=[(1 << 62) + 1, 4])}}}')),
    "a shape larger than the bytes": Artifact("hf", "model.safetensors", header(f'{{"a":{tensor(shape=[1 << 40])}}}')),
    "an unknown dtype": Artifact("hf", "model.safetensors", header(f'{{"a":{tensor(dtype="PY")}}}')),
    "truncated weights": Artifact("hf", "model.safetensors", lambda d: put(weights(d), weights(d).read_bytes()[:-9])),
    "weights of integers": Artifact("hf", NORM, tensors(lambda t: t.update({NORM: torch.ones(32, dtype=torch.int64)}))),
    "weights of another shape": Artifact("hf", "norm.weight: (32, 32)", tensors(lambda t: t.update({NORM: torch.ones(32, 32)}))),
    "a weight nobody knows": Artifact("hf", "model.backdoor", tensors(lambda t: t.update({"model.backdoor": torch.ones(4)}))),
    "an index out of the folder": Artifact("hf", "index.json", index({NORM: "../secret.safetensors"})),
    "an index to the root": Artifact("hf", "index.json", index({NORM: "/etc/passwd.safetensors"})),
    "an index to a link": Artifact("hf", "index.json", index({NORM: "link.safetensors"})),
    "an index to a pickle": Artifact("hf", "index.json", index({NORM: "pytorch_model.bin"})),
    "a deeply nested index": Artifact("hf", "index.json", index("[" * 100_000)),
    "an index with a key twice": Artifact("hf", "index.json", index('{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}')),
    "an index that is a list": Artifact("hf", "index.json", index("[1]")),
    "a link to an endless device": Artifact("hf", "model.safetensors", link_to_zero),
    "a config with code": Artifact("hf", INERT, config(auto_map={"AutoModel": "evil.Model"})),
    "a config that wants to be trusted": Artifact("hf", "trust_remote_code", config(trust_remote_code=True)),
    "a config with hub code for attention": Artifact("hf", INERT, config(_attn_implementation_internal="evil/kernel")),
    "a config with a vocabulary of 2^60": Artifact("hf", "vocab_size", config(vocab_size=1 << 60)),
    "a config of NaN": Artifact("hf", "rms_norm_eps", config(rms_norm_eps=float("nan"))),
}


# --- training checkpoints


def seal(folder: Path) -> None:
    """Writes the manifest anew, for the files as they are."""
    manifest = read_manifest(folder)
    files = {path.relative_to(folder).as_posix(): hash_file(path) for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST}
    (folder / MANIFEST).unlink()
    write_manifest(folder, replace(manifest, files=files))


def sealed(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        change(folder)
        seal(folder)

    return apply


def meta(change: Callable[[Metadata], Any]) -> Callable[[Path], None]:
    """model/.metadata with its record changed, or replaced by what `change` returns."""

    def apply(folder: Path) -> None:
        path = folder / "model" / ".metadata"
        record = pickle.loads(path.read_bytes())
        changed = change(record)
        put(path, pickle.dumps(record if changed is None else changed))

    return sealed(apply)


def raw_meta(content: bytes) -> Callable[[Path], None]:
    return sealed(lambda folder: put(folder / "model" / ".metadata", content))


def places(**values: object) -> Callable[[Path], None]:
    return meta(lambda record: [vars(info).update(values) for info in record.storage_data.values()] and None)


def records(content: bytes) -> Callable[[Path], None]:
    """All tensors of model/ are this one record."""

    def apply(folder: Path) -> None:
        put(folder / "model" / "__0_0.distcp", content)
        places(offset=0, length=len(content))(folder)

    return apply


def bomb() -> bytes:
    """A torch file of 100 MB in 100 kB."""
    plain = zipfile.ZipFile(io.BytesIO(torch_file(torch.zeros(25_000_000))))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in plain.infolist():
            archive.writestr(entry.filename, plain.read(entry))
    return out.getvalue()


def state(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        value = json.loads((folder / "state.json").read_text())
        changed = change(value)
        put(folder / "state.json", encode_json(value if changed is None else changed))

    return sealed(apply)


def manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """With its digest made anew."""

    def apply(folder: Path) -> None:
        body = json.loads((folder / MANIFEST).read_text())
        del body["digest"]
        change(body)
        from torchft.checkpoint.manifest import _encode

        put(folder / MANIFEST, _encode(body))

    return apply


def fifo(path: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / path).unlink()
        os.mkfifo(folder / path)

    return apply


def link(path: str, target: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()
        (folder / path).symlink_to(target)

    return apply


def file_entry(name: str, **values: object) -> Callable[[Path], None]:
    return manifest(lambda body: body["files"].update({name: {"size": 1, "sha256": "0" * 64} | values}))


def tensor_entry(**values: object) -> Callable[[Path], None]:
    return manifest(lambda body: body["tensors"]["model"]["mid.weight"].update(values))


METADATA, DATA = "model/.metadata", "model/__0_0.distcp"
CHECKPOINT = {
    **{
        f"an index that calls {trap.call[0].__name__}": Artifact("checkpoint", METADATA, meta(lambda record, trap=trap: trap))
        for trap in traps()
    },
    "a call inside the index": Artifact("checkpoint", METADATA, meta(lambda r: setattr(r, "planner_data", traps()[0]))),
    "an index that imports by name": Artifact("checkpoint", METADATA, raw_meta(b"\x80\x04cos\nsystem\n\x8c\x0btouch pwned\x85R.")),
    "an index that grows the memo": Artifact("checkpoint", METADATA, raw_meta(b"\x80\x04Nr\x00\xe1\xf5\x05.")),
    "an index with a huge text": Artifact("checkpoint", METADATA, raw_meta(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 50) + b"x.")),
    "an index of bytes": Artifact(
        "checkpoint", METADATA, meta(lambda r: r.state_dict_metadata.update({"mid.weight": BytesStorageMetadata()}))
    ),
    "an index to another file": Artifact("checkpoint", METADATA, places(relative_path="../../../../etc/passwd")),
    "an index beyond the file": Artifact("checkpoint", METADATA, places(offset=1 << 60)),
    "an index with a transform": Artifact("checkpoint", METADATA, places(transform_descriptors=["evil"])),
    "a truncated index": Artifact("checkpoint", METADATA, sealed(lambda d: put(d / METADATA, (d / METADATA).read_bytes()[:-40]))),
    "a pickle for a tensor": Artifact("checkpoint", "model", records(torch_file(traps()[0]))),
    "a bare pickle for a tensor": Artifact("checkpoint", DATA, records(pickle.dumps(traps()[1]))),
    "a zip bomb for a tensor": Artifact("checkpoint", DATA, records(bomb())),
    "tensors of another shape": Artifact("checkpoint", "model", records(torch_file(torch.zeros(3)))),
    "a state nested deeply": Artifact("checkpoint", "state.json", sealed(lambda d: put(d / "state.json", b"[" * 200_000))),
    "a state that is a list": Artifact("checkpoint", "state.json", state(lambda s: [1])),
    "a state without optimizer": Artifact("checkpoint", "state.json", state(lambda s: s.pop("optimizer") and None)),
    "a state of another step": Artifact("checkpoint", "state.json", state(lambda s: s.update(step=10**9))),
    "a state of step NaN": Artifact("checkpoint", "state.json", state(lambda s: s.update(step=float("nan")))),
    "an optimizer of another class": Artifact(
        "checkpoint", "optimizer class", state(lambda s: s["optimizer"].update({"class": "os.system"}))
    ),
    "optimizer names that are lists": Artifact(
        "checkpoint", "state.json", state(lambda s: s["optimizer"]["groups"][0].update(names=[["x"]]))
    ),
    "a manifest out of the folder": Artifact("checkpoint", MANIFEST, file_entry("../../secret")),
    "a manifest to the root": Artifact("checkpoint", MANIFEST, file_entry("/etc/passwd")),
    "a manifest with a backslash": Artifact("checkpoint", MANIFEST, file_entry("..\\secret")),
    "a size of NaN": Artifact("checkpoint", MANIFEST, file_entry("state.json", size=float("nan"))),
    "a size of infinity": Artifact("checkpoint", MANIFEST, file_entry("state.json", size=float("inf"))),
    "a size in words": Artifact("checkpoint", MANIFEST, file_entry("state.json", size="12")),
    "a negative size": Artifact("checkpoint", MANIFEST, file_entry("state.json", size=-1)),
    "a manifest with a key twice": Artifact(
        "checkpoint",
        MANIFEST,
        lambda d: put(d / MANIFEST, (d / MANIFEST).read_bytes().replace(b'{\n "config', b'{\n "step": 9,\n "config', 1)),
    ),
    "a manifest nested deeply": Artifact("checkpoint", MANIFEST, lambda d: put(d / MANIFEST, b'{"a":' * 100_000)),
    "a manifest with a strange key": Artifact("checkpoint", MANIFEST, manifest(lambda b: b.update(__class__="os.system"))),
    "a tensor of a strange dtype": Artifact("checkpoint", "mid.weight", tensor_entry(dtype="load")),
    "a tensor of 2^80 elements": Artifact("checkpoint", "mid.weight", tensor_entry(shape=[1 << 40, 1 << 40])),
    "a manifest that is a pipe": Artifact("checkpoint", MANIFEST, fifo(MANIFEST)),
    "a manifest that never ends": Artifact("checkpoint", MANIFEST, link(MANIFEST, "/dev/zero")),
    "a data file that is a pipe": Artifact("checkpoint", DATA, fifo(DATA)),
    "a data file that is a link": Artifact("checkpoint", DATA, link(DATA, "/etc/passwd")),
    "a folder that is a link": Artifact("checkpoint", "model", link("model", "/etc")),
    "a file too many": Artifact("checkpoint", "__9_0.distcp", lambda d: put(d / "model" / "__9_0.distcp", pickle.dumps(traps()[0]))),
}


# --- GGUF


def gguf(*parts: bytes, tensors: int = 0, fields: int = 0) -> Callable[[Path], None]:
    return lambda path: put(path, b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + b"".join(parts))


def gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


KEY = gguf_text("general.architecture")
GGUF = {
    "a pickle under a GGUF name": Artifact("gguf", "m.gguf", lambda path: put(path, pickle.dumps(traps()[0]))),
    "2^60 tensors": Artifact("gguf", "m.gguf", gguf(tensors=1 << 60)),
    "2^60 fields": Artifact("gguf", "m.gguf", gguf(fields=1 << 60)),
    "a name of 2^62 bytes": Artifact("gguf", "m.gguf", gguf(struct.pack("<Q", 1 << 62), fields=1)),
    "an array of 2^40 texts": Artifact("gguf", "m.gguf", gguf(KEY, struct.pack("<IIQ", 9, 8, 1 << 40), fields=1)),
    "arrays in arrays": Artifact("gguf", "m.gguf", gguf(KEY, struct.pack("<I", 9), struct.pack("<IQ", 9, 1) * 50_000, fields=1)),
    "an unknown architecture": Artifact("gguf", "m.gguf", gguf(KEY, struct.pack("<I", 8), gguf_text("os.system"), fields=1)),
}
ARTIFACTS = HF | CHECKPOINT | GGUF


def make_checkpoint(run: Path) -> None:
    parts = toy("plain", 0)
    optimizer = toy_optimizer(parts)
    train(optimizer, 1, 2)
    Store(run / "checkpoints", parts, optimizer, CheckpointConfig(), extra_state=dict).save(2, required=True)


def build(root: Path) -> None:
    """A folder for every artifact, and `good` ones of each kind."""
    spec = tiny_llama(tied=False, num_layers=1)
    save_hf(root / "hf", spec, build_decoder(spec, device="cpu").named_parameters(), Assets())
    make_checkpoint(root / "run")
    for number, artifact in enumerate(ARTIFACTS.values()):
        place = root / str(number)
        if artifact.kind == "hf":
            artifact.change(Path(shutil.copytree(root / "hf", place / "model")))
        elif artifact.kind == "checkpoint":
            shutil.copytree(root / "run", place)
            artifact.change(place / "checkpoints" / STEP)
        else:
            place.mkdir()
            artifact.change(place / "m.gguf")


def load(kind: str, place: Path) -> None:
    """As a run does it; returns if nothing was wrong."""
    if kind == "hf":
        spec, _ = read_config(place / "model")
        load_hf(place / "model", spec, build_decoder(spec, device="cpu").named_parameters())
    elif kind == "checkpoint":
        parts = toy("plain", 1)
        cfg = CheckpointConfig(resume=str(place / "checkpoints" / STEP))
        Store(place / "checkpoints", parts, toy_optimizer(parts), cfg, extra_state=dict).resume()
    else:
        for value in GgufFile(place / "m.gguf").weights().tensors.values():
            value.read(())


def attack(kind: str, place: Path, events: list[str]) -> dict[str, Any]:
    """What loading it did: the error, the forbidden events, memory in MB that it took."""
    events.clear()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(SECONDS)
    outcome, text = "loaded", ""
    try:
        load(kind, place)
    except TorchftError as error:
        outcome, text = "refused", str(error)
    except BaseException as error:
        outcome, text = "crashed", f"{type(error).__name__}: {error}"[:500]
    signal.alarm(0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    return {"outcome": outcome, "text": text, "events": list(events), "grown_mb": grown}


def main(root: Path) -> None:
    os.chdir(root)
    for kind, place in (("hf", root), ("checkpoint", root / "run")):  # imports what loading imports
        if kind == "hf":
            (root / "model").symlink_to(root / "hf")
        load(kind, place)
    try:
        load("gguf", root)
    except CheckpointError:
        import gguf  # noqa: F401
    events: list[str] = []
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError(f"busy for {SECONDS} s")))
    sys.addaudithook(lambda event, args: events.append(f"{event} {args}"[:200]) if is_forbidden(event, args) else None)
    found = {name: attack(one.kind, root / str(number), events) for number, (name, one) in enumerate(ARTIFACTS.items())}
    print(json.dumps({"found": found, "pwned": any(root.rglob(PWNED))}))


def is_forbidden(event: str, args: tuple) -> bool:
    """An event that no reader of weights has reason for."""
    if event == "exec":  # of what is no module's own code; `compile` alone runs nothing, and traceback does it to source lines
        return not args[0].co_filename.endswith(".py") and "frozen" not in args[0].co_filename
    if event == "open":
        return isinstance(args[0], str) and ("passwd" in args[0] or args[0].endswith("secret.safetensors") or "evil" in args[0])
    return event in FORBIDDEN


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
