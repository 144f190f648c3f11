"""Data sources: files of any known kind, local or of the Hugging Face hub, as records that can be read from any number on.

    path --files.py, hub.py--> files --json_files.py, tables.py, text.py--> the records of each --> Records

What a file is, its content tells where it can (JSON Lines, a JSON array, parquet, Arrow, gzip, zstd), else its name's ending. Equal
digests mean equal records.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from pathlib import Path

from torchft.data.dataset_info import INFO_FILE, read_entry
from torchft.data.files import FileRecords, find_files, open_plain, suffix_of
from torchft.data.formats import FORMATS, KEYS, format_digest
from torchft.data.hub import HUB, Part, hub_files, is_hub_set, open_remote
from torchft.data.json_files import JSON_SUFFIXES, first_lines, is_array, open_json
from torchft.data.mapping import Mapping
from torchft.data.mixture import Share
from torchft.data.tables import CSV_SUFFIXES, TABLE_SUFFIXES, ArrowRecords, ParquetRecords, open_csv
from torchft.errors import DataError, Problem

SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES)
EMPTY = "given no record (empty file, or an empty array), expected at least one"


@dataclass
class SourceConfig(Share):
    """One data set."""

    path: str = "???"  # file, folder or glob: json, jsonl, csv, tsv, parquet, arrow (.gz, .zst); hf://owner/name; a dataset_info.json
    format: str = "auto"  # auto, alpaca, sharegpt, openai, prompt_completion, firefly, text, or one that a plugin adds
    columns: dict[str, str | None] = field(default_factory=dict)  # the format's key -> the data's, of records and messages; null: unused
    roles: dict[str, str] = field(default_factory=dict)  # the data's role -> user, assistant, system, tool or function_call
    entry: str | None = None  # of a dataset_info.json: the name of the data set in it
    subset: str | None = None  # of a data set of the hub or a folder of one
    split: str | None = None  # the same; null: train, and of a plain folder all files
    revision: str | None = None  # branch, tag or commit on the hub; null: main
    streaming: bool = False  # read parquet on the hub in place; false: download it
    name: str | None = None  # in logs and metrics; null: the path's last part
    max_samples: int | None = None  # the first so many records; null: all

    def check(self) -> Iterator[Problem]:
        where = f"source {self.path}"
        yield from check_place(self.path, self.max_samples, self.revision, self.streaming)
        if self.format not in ("auto", *FORMATS):
            known = ", ".join(("auto", *FORMATS))
            yield Problem("format", self.format, f"one of {known}", "mend the name, or add it by a plugin to formats.FORMATS", where=where)
        yield from mapping_of(self).check(where)
        yield from mapping_of(self).unknown(where) if self.format in ("auto", *KEYS) else ()
        if (self.entry is not None) != (Path(self.path).name == INFO_FILE):
            expected = f"a path to a {INFO_FILE} and the name of an entry, both or neither"
            yield Problem("entry", str(self.entry), expected, "name the entry to read, e.g. entry: alpaca_en", where=where)


def check_place(path: str, max_samples: int | None, revision: str | None, streaming: bool) -> Iterator[Problem]:
    """What is wrong with the keys that say where a source is."""
    where = f"source {path}"
    if max_samples is not None and max_samples < 1:
        yield Problem("max_samples", str(max_samples), "at least 1", "leave it out to take all", where=where)
    for key, value in (("revision", revision), ("streaming", streaming)):
        if value and not path.startswith(HUB):
            yield Problem(key, str(value), f"a path {HUB}owner/name with it", "leave it out for local files", where=where)


class Records:
    """The records of a source. Built by `open_records`, and by `text.open_documents`."""

    def __init__(self, name: str, digest: str, files: list[FileRecords], max_samples: int | None = None):
        self.name, self.digest = name, digest
        self._files = files
        self._ends = list(accumulate(len(file) for file in files))
        self._length = min(self._ends[-1], self._ends[-1] if max_samples is None else max_samples)

    def __len__(self) -> int:
        return self._length

    def read(self, lo: int, hi: int, on_bad: Callable[[DataError], None] | None = None) -> Iterator[tuple[int, dict, str]]:
        """(index, record, "file:line") for lo <= index < hi. A record that can't be read goes to `on_bad` and is left out; without
        on_bad it is raised as a DataError."""
        assert 0 <= lo <= hi <= len(self), f"{lo=} {hi=} {len(self)=}"
        for file, end in zip(self._files, self._ends):
            first = end - len(file)
            if first >= hi or lo >= end:
                continue
            start = max(lo, first)
            for index, (record, where) in enumerate(file.read(start - first, min(hi, end) - first), start):
                if not isinstance(record, DataError):
                    yield index, record, where
                elif on_bad is None:
                    raise record
                else:
                    on_bad(record)


def open_records(cfg: SourceConfig) -> Records:
    """Indexes and hashes the files of a source. Raises DataError if there are none, or none with a record, or an array is broken."""
    cfg = resolve(cfg)
    options = [format_digest(cfg.format), cfg.columns, cfg.roles, cfg.max_samples]
    return index_files(list_files(cfg.path, part_of(cfg), SUFFIXES), cfg.path, options, open_file, cfg.name, cfg.max_samples)


def resolve(cfg: SourceConfig) -> SourceConfig:
    """The source with what its entry in a dataset_info.json says; keys that are set here win."""
    if cfg.entry is None:
        return cfg
    entry = read_entry(cfg.path, cfg.entry)
    format = entry.format if cfg.format == "auto" else cfg.format
    columns, roles = {**entry.columns, **cfg.columns}, {**entry.roles, **cfg.roles}
    part = {key: getattr(cfg, key) or getattr(entry, key) for key in ("subset", "split", "max_samples")}
    return replace(cfg, path=entry.path, entry=None, format=format, columns=columns, roles=roles, name=cfg.name or cfg.entry, **part)


def mapping_of(cfg: SourceConfig) -> Mapping:
    """How the data's names become the format's."""
    return Mapping(cfg.columns, cfg.roles)


def list_files(path: str, part: Part, suffixes: tuple[str, ...]) -> list[str]:
    """The files of a source, in order: of a path, or of a data set's subset and split."""
    if is_hub_set(path, part):
        return hub_files(path, part, suffixes)
    return find_files(path, suffixes)


