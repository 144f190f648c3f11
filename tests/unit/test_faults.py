"""Faults fire where and when they are told to, and never otherwise."""

import time

import pytest

from torchft.errors import ConfigError
from torchft.faults import InjectedFault, fire


def test_unarmed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the variable nothing happens."""
    monkeypatch.delenv("TORCHFT_FAULT", raising=False)
    fire("step", step=1)


def test_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Point, step, rank and attempt must all match; a second fault of the list counts as well."""
    monkeypatch.setenv("TORCHFT_FAULT", "raise:step:step=3:rank=0:attempt=0, raise:save.mid_data")
    fire("step", step=2)
    fire("step")
    fire("save.before_data", step=3)
    with pytest.raises(InjectedFault):
        fire("step", step=3)
    with pytest.raises(InjectedFault):
        fire("save.mid_data")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    fire("step", step=3)
    monkeypatch.setenv("TORCHFT_FAULT", "raise:step:rank=1")
    fire("step", step=3)


def test_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """sleep takes its seconds."""
    monkeypatch.setenv("TORCHFT_FAULT", "sleep:step:seconds=0.05")
    start = time.monotonic()
    fire("step")
    assert time.monotonic() - start >= 0.05


@pytest.mark.parametrize("text", ["kil:step", "kill:save.middle", "kill", "kill:step:rank", "raise:step,"])
def test_misspelt(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A fault that could never fire is an error, not a test that passes."""
    monkeypatch.setenv("TORCHFT_FAULT", text)
    with pytest.raises(ConfigError, match="TORCHFT_FAULT"):
        fire("step")
