"""Recipes as modules: `load_recipe(path)` gives what the file defines, `Config` and `main(argv)` among it.

A recipe is a file of its own, no part of a package: the user's copy works as the one that ships.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from torchft.errors import ConfigError, Problem


def load_recipe(path: Path) -> ModuleType:
    """Imports a recipe's file. Raises ConfigError if it is none: no `Config`, no `main`."""
    name = f"torchft_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, f"{path=} is no Python file"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    if not hasattr(module, "Config") or not hasattr(module, "main"):
        raise ConfigError(
            Problem("recipe", str(path), "a file that defines Config and main(argv)", "start from `torchft cp full_finetune`")
        )
    return module
