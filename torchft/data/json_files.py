"""JSON Lines, or one JSON array: told apart by content, never by name. An index pass finds and hashes the records, reading parses them.

An array is scanned through a window of text that moves on with the records, so a file of any size takes the memory of its longest
record. Errors name file, line and column, and how to mend what is there.
"""

import codecs
import hashlib
import json
import re
from array import array
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from torchft.data.files import BOM, CHUNK, MAX_RECORD, Spans, TextRecords, check_head, decode, lines_of, not_utf8, open_plain, too_long
from torchft.errors import DataError

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
WHITE = re.compile(r"[ \t\r\n]*")
TRAILING = "trailing comma: remove it, the last entry has none after it"
CUT_TAIL = 16  # characters: an error closer to the end of the text than this may be no error, but the text not being whole


def open_json(path: str) -> TextRecords:
    """The records of a file of JSON Lines or of one JSON array."""
    spans, digest = _index_array(path) if is_array(path) else _index_lines(path)
    return TextRecords(path, spans, digest, parse_json)


def is_array(path: str) -> bool:
    """By the first character that is not white space."""
    with open_plain(path) as file:
        head = file.read(CHUNK)
        check_head(path, head)
        head = head.removeprefix(BOM)
        while head:
            if head.strip():
                return head.lstrip()[:1] == b"["
            head = file.read(CHUNK)
    return False


def parse_json(text: str, path: str, line: int) -> dict:
    """A record. Raises DataError naming file, line and column."""
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        message = describe_error(error, path, text, line, 1)
        if text.startswith("{") and error.pos >= len(text.rstrip()):
            message = (
                f"{path}:{line + error.lineno - 1}:{error.colno}: the object does not end on its line ({error.msg}): expected one whole "
                "object per line (JSON Lines), or all objects in one array: [ {...}, {...} ]"
            )
        raise DataError(message) from error
    except (ValueError, RecursionError) as error:
        raise DataError(describe_error(error, path, text, line, 1)) from error
    if not isinstance(record, dict):
        raise DataError(f"{path}:{line}:1: given {type(record).__name__}, expected a JSON object on every line (or one array of objects)")
    return record


def first_lines(path: str) -> Iterator[tuple[dict | DataError, str]]:
    """(the record or what is wrong with it, where it stands) of one line after the other, without the index pass."""
    with open_plain(path) as file:
        for number, (line, size) in enumerate(lines_of(file), 1):
            if not (line := line.removeprefix(BOM).rstrip()):
                continue
            try:
                yield (
                    (too_long(path, number) if size > MAX_RECORD else parse_json(decode(line, path, number), path, number)),
                    f"{path}:{number}",
                )
            except DataError as error:
                yield error, f"{path}:{number}"


def _index_lines(path: str) -> tuple[Spans, bytes]:
    """The spans of the lines that are not blank, and the content's hash."""
    spans, at, hasher = array("q"), 0, hashlib.sha256()
    with open_plain(path) as file:
        for number, (line, size) in enumerate(lines_of(file), 1):
            hasher.update(line)
            skip = len(BOM) if number == 1 and line.startswith(BOM) else 0
            if line[skip:].strip():
                end = at + (size if size > MAX_RECORD else len(line.rstrip()))
                spans.extend((at + skip, end, number))
            at += size
    return np.frombuffer(spans, np.int64).reshape(-1, 3), hasher.digest()


