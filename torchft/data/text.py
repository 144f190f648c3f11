"""Plain text for pretraining: files of text, or JSON records with a text in them -> documents.

    .txt, .md      the whole file is one document, or it is split at blank lines or at a separator of yours
    .json, .jsonl  one document a record: {"text": ...}

A document is the text as it stands, without the line breaks at its two ends; in text files `\\r\\n` counts as `\\n`. Its tokens are BOS
(if the tokenizer adds one), the text, EOS; each is trained but the first, which nothing predicts. Text never becomes a special token.
"""

import hashlib
import mmap
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from torchft.data.checks import check_data
from torchft.data.files import BOM, FileRecords, Spans, TextRecords, check_head, is_plain, open_plain, suffix_of, too_long
from torchft.data.mixture import MixtureConfig, Share
from torchft.data.sources import SUFFIXES, Records, check_place, index_files, list_files, open_file, part_of
from torchft.data.types import Encoded
from torchft.errors import DataError, Problem
from torchft.tokenizers.hf import HfTokenizer
from torchft.tokenizers.protocol import Tokenizer

TEXT_SUFFIXES = (".txt", ".text", ".md")
MAX_DOCUMENT = 2**30  # bytes of a text file that is one document, or of a compressed one
BLANK_LINES = re.compile(rb"\r?\n(?:[ \t]*\r?\n)+")


@dataclass
class TextConfig(Share):
    """One source of documents."""

    path: str = "???"  # file, folder or glob: txt, md, json, jsonl, csv, tsv, parquet, arrow (.gz, .zst but txt); hf://owner/name
    separator: str | None = None  # between documents of a text file: blank_lines, or a text such as <|endoftext|>; null: a file is one
    text_key: str = "text"  # where a record has its text
    subset: str | None = None  # of a data set of the hub or a folder of one
    split: str | None = None  # the same; null: train, and of a plain folder all files
    revision: str | None = None  # branch, tag or commit on the hub; null: main
    streaming: bool = False  # read parquet on the hub in place; false: download it
    name: str | None = None  # in logs and metrics; null: the path's last part
    max_samples: int | None = None  # the first so many documents; null: all

    def check(self) -> Iterator[Problem]:
        yield from check_place(self.path, self.max_samples, self.revision, self.streaming)
        if self.separator == "":
            yield Problem("separator", "an empty text", "blank_lines, a text, or null", "set it to null", where=f"source {self.path}")


@dataclass
class TextDataConfig:
    """Section `data` of pretraining."""

    train: list[TextConfig] = field(default_factory=list)  # training sources, put together by `mixture`
    validation: dict[str, TextConfig] = field(default_factory=dict)  # validation sources by name
    validation_size: float = 0  # held out from each training source: below 1 a share of it, else a number of documents
    mixture: MixtureConfig = field(default_factory=lambda: MixtureConfig(unit="tokens"))  # what an epoch takes of each training source
    seq_len: int = 2048  # tokens in a row; documents are cut at its end and go on in the next row
    max_bad_records: int = 0  # broken records of a source to leave out, counted and named; 0: the first is an error
    shuffle: bool = True  # a new order of documents in each epoch; false: the files' order
    window: int = 4096  # documents planned at once; part of what the order depends on
    seed: int | None = None  # of the order; null: the run's seed
    workers: int = 1  # threads that prepare batches ahead; 0: none
    prefetch: int = 2  # steps prepared ahead
    cache: str = ".cache/tokens"  # folder of tokenised sources, seen by all processes
    streaming: bool = False  # tokenise the training source, JSON Lines, as training goes, without a cache; needs train.steps
    streams: int = 64  # with streaming: places in its files that are read side by side; best a multiple of the rows of a micro-batch
    packing: ClassVar = "cut"
    group_by_length: ClassVar = False

    def check(self) -> Iterator[Problem]:
        yield from check_data(self)


