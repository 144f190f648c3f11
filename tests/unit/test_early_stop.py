"""Early stopping by hand-made metrics: patience, min_delta, mode, state."""

import pytest

from torchft.errors import ConfigError
from torchft.train.early_stop import EarlyStop, EarlyStopConfig


def run(values: list[float], **cfg) -> list[bool]:
    stop = EarlyStop(EarlyStopConfig(metric="val/a/loss", **cfg))
    return [stop.note({"val/a/loss": value}) for value in values]


def test_patience_counts_validations_without_a_better_value() -> None:
    """Over at the patience-th value in a row that is not better; a better one starts the count anew; NaN is never better."""
    assert run([3, 2, 2, 2.5], patience=2) == [False, False, False, True]
    assert run([3, 4, 2, 4, 4], patience=2) == [False, False, False, False, True]
    assert run([float("nan"), float("nan")], patience=2) == [False, True]


def test_min_delta_and_mode() -> None:
    """A gain of min_delta or less is none; under max a larger value is better."""
    assert run([3, 2.75, 2.5], patience=2, min_delta=0.5) == [False, False, True]
    assert run([3, 2.75, 2.25], patience=2, min_delta=0.5) == [False, False, False]
    assert run([1, 2, 1], patience=1, mode="max") == [False, False, True]


def test_state_and_missing_metric() -> None:
    """A restored one goes on counting; without a metric nothing ever stops; a metric that is not there is named."""
    first = EarlyStop(EarlyStopConfig(metric="val/a/loss", patience=2))
    assert [first.note({"val/a/loss": v}) for v in (1.0, 2.0)] == [False, False]
    second = EarlyStop(EarlyStopConfig(metric="val/a/loss", patience=2))
    second.load_state(first.state())
    assert second.note({"val/a/loss": 2.0}) and second.is_over
    assert not EarlyStop(EarlyStopConfig()).note({"val/a/loss": 1.0})
    with pytest.raises(ConfigError, match="val/b/loss"):
        first.note({"val/b/loss": 1.0})
    assert [p.key for p in EarlyStopConfig(patience=0, min_delta=-1).check()] == [
        "validate.early_stop.patience",
        "validate.early_stop.min_delta",
    ]