def open_file(path: str) -> FileRecords:
    """The records of one file."""
    if path.startswith(HUB):
        return open_remote(path)
    with open_plain(path) as file:
        head = file.read(6)
    if head[:4] == b"PAR1":
        return ParquetRecords(path)
    if head == b"ARROW1" or suffix_of(path) == ".arrow":
        return ArrowRecords(path)
    return open_csv(path) if suffix_of(path) in CSV_SUFFIXES else open_json(path)


def first_records(cfg: SourceConfig, count: int) -> Iterator[tuple[dict, str]]:
    """(record, "file:line") of the first `count` records of each file; of JSON Lines read without the pass over all of it that
    `open_records` makes. Raises DataError as it does."""
    cfg = resolve(cfg)
    found = False
    for path in list_files(cfg.path, part_of(cfg), SUFFIXES):
        for record, where in islice(_records_of(path), count):
            found = True
            if isinstance(record, DataError):
                raise record
            yield record, where
    if not found:
        raise DataError(f"{cfg.path}: {EMPTY}")


def part_of(cfg) -> Part:
    """Which part of a data set the source wants."""
    return Part(cfg.subset, cfg.split, cfg.revision, cfg.streaming)


def _records_of(path: str) -> Iterator[tuple[dict | DataError, str]]:
    if suffix_of(path) in JSON_SUFFIXES and not path.startswith(HUB) and not is_array(path):
        return first_lines(path)
    records = open_file(path)
    return records.read(0, len(records))


def index_files(
    files: list[str],
    path: str,
    options: list,
    open_one: Callable[[str], FileRecords],
    name: str | None,
    max_samples: int | None,
) -> Records:
    """The records of these files. options: all else that decides what the records are."""
    opened = [open_one(file) for file in files]
    hasher = hashlib.sha256(json.dumps(options).encode())
    for file in opened:
        hasher.update(file.digest)
    if not sum(map(len, opened)):
        raise DataError(f"{path}: {EMPTY}")
    return Records(name or _name(path), hasher.hexdigest(), opened, max_samples)


def _name(path: str) -> str:
    """The path's last part, without endings and wildcards."""
    last = path.rstrip("/").rpartition("/")[2] if path.startswith(HUB) else Path(path.removesuffix(".gz").removesuffix(".zst")).stem
    return re.sub(r"[*?\[\]]", "", last) or Path(path).parent.name
