"""Rank files (tiktoken: Llama 3, Qwen, cl100k, o200k; tekken: Mistral) through the `tiktoken` library.

The library is given no special tokens at all, so text can't become one. Each stretch of text between special tokens is encoded alone; a
token's characters are found from its bytes, counted in UTF-8.

    "né"  = 6e c3 a9  --> tokens "n" "\\xc3" "\\xa9" --> characters 0..1, 1..2, 1..2

Very long texts are cut as Llama 3's reference does, every 400,000 characters and inside runs of 25,000 with or without white space; in the
other kinds only such runs of white space are, which the regex engine can't take.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from torchft.tokenizers.nfc import compose
from torchft.tokenizers.protocol import Part, Pieces, check_whole
from torchft.tokenizers.rank_files import RankFile
from torchft.tokenizers.rank_json import rank_tokenizer_json
from torchft.tokenizers.settings import Settings

MAX_TEXT, MAX_RUN = 400_000, 25_000  # characters
LONG_RUN = re.compile(rf"\s{{{MAX_RUN + 1},}}|\S{{{MAX_RUN + 1},}}")
LONG_SPACE = re.compile(rf"\s{{{MAX_RUN + 1},}}")


class RankTokenizer:
    """A rank file; see `Tokenizer` for its fields. Raises DataError for a damaged file."""

    def __init__(self, file: RankFile, settings: Settings):
        import tiktoken

        self._kind, self._name = file.kind, str(file.path)
        special = {t: i for t, i in settings.added_ids.items() if settings.marked_special.get(t, True)} or file.special
        words = {t: i for t, i in settings.added_ids.items() if t not in special}
        top = max([*file.ids.values(), *special.values(), *words.values()]) + 1
        new = settings.number_new(special, words, first=top, where=self._name)
        self.special_tokens = dict(sorted((special | {t: i for t, i in new.items() if t in settings.new_special}).items()))
        self.added_words = words | {t: i for t, i in new.items() if t in settings.new_words}
        self.vocab_size = top + len(new)
        self.named_tokens = settings.names_among(self.special_tokens, self._kind.named, where=self._name)
        ids = {name: self.special_tokens[text] for name, text in self.named_tokens.items()}
        self.bos_id, self.eos_id = ids.get("bos_token"), ids.get("eos_token")
        self.pad_id = ids.get("pad_token", self.eos_id or 0)
        self.stop_ids = settings.stop_ids | ({self.eos_id} - {None})
        self.adds_bos = self.bos_id is not None and (self._kind.adds_bos if settings.adds_bos is None else settings.adds_bos)
        self.chat_template = settings.chat_template
        facts = [self._kind.words, self._kind.nfc, self.special_tokens, self.added_words, self.named_tokens, self.adds_bos]
        self.digest = hashlib.sha256(file.data + json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self._settings, self._ids = settings, file.ids
        self._core = tiktoken.Encoding(self._name, pat_str=self._kind.words, mergeable_ranks=file.ids, special_tokens={})
        self._bytes_of = {i: token for token, i in file.ids.items()} | {i: t.encode() for t, i in self.added_words.items()}
        self._text_of = {i: text for text, i in self.special_tokens.items()}
        self._num_bytes = np.zeros(self.vocab_size, np.int64)
        self._num_bytes[list(self._bytes_of)] = [len(token) for token in self._bytes_of.values()]
        longest_first = sorted(self.added_words, key=len, reverse=True)
        self._word = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def encode(self, text: str) -> list[int]:
        return self.encode_parts([text]).ids.tolist()

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        pieces = self.encode_parts([text])
        return pieces.ids.tolist(), list(zip(pieces.starts.tolist(), pieces.ends.tolist(), strict=True))

    def encode_parts(self, parts: Sequence[Part]) -> Pieces:
        check_whole(parts)
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        at = 0
        for part in parts:
            if isinstance(part, int):
                end = at + len(self._text_of[part])
                found.append((np.array([part]), np.array([at]), np.array([end])))
            else:
                end = at + len(part)
                found += self._encode_text(part, at)
            at = end
        ids, starts, ends = (np.concatenate(column) for column in zip(*found)) if found else (np.empty(0, int),) * 3
        return Pieces(ids.astype(np.int32), starts.astype(np.int64), ends.astype(np.int64))

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        special = {} if skip_special else self._text_of
        data = b"".join(special[i].encode() if i in special else self._bytes_of.get(i, b"") for i in map(int, ids))
        return data.decode("utf-8", "replace")

    def to_files(self) -> dict[str, bytes]:
        named = {**self.named_tokens, "add_bos_token": self.adds_bos, "tokenizer_class": "PreTrainedTokenizerFast"}
        bos = self.bos_id if self.adds_bos else None
        content = rank_tokenizer_json(self._ids, self._kind, self.special_tokens, self.added_words, bos)
        return self._settings.other_files() | {"tokenizer.json": content, "tokenizer_config.json": self._settings.config_file(named)}

    def _encode_text(self, text: str, at: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Ids and characters (from `at`) of each stretch: an added word, or text between cuts."""
        origin = None
        if self._kind.nfc:
            text, origin = compose(text)
        start = 0
        for match in [*self._word.finditer(text), None]:
            end = match.start() if match else len(text)
            for a, b in pairwise([start, *self._cuts(text, start, end), end]):
                ids = np.array(self._core.encode_ordinary(text[a:b]), np.int64)
                yield ids, *self._characters(text[a:b], ids, a, at, origin)
            if match:
                span = np.array([start := match.end()]) - [[len(match[0])], [0]]
                yield np.array([self.added_words[match[0]]]), *(at + (x if origin is None else origin[x]) for x in span)

    def _cuts(self, text: str, start: int, end: int) -> list[int]:
        """Where text[start:end] is cut for its length."""
        if end - start <= MAX_RUN:
            return []
        limit = MAX_TEXT if self._kind.cuts_runs else end - start
        windows = [*range(start, end, limit), end]
        pattern = LONG_RUN if self._kind.cuts_runs else LONG_SPACE
        runs = (match for a, b in pairwise(windows) for match in pattern.finditer(text, a, b))
        return sorted({*windows[1:-1], *(cut for run in runs for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN))})

    def _characters(self, text: str, ids: np.ndarray, a: int, at: int, origin: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """First character and last + 1 of each token; text begins at `a` of the stretch's text, which begins at `at` of the whole."""
        ends = np.cumsum(self._num_bytes[ids])  # in bytes
        starts = ends - self._num_bytes[ids]
        if not text.isascii():
            leads = (np.frombuffer(text.encode(), np.uint8) & 0xC0) != 0x80  # True where a character begins
            character = np.cumsum(leads) - 1  # of each byte
            starts, ends = character[starts], character[ends - 1] + 1
        if origin is not None:
            return at + origin[a + starts], at + origin[a + ends]
        return at + a + starts, at + a + ends
