"""Build hook: puts recipes/ and configs/ into the wheel as torchft/recipes and torchft/configs, beside the code that runs them.

Not in an editable install: there they would be copies that go stale.
"""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class WheelContents(BuildHookInterface):
    """Adds the two folders to a standard wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            build_data["force_include"].update({"recipes": "torchft/recipes", "configs": "torchft/configs"})
