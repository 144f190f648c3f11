"""User code: `plugins: [my_module, my_file.py]` are imported before the config is checked, so that they can add to the tables of names.

    # my_file.py, beside the YAML file that names it
    from torchft.optim.build import OPTIMIZERS
    OPTIMIZERS["mine"] = build_mine

Only the user's own YAML file and command line can name them; nothing read from a checkpoint or a model folder ever does.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

from torchft.config.sources import Layer
from torchft.errors import ConfigError, Problem


def import_plugins(layer: Layer) -> None:
    """Imports the modules (importable names, or paths of .py files). Raises ConfigError naming one that doesn't import."""
    names = layer.tree.get("plugins") or []
    where = layer.origins[("plugins",)].where if ("plugins",) in layer.origins else ""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(Problem("plugins", str(names), "a list of modules or .py files", "write plugins: [my_module]", where))
    layer.tree["plugins"] = [str(Path(name).resolve()) if name.endswith(".py") else name for name in names]
    for name in layer.tree["plugins"]:
        try:
            _import_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
        except Exception as e:
            reason = f"{type(e).__name__}: {e}"
            raise ConfigError(Problem("plugins", name, "a module that imports without error", f"mend it; it raised {reason}", where)) from e


def _import_file(path: Path) -> None:
    name = f"torchft_plugin_{path.stem}"
    if getattr(sys.modules.get(name), "__file__", None) == str(path):
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, f"{path=} is no Python file"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
