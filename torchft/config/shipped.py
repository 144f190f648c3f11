"""The recipes and configs that ship with the library, by name: `full_finetune`, `llama3/8b_full`.

    an installed wheel    torchft/recipes, torchft/configs          a checkout    recipes/, configs/ beside torchft/

A path to a file of one's own goes wherever a name does. Imports no torch.
"""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torchft
from torchft.errors import ConfigError, Problem

Kind = Literal["recipe", "config"]
SUFFIX: dict[Kind, str] = {"recipe": ".py", "config": ".yaml"}


@dataclass(frozen=True)
class Shipped:
    """One recipe or config."""

    kind: Kind
    name: str  # full_finetune, llama3/8b_full
    path: Path

    @property
    def summary(self) -> str:
        """The first line of its comment or docstring."""
        first = next((line.strip() for line in self.path.read_text(encoding="utf-8").splitlines() if line.strip()), "")
        return first.strip('#"').strip() if first.startswith(("#", '"""')) else ""


def shipped(kind: Kind) -> list[Shipped]:
    """All of them, by name."""
    folder, suffix = shipped_folder(kind), SUFFIX[kind]
    paths = sorted(folder.rglob(f"*{suffix}"))
    return [Shipped(kind, path.relative_to(folder).as_posix().removesuffix(suffix), path) for path in paths if path.stem != "__init__"]


def shipped_folder(kind: Kind) -> Path:
    """Where they are. Raises ConfigError if they are nowhere, which a damaged installation shows."""
    package = Path(torchft.__file__).parent
    for parent in (package, package.parent):
        if (parent / f"{kind}s").is_dir():
            return parent / f"{kind}s"
    raise ConfigError(Problem(f"{kind}s", f"no folder in {package}", "the folder that ships with torchft", "install torchft again"))


def find_shipped(name: str, kind: Kind | None = None) -> Shipped:
    """What a name means: a file that exists, else a recipe or config by name, with or without suffix. Raises ConfigError.

    kind None: either, a recipe first.
    """
    kinds: tuple[Kind, ...] = ("recipe", "config") if kind is None else (kind,)
    path = Path(name)
    if path.is_file():
        by_suffix = next((k for k in kinds if path.suffix == SUFFIX[k]), kinds[-1])
        return Shipped(by_suffix, path.stem, path)
    known = [one for k in kinds for one in shipped(k)]
    for one in known:
        if name in (one.name, one.name + SUFFIX[one.kind], f"{one.kind}s/{one.name}{SUFFIX[one.kind]}"):
            return one
    close = difflib.get_close_matches(name, [one.name for one in known], n=1, cutoff=0.5)
    fix = (f"did you mean {close[0]}? " if close else "") + "`torchft ls` shows all names"
    raise ConfigError(Problem(" or ".join(kinds), name, "a name that ships with torchft, or an existing file", fix))


def recipe_of(config: Shipped) -> str:
    """The recipe a config is for: the one that its leading comment starts (`recipes/NAME.py`), else full_finetune."""
    lines = config.path.read_text(encoding="utf-8").splitlines()
    comment = [line for line in lines[: next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))]]
    named = re.search(r"recipes/(\w+)\.py|torchft run (\w+)", "\n".join(comment))
    return next(filter(None, named.groups())) if named else "full_finetune"


def copy_out(name: str, dest: Path) -> Path:
    """Copies a recipe or config to `dest`, a file or an existing folder; the file written. Raises ConfigError if it exists."""
    source = find_shipped(name).path
    target = dest / source.name if dest.is_dir() else dest
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            file.write(source.read_bytes())
    except FileExistsError:
        raise ConfigError(Problem("DEST", f"{target} exists", "a file that does not exist yet", "choose another name")) from None
    return target
