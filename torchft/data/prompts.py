"""Files of prompts: what a model is to continue, from the formats that training data has, or plain lines.

    .txt             each line that is not blank is a prompt
    .json, .jsonl    {prompt} (a text) | {messages} | {conversations} | {instruction, input?}

A reply at the end of a record (the answer of a training or test set) is not part of the prompt; it is kept as `expected`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torchft.data.formats import sample_from_record
from torchft.data.sources import SourceConfig, open_records
from torchft.data.types import Message
from torchft.errors import DataError, Problem


@dataclass
class PromptsConfig:
    path: str = "???"  # .txt with one prompt a line, or .json/.jsonl with prompt, messages, conversations or instruction
    format: Literal["auto", "text", "prompt", "alpaca", "sharegpt", "openai"] = "auto"  # auto: by the file's name and the record's keys
    raw: bool = False  # continue the prompt's own text, without a chat template (base models)
    max_samples: int | None = None  # the first so many prompts; null: all

    def check(self) -> Iterator[Problem]:
        if self.max_samples is not None and self.max_samples < 1:
            yield Problem("prompts.max_samples", str(self.max_samples), "at least 1", "leave it out to take all")


@dataclass(frozen=True)
class Prompt:
    """What to continue: a chat that ends before a reply. `text` is set where the record was a text."""

    messages: tuple[Message, ...]
    where: str
    text: str | None = None
    expected: str | None = None  # the reply that the record had
    tools: tuple[dict[str, Any], ...] = ()  # as in Sample


def read_prompts(cfg: PromptsConfig) -> list[Prompt]:
    """All prompts of a file, in its order. Raises DataError that names file and line."""
    is_text = cfg.format == "text" or (cfg.format == "auto" and Path(cfg.path).suffix == ".txt")
    prompts = list(_lines(Path(cfg.path)) if is_text else _records(cfg))[: cfg.max_samples]
    if not prompts:
        raise DataError(f"{cfg.path}: given no prompt, expected at least one")
    if cfg.raw and (chat := next((p for p in prompts if p.text is None), None)) is not None:
        raise DataError(
            f"{chat.where}: prompts.raw needs texts (lines, or records with the key prompt); given a chat: set prompts.raw=false"
        )
    return prompts


def _lines(path: Path) -> Iterator[Prompt]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as UTF-8 text ({error}): check the path and the file") from error
    for number, line in enumerate(text.split("\n"), 1):
        line = line.rstrip("\r")
        if line.strip():
            yield _of_text(line, f"{path}:{number}")


def _records(cfg: PromptsConfig) -> Iterator[Prompt]:
    records = open_records(SourceConfig(cfg.path, max_samples=cfg.max_samples))
    for _, record, where in records.read(0, len(records)):
        if cfg.format == "prompt" or (cfg.format == "auto" and "prompt" in record):
            if not isinstance(record.get("prompt"), str):
                raise DataError(f"{where}: the key prompt is {type(record.get('prompt')).__name__}, expected a text")
            yield _of_text(record["prompt"], where)
        else:
            yield _of_chat(record, where, "auto" if cfg.format == "auto" else cfg.format)


def _of_text(text: str, where: str) -> Prompt:
    return Prompt((Message("user", text),), where, text)


def _of_chat(record: dict, where: str, format: str) -> Prompt:
    """An alpaca record may come without its output."""
    given = record if "instruction" not in record else {"output": "", **record}
    sample = sample_from_record(given, where, format)
    messages = sample.messages
    if messages[-1].role != "assistant":
        return Prompt(messages, where, tools=sample.tools)
    if len(messages) == 1:
        raise DataError(f"{where}: nothing but a reply: a prompt needs a message before it")
    expected = messages[-1].content if "output" in record or "instruction" not in record else None
    return Prompt(messages[:-1], where, expected=expected, tools=sample.tools)
