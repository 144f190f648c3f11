"""Errors for users. Each says what was given, what was expected and how to mend it; all are printed without a traceback.

A component that checks its own config yields `Problem`s; whoever collects them raises one `ConfigError` with all of them.
The exit codes are those of the process (docs/config.md).
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a config. `key` is written as the user types it (`parallel.tp`)."""

    key: str
    given: str
    expected: str
    fix: str
    where: str = ""  # "configs/my.yaml:12" or "command line"; filled by config/load.py when empty

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        return f"{self.key}{place}\n  given:    {self.given}\n  expected: {self.expected}\n  fix:      {self.fix}"


class TorchftError(Exception):
    """Base of the errors a user can mend; recipes print it and exit with `exit_code`."""

    exit_code = 1


class ConfigError(TorchftError):
    """The config (YAML, command line) can't be run. Holds every problem found, not just the first."""

    exit_code = 2

    def __init__(self, problems: str | Problem | Iterable[Problem]):
        if isinstance(problems, str):
            self.problems: tuple[Problem, ...] = ()
            text = problems
        else:
            self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
            text = "\n".join(map(str, self.problems))
        super().__init__(text)


class DataError(TorchftError):
    """A data file, a record, a tokenizer or a template can't be used; the message names file, line and column."""

    exit_code = 2


class CheckpointError(TorchftError):
    """A checkpoint or a weights folder is missing, damaged, hostile or of another model."""

    exit_code = 2


class NumericError(TorchftError):
    """Loss, gradients or weights were not finite and the policy said stop; `samples` are those to look at."""

    exit_code = 79

    def __init__(self, text: str, samples: Iterable[str] = ()):
        super().__init__(text)
        self.samples = tuple(samples)


class OutOfMemory(TorchftError):
    """The model, a micro-batch or something else did not fit."""

    exit_code = 78


class RankLost(TorchftError):
    """Another rank hangs or is dead, so a collective timed out or lost its connection."""

    exit_code = 80


class NotRestarted(TorchftError):
    """A launcher restarts a run whose end another attempt would meet again; `exit_code` is that end's."""

    def __init__(self, text: str, exit_code: int):
        super().__init__(text)
        self.exit_code = exit_code


class CrashLoop(TorchftError):
    """A run that a launcher restarts again and again dies at the same step each time."""

    exit_code = 81
