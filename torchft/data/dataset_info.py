"""Entries of LLaMA-Factory's dataset_info.json as sources, as they are: {"my_set": {"file_name": ..., "formatting": ..., ...}}.

Where the files are, their format, columns and roles are taken over; what the entry leaves out has LLaMA-Factory's defaults. An entry that
needs something we don't read (pictures, a loading script, another hub) is an error, not half a data set.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchft.data.hub import HUB
from torchft.data.json_files import describe_error
from torchft.errors import DataError

INFO_FILE = "dataset_info.json"
COLUMNS = {  # format -> entry's column -> our key
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system"},
    "sharegpt": {"messages": "conversations", "system": "system", "tools": "tools"},
    "openai": {"messages": "messages", "system": "system", "tools": "tools"},
}
SHARED = {"chosen": "chosen", "rejected": "rejected", "kto_tag": "label", "tools": "tools"}
DEFAULTS = {  # our key -> the data's, where the entry has no columns
    "alpaca": {"instruction": "instruction", "input": "input", "output": "output"},
    "sharegpt": {"conversations": "conversations"},
    "openai": {"messages": "conversations"},
}
TAGS = {  # tag -> our role
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}
PICTURES = ("images", "videos", "audios")
KEYS = (
    *("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "file_name"),
    *("formatting", "ranking", "subset", "split", "folder", "num_samples", "columns", "tags"),
)


@dataclass(frozen=True)
class Entry:
    """What an entry says, in a source's own keys."""

    path: str
    format: str
    columns: dict[str, str | None] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    subset: str | None = None
    split: str | None = None
    max_samples: int | None = None


def read_entry(path: str, name: str) -> Entry:
    """The entry of that name. Raises DataError naming file, entry and key."""
    entries = _read(path)
    if name not in entries:
        raise DataError(f"{path}: no entry {name!r}: it has {', '.join(list(entries)[:20]) or 'none'}")
    entry, where = entries[name], f"{path}: entry {name!r}"
    if not isinstance(entry, dict):
        raise DataError(f"{where} is {type(entry).__name__}, expected an object")
    unknown = sorted(set(entry) - set(KEYS))
    if unknown:
        raise DataError(f"{where}: unknown key {unknown[0]!r}, expected some of {', '.join(KEYS)}")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in COLUMNS:
        raise DataError(f"{where}: formatting is {formatting!r}, expected one of {', '.join(COLUMNS)}")
    given, tags = entry.get("columns") or {}, entry.get("tags") or {}
    pictures = [key for key in PICTURES if given.get(key)]
    if pictures:
        raise DataError(f"{where}: has {', '.join(pictures)}: models here read text alone; take a set without them")
    if list(given.values()) == [given.get("prompt")] and formatting == "alpaca":  # its way to name a set of plain texts
        return Entry(_place(path, entry, where), "text", {"text": given["prompt"]}, **_part(entry))
    columns = _columns(given, formatting, where) | _message_keys(tags, formatting)
    roles = {str(tags[tag]): role for tag, role in TAGS.items() if tag in tags}
    strange = sorted(set(tags) - {*TAGS, "role_tag", "content_tag"})
    if strange:
        raise DataError(f"{where}: tags.{strange[0]} is unknown, expected some of role_tag, content_tag, {', '.join(TAGS)}")
    return Entry(_place(path, entry, where), formatting, columns, roles, **_part(entry))


def _read(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable ({error}): check the path, which is relative to the folder the run is started in") from error
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(describe_error(error, path, text, 1, 1)) from error
    if not isinstance(entries, dict):
        raise DataError(f"{path}:1:1: given {type(entries).__name__}, expected an object of entries by name")
    return entries


def _place(path: str, entry: dict, where: str) -> str:
    """A file or folder beside the dataset_info.json, or a data set of the hub."""
    if entry.get("hf_hub_url"):
        return f"{HUB}{entry['hf_hub_url']}"
    if not isinstance(entry.get("file_name"), str):
        other = next((key for key in KEYS[1:5] if key in entry), "none of them")
        raise DataError(f"{where}: given {other}, expected file_name or hf_hub_url: fetch the data and name its file by file_name")
    return str(Path(path).parent / entry["file_name"])


def _part(entry: dict) -> dict[str, Any]:
    subset = entry.get("subset") or entry.get("folder")
    split = entry.get("split") if entry.get("hf_hub_url") else None
    return {"subset": subset, "split": split, "max_samples": entry.get("num_samples")}


def _columns(given: dict, formatting: str, where: str) -> dict[str, str | None]:
    """Our key -> the data's, or None for what is not used: an optional column that the entry does not name."""
    ours = COLUMNS[formatting] | SHARED
    unknown = sorted(key for key in given if key not in ours and key not in PICTURES)
    if unknown:
        raise DataError(f"{where}: columns.{unknown[0]} is unknown with formatting {formatting}, expected some of {', '.join(ours)}")
    named = {ours[key]: str(value) for key, value in given.items() if value and key in ours}
    named = {**(DEFAULTS[formatting] if not given or formatting != "alpaca" else {}), **named}
    return {key: named.get(key) for key in ours.values()}


def _message_keys(tags: dict, formatting: str) -> dict[str, str]:
    names = ("from", "value") if formatting == "sharegpt" else ("role", "content")
    return {ours: str(tags[tag]) for tag, ours in zip(("role_tag", "content_tag"), names) if tag in tags}