class _Window:
    """The text of a file around the reader: all before `at` is read and dropped, `more` adds what follows."""

    def __init__(self, file: BinaryIO, path: str):
        self.text, self.at = "", 0
        self.byte, self.line, self.column = 0, 1, 1  # of text[counted]
        self.hasher = hashlib.sha256()
        self._file, self._path = file, path
        self._counted = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.more()
        if self.text.startswith("\ufeff"):
            self.text, self.byte = self.text[1:], len(BOM)

    def more(self) -> bool:
        """Adds at least as much as is still there, so that reading a long record again and again stays cheap. False: none is left."""
        data = self._file.read(max(CHUNK, len(self.text) - self.at))
        self.hasher.update(data)
        try:
            added = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            self.text += error.object[: error.start].decode()
            self.at = len(self.text)
            self.count()
            raise not_utf8(self._path, self.line, self.column, error.object[error.start]) from error
        if data:
            self.count()
            self.text, self.at, self._counted = self.text[self.at :] + added, 0, 0
        return bool(data)

    def count(self) -> None:
        """Brings byte, line and column up to `at`."""
        passed = self.text[self._counted : self.at]
        self.byte += len(passed.encode())
        breaks = passed.count("\n")
        self.line += breaks
        self.column = len(passed) - passed.rfind("\n") if breaks else self.column + len(passed)
        self._counted = self.at

    def next(self) -> str:
        """The next character that is not white space, or "" at the end; `at` is its place."""
        self.at = WHITE.match(self.text, self.at).end()
        while self.at == len(self.text) and self.more():
            self.at = WHITE.match(self.text, self.at).end()
        return self.text[self.at : self.at + 1]

    def error(self, message: str | Exception, at: int | None = None) -> DataError:
        """At `at`, or where reading stopped."""
        if isinstance(message, str):
            message = json.JSONDecodeError(message, self.text, self.at if at is None else at)
        self.count()
        return DataError(describe_error(message, self._path, self.text, self.line, self.column, self.at))


def _index_array(path: str) -> tuple[Spans, bytes]:
    """The spans of the elements, and the content's hash."""
    decoder, spans = json.JSONDecoder(), array("q")
    with open_plain(path) as file:
        window = _Window(file, path)
        window.next()
        window.at += 1
        while window.next() not in ("]", ""):
            window.count()
            start, line = window.byte, window.line
            window.at = _end_of_element(window, decoder, path)
            window.count()
            spans.extend((start, window.byte, line))
            after = window.next()
            if after == ",":
                window.count()
                line, column = window.line, window.column
                window.at += 1
                if window.next() == "]":
                    raise DataError(f"{path}:{line}:{column}: {TRAILING}")
            elif after not in ("]", ""):
                raise window.error("Expecting ',' delimiter")
        if not window.next():
            raise window.error("the file ends before the array does")
        window.at += 1
        if window.next():
            raise window.error("text after the end of the array")
    return np.frombuffer(spans, np.int64).reshape(-1, 3), window.hasher.digest()


def _end_of_element(window: _Window, decoder: json.JSONDecoder, path: str) -> int:
    """The place behind the element that begins at window.at, which `more` moves to 0."""
    while True:
        try:
            _, end = decoder.raw_decode(window.text, window.at)
            if end < len(window.text) or not window.more():  # else a number may go on
                return end
        except json.JSONDecodeError as error:
            is_cut = error.msg.startswith("Unterminated") or error.pos > len(window.text) - CUT_TAIL
            if is_cut and len(window.text) - window.at > MAX_RECORD:
                raise too_long(path, window.line) from error
            if not is_cut or not window.more():
                raise window.error(error) from error
        except (ValueError, RecursionError) as error:
            raise window.error(error) from error


def describe_error(error: Exception, path: str, text: str, line: int, column: int, at: int = 0) -> str:
    """Where in the file, what is wrong, how to mend it. text[at] stands at `line` and `column` of the file."""
    if not isinstance(error, json.JSONDecodeError):
        what = "nested too deeply" if isinstance(error, RecursionError) else f"not JSON that can be read ({error})"
        return f"{path}:{line}:{column}: {what}: this is no record of a known format"
    passed = text[at : error.pos]
    row = line + passed.count("\n")
    place = f"{path}:{row}:{len(passed) - passed.rfind(chr(10)) if row > line else column + len(passed)}"
    before, rest = text[: error.pos].rstrip(), text[error.pos : error.pos + 40]
    if (before.endswith(",") and rest[:1] in ("]", "}")) or rest.startswith((",]", ",}")):
        return f"{place}: {TRAILING}"
    if rest.startswith("'"):
        return f"{place}: single quotes: JSON needs double quotes (write the file with json.dumps, not str)"
    if error.msg == "Extra data" and rest.startswith("{"):
        return f"{place}: two objects on one line: put each on a line of its own"
    if "control character" in error.msg:
        return f"{place}: a raw line break, tab or other control character in a string: write it as \\n, \\t or \\u00XX"
    return f"{place}: not JSON: {error.msg}, at {rest!r}: mend or remove this record"
