"""Where `peft` takes module selection from: torchft/models/select.py."""

from torchft.models.select import matches, select_modules

__all__ = ["matches", "select_modules"]
