"""A source's `columns` and `roles`: the data's own names for what a format calls otherwise, put right before the format reads a record.

columns: {instruction: question, from: speaker}    roles: {USER: user, BOT: assistant}
{"question": "a"} -> {"instruction": "a"}          [{"speaker": "BOT", ...}] -> [{"from": "assistant", ...}]
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torchft.data.turns import ROLES, list_keys
from torchft.errors import DataError, Problem

RECORD_KEYS = (
    *("instruction", "input", "output", "system", "history", "conversations", "messages", "conversation", "tools"),
    *("prompt", "completion", "text", "chosen", "rejected", "label"),
)
MESSAGE_KEYS = ("from", "value", "role", "content", "tool_calls", "human", "assistant")
LISTS = ("conversations", "messages", "conversation", "prompt", "completion", "chosen", "rejected")  # where a record has messages
OPTIONAL = ("input", "system", "history", "tools")


@dataclass(frozen=True)
class Mapping:
    """columns: a format's key -> the data's, or None: not used; roles: the data's role -> one of turns.ROLES."""

    columns: dict[str, str | None] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)

    def check(self, where: str) -> Iterator[Problem]:
        """What is wrong with it."""
        for role, ours in self.roles.items():
            if ours not in ROLES:
                fix = "write roles as {your role: ours}"
                yield Problem("roles", f"{role}: {ours}", f"for each role one of {', '.join(ROLES)}", fix, where=where)

    def unknown(self, where: str) -> Iterator[Problem]:
        """Columns that none of the built-in formats has."""
        for key in self.columns:
            if key not in (*RECORD_KEYS, *MESSAGE_KEYS):
                expected = f"the format's keys, of {', '.join((*RECORD_KEYS, *MESSAGE_KEYS))}"
                yield Problem("columns", key, expected, "write columns as {the format's key: your key}", where=where)

    def apply(self, record: Any, where: str) -> Any:
        """The record under the format's own names. Raises DataError if a column that a record needs is not there."""
        if not isinstance(record, dict) or not (self.columns or self.roles):
            return record
        columns = {ours: theirs for ours, theirs in self.columns.items() if ours not in MESSAGE_KEYS}
        missing = [ours for ours, theirs in columns.items() if theirs and theirs not in record and ours not in OPTIONAL]
        if missing:
            ours = missing[0]
            raise DataError(f"{where}: no key {columns[ours]!r}, which columns.{ours} names\n  given:    keys {list_keys(record)}")
        taken = set(columns.values())
        renamed = {key: value for key, value in record.items() if key not in taken and key not in columns}
        renamed |= {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}
        return renamed | {key: self._turns(renamed[key]) for key in LISTS if key in renamed}

    def _turns(self, value: Any) -> Any:
        """Messages, one or a list, under the format's names; any other value as it is."""
        if isinstance(value, list):
            return [self._turn(turn) if isinstance(turn, dict) else turn for turn in value]
        return self._turn(value) if isinstance(value, dict) else value

    def _turn(self, turn: dict) -> dict:
        columns = {ours: theirs for ours, theirs in self.columns.items() if ours in MESSAGE_KEYS and theirs in turn}
        taken = set(columns.values())
        renamed = {key: value for key, value in turn.items() if key not in taken}
        renamed |= {ours: turn[theirs] for ours, theirs in columns.items()}
        for key in ("from", "role"):
            if isinstance(renamed.get(key), str):
                renamed[key] = self.roles.get(renamed[key], renamed[key])
        return renamed


SAME = Mapping()  # the data has the format's own names