def open_documents(cfg: TextConfig) -> Records:
    """Indexes and hashes the files of a source. Raises DataError if there are none, or none with a document."""
    files = list_files(cfg.path, part_of(cfg), (*TEXT_SUFFIXES, *SUFFIXES))
    strange = [path for path in files if suffix_of(path) not in (*TEXT_SUFFIXES, *SUFFIXES)]
    if strange:
        kinds = ", ".join((*TEXT_SUFFIXES, *SUFFIXES))
        raise DataError(f"{strange[0]}: whether this is text or JSON is told by the name's ending, expected {kinds}: rename the file")

    def open_one(path: str) -> FileRecords:
        if suffix_of(path) not in TEXT_SUFFIXES:
            return open_file(path)
        spans, digest = _index_text(path, cfg.separator)
        return TextRecords(path, spans, digest, lambda text, _path, _line: {cfg.text_key: text.replace("\r\n", "\n")}, MAX_DOCUMENT)

    return index_files(files, cfg.path, ["text", cfg.separator, cfg.text_key, cfg.max_samples], open_one, cfg.name, cfg.max_samples)


def encode_document(record: dict, where: str, *, text_key: str, tokenizer: Tokenizer) -> Encoded | None:
    """A record's text with BOS and EOS, all of it trained; None if it is empty. Raises DataError naming `where`."""
    text = _text_of(record, where, text_key, tokenizer)
    try:
        return _as_document(tokenizer.encode(text), tokenizer) if text else None
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def encode_documents(rows: Sequence[tuple[dict, str]], *, text_key: str, tokenizer: Tokenizer) -> list[Encoded | None]:
    """`encode_document` of each (record, where), faster. Raises DataError for any."""
    if not isinstance(tokenizer, HfTokenizer):
        return [encode_document(record, where, text_key=text_key, tokenizer=tokenizer) for record, where in rows]
    texts = [_text_of(record, where, text_key, tokenizer) for record, where in rows]
    encoded = tokenizer.encode_texts(texts)
    return [_as_document(ids, tokenizer) if text else None for text, ids in zip(texts, encoded, strict=True)]


def _text_of(record: dict, where: str, text_key: str, tokenizer: Tokenizer) -> str:
    """The document's text, empty if there is nothing in it."""
    text = record.get(text_key)
    if not isinstance(text, str):
        given = "nothing" if text_key not in record else type(text).__name__
        keys = ", ".join(list(record)[:20]) or "none"
        raise DataError(
            f"{where}: no text\n  given:    {given} under {text_key!r}; the record's keys are {keys}\n  expected: a string\n"
            "  fix:      name the key that holds the text by the source's text_key"
        )
    if tokenizer.eos_id is None:
        raise DataError("the tokenizer has no end token, which ends each document: set eos_token in tokenizer_config.json")
    return text.strip("\r\n") if text.strip() else ""


def _as_document(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> Encoded:
    whole = np.empty(tokenizer.adds_bos + len(ids) + 1, np.int32)
    whole[: tokenizer.adds_bos] = tokenizer.bos_id or 0
    whole[tokenizer.adds_bos : -1], whole[-1] = ids, tokenizer.eos_id
    weights = np.ones(len(whole), np.float32)
    weights[0] = 0
    return Encoded(whole, weights)


def _index_text(path: str, separator: str | None) -> tuple[Spans, bytes]:
    """The spans of the documents that are not blank, and the content's hash. A plain file is mapped, not read as a whole."""
    with _content(path) as data:
        check_head(path, data[:3])
        spans = list(_spans(data, len(BOM) if data[:3] == BOM else 0, separator))
        return np.array(spans, np.int64).reshape(-1, 3), hashlib.sha256(data).digest()


@contextmanager
def _content(path: str) -> Iterator[mmap.mmap | bytes]:
    with open_plain(path) as file:
        if not (is_plain(file) and file.seek(0, 2)):
            data = file.read(MAX_DOCUMENT + 1)
            if len(data) > MAX_DOCUMENT:
                raise too_long(path, 1, MAX_DOCUMENT)
            yield data
        else:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield data


def _spans(data: mmap.mmap | bytes, start: int, separator: str | None) -> Iterator[tuple[int, int, int]]:
    pattern = BLANK_LINES if separator == "blank_lines" else re.compile(re.escape((separator or "").encode()))
    cuts = [(m.start(), m.end()) for m in pattern.finditer(data)] if separator else []
    line = 1
    for end, following in [*cuts, (len(data), len(data))]:
        piece = data[start:end]
        text = piece.strip(b"\r\n")
        skipped = len(piece) - len(piece.lstrip(b"\r\n"))
        if text.strip():
            yield start + skipped, start + skipped + len(text), line + piece.count(b"\n", 0, skipped)
        line += data[start:following].count(b"\n")
        start = following
