"""`torchft doctor`: is this installation fit to train? Versions, devices, cores, memory, disk, the hub, and another project's package.

PyPI's `torchft` is Meta's fault-tolerance package. Ours is distributed as `torchft-llm`, but both own the import name `torchft`:
installed side by side they overwrite each other's files. That, a missing torch or a folder one can't write to, ends with exit 1.
"""

import argparse
import importlib.metadata as metadata
import importlib.util
import json
import os
import platform
import queue
import shutil
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torchft

DISTRIBUTION, OTHER = "torchft-llm", "torchft"
LIBRARIES = ("torchao", "safetensors", "tokenizers", "sentencepiece", "tiktoken", "omegaconf", "huggingface_hub")
OPTIONAL = ("transformers", "gguf", "datasets", "tensorboard", "wandb", "mlflow", "swanlab")
HUB_TIMEOUT_S = 3.0  # name look-up included
MALLOC = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")  # glibc: from which size on blocks go back to the system
LOW_DISK_GIB = 5.0
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    status: Literal["ok", "warning", "error"]
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prints the findings; 1 if any is an error."""
    findings = list(examine())
    failed = any(finding.status == "error" for finding in findings)
    if arguments.json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        for finding in findings:
            mark = "" if finding.status == "ok" else f"{finding.status.upper()}: "
            print(f"{finding.name:<16} {mark}{finding.text}")
    return int(failed)


def examine() -> Iterator[Finding]:
    """All findings, in the order they are printed."""
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield installation()
    yield from torch_findings()
    for library in LIBRARIES:
        version = version_of(library)
        yield Finding(library, "ok" if version else "error", version or f"not installed; fix: pip install {library}")
    for library in OPTIONAL:
        yield Finding(library, "ok", version_of(library) or "not installed (optional)")
    yield from machine(Path.cwd())
    yield allocator()
    if version_of("huggingface_hub"):
        yield hub()


def installation() -> Finding:
    """Whether the import name `torchft` belongs to us alone."""
    ours, other = version_of(DISTRIBUTION), version_of(OTHER)
    if other is not None:
        text = f"the distribution {OTHER} {other} (another project: Meta's fault tolerance) is installed too and owns the same import name"
        fix = f"pip uninstall {OTHER} {DISTRIBUTION}, then install {DISTRIBUTION} again"
        return Finding("torchft", "error", f"{text}; fix: {fix}")
    folder = Path(torchft.__file__).parent
    if ours is None:
        return Finding("torchft", "warning", f"{torchft.__version__} from {folder}, {DISTRIBUTION} is not installed; fix: pip install -e .")
    if ours != torchft.__version__:
        text = f"{DISTRIBUTION} {ours} is installed, but `import torchft` gives {torchft.__version__} from {folder}"
        return Finding("torchft", "error", f"{text}; fix: install again, and look for another torchft earlier on sys.path")
    return Finding("torchft", "ok", f"{ours} from {folder}")


def torch_findings() -> Iterator[Finding]:
    """torch with its devices and communication backends."""
    if importlib.util.find_spec("torch") is None:
        yield Finding("torch", "error", "not installed; fix: pip install torch")
        return
    import torch
    import torch.distributed as dist

    yield Finding("torch", "ok", torch.__version__)
    if torch.cuda.is_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else "missing"
        yield Finding("cuda", "ok", f"{torch.version.cuda}, nccl {nccl}")
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            yield Finding(f"cuda:{i}", "ok", f"{device.name}, {device.total_memory / GIB:.1f} GiB")
    else:
        yield Finding("cuda", "ok", "no device: runs on the CPU")
    gloo = dist.is_available() and dist.is_gloo_available()
    yield Finding("gloo", "ok" if gloo else "warning", "available" if gloo else "missing: no multi-process runs on the CPU")


def machine(folder: Path) -> Iterator[Finding]:
    """Cores, memory, and the folder that runs would be written to."""
    pages = os.sysconf("SC_PAGE_SIZE") / GIB
    total, free = os.sysconf("SC_PHYS_PAGES") * pages, os.sysconf("SC_AVPHYS_PAGES") * pages
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cpu", "ok", f"{os.cpu_count()} cores, {usable} usable by this process")
    yield Finding("memory", "ok", f"{total:.1f} GiB, {free:.1f} GiB unused")
    try:
        with tempfile.TemporaryFile(dir=folder):
            yield Finding("folder", "ok", f"{folder} is writable")
    except OSError as e:
        yield Finding("folder", "error", f"{folder} is not writable ({e}); fix: change to another folder or set output_dir")
    left = shutil.disk_usage(folder).free / GIB
    low = left < LOW_DISK_GIB
    yield Finding("disk", "warning" if low else "ok", f"{left:.1f} GiB free" + (": little for checkpoints" if low else ""))


def allocator() -> Finding:
    """The C library, and who sets its malloc's thresholds: they decide if every step asks the system for its pages again."""
    from torchft.dist import environment

    name, version = platform.libc_ver()
    given = ", ".join(f"{variable}={environment(variable)}" for variable in MALLOC if environment(variable))
    thresholds = f", {given or 'thresholds not set: runs on the CPU raise them'}" if name == "glibc" else ""
    return Finding("malloc", "ok", f"{name or 'C library'} {version}".strip() + thresholds)


def hub() -> Finding:
    """Whether the Hugging Face hub answers; within HUB_TIMEOUT_S, whatever the network does."""
    from huggingface_hub import constants, get_token

    login = "with a token" if get_token() else "no token (only public models)"
    if constants.HF_HUB_OFFLINE:
        return Finding("hub", "ok", "switched off by HF_HUB_OFFLINE: models from the cache or from folders")
    answers: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: answers.put(_ask(constants.ENDPOINT)), daemon=True).start()
    try:
        problem = answers.get(timeout=HUB_TIMEOUT_S)
    except queue.Empty:
        problem = f"no answer in {HUB_TIMEOUT_S:g} s"
    if problem:
        return Finding("hub", "warning", f"{constants.ENDPOINT} can't be reached ({problem}): models from the cache or from folders alone")
    return Finding("hub", "ok", f"{constants.ENDPOINT} answers, {login}")


def _ask(url: str) -> str:
    """Why there is no answer; "" if there is one, be it an error page."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HUB_TIMEOUT_S):
            return ""
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError) as error:  # URLError is an OSError
        return str(getattr(error, "reason", error))


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
