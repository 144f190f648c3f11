"""An environment for each library, from the pinned list beside this file, made once and kept outside the repository.

The lists name direct requirements exactly, torch among them; what else pip chose stands in each environment's freeze.txt.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

from torchft.errors import ConfigError, Problem

REQUIREMENTS = Path(__file__).resolve().parent / "requirements"


def python_of(name: str, folder: Path) -> Path:
    """The interpreter of requirements/<name>.txt, installed into folder/<name> unless that very list was already."""
    requirements = REQUIREMENTS / f"{name}.txt"
    home = folder / name
    python, stamp = home / "bin" / "python", home / "requirements.sha256"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == digest:
        return python
    print(f"Installing {requirements.name} into {home} (once)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    pip = [str(python), "-m", "pip"]
    if subprocess.run([*pip, "install", "--quiet", "-r", str(requirements)], check=False).returncode:
        fix = f"look at pip's message above, or leave this library out by --only; {home} can be deleted"
        raise ConfigError(Problem("environment", str(requirements), "a list that pip can install", fix))
    freeze = subprocess.run([*pip, "freeze"], check=True, capture_output=True, text=True).stdout
    (home / "freeze.txt").write_text(freeze, encoding="utf-8")
    stamp.write_text(digest, encoding="utf-8")
    return python
