"""tokenizer.json through the `tokenizers` library.

The library would turn `<|im_end|>` in any text into the special token. Here it is told not to (`encode_special_tokens`), and the
special tokens of a chat travel as separators instead: added words of unusual characters, matched whole, with the whitespace flags of the
token they stand for. One call then encodes the whole chat exactly as the library would, prefix spaces included.

    [1, "user\\nHi", 2]  ->  "▮user\\nHi▮"  ->  ids [sep, 731, 88, sep]  ->  [1, 731, 88, 2]
"""

import hashlib
import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from torchft.errors import DataError
from torchft.tokenizers.load import REQUIRED, Settings
from torchft.tokenizers.protocol import Part, Pieces, break_inside

# Noncharacters of Unicode, never in text meant for others; one word for each pair of whitespace flags (lstrip, rstrip).
SEPARATORS = {(left, right): f"\ufdd0\ufdd1\ufdd0{chr(0xFDD2 + 2 * left + right)}" for left in (False, True) for right in (False, True)}
CUT = SEPARATORS[False, False]  # between two texts: a separator that stands for no token


class HfTokenizer:
    """A fast tokenizer; see `Tokenizer` for its fields. Raises DataError for a file that is damaged or does not fit its config."""

    def __init__(self, path: Path, settings: Settings):
        tok = _read(path)
        ids_with_bos = tok.encode("a", add_special_tokens=True).ids
        tok.post_processor = None  # adds nothing, and leaves the spaces in the offsets
        added = {token.content: token for token in tok.get_added_tokens_decoder().values()}
        named = {name: text for name, text in settings.named_tokens.items() if tok.token_to_id(text) is not None}
        missing = sorted({text for name, text in settings.named_tokens.items() if name in REQUIRED and name not in named})
        if missing:
            raise DataError(
                f"{path.parent}: tokenizer_config.json names {', '.join(missing)}, which tokenizer.json does not have: "
                "take both files from one model"
            )
        special = {t for t, token in added.items() if token.special or settings.marked_special.get(t)} | set(named.values())
        self.special_tokens = {t: tok.token_to_id(t) for t in sorted(special)}
        self.added_words = {t: tok.token_to_id(t) for t in added if t not in special}
        self.vocab_size = max(tok.get_vocab(with_added_tokens=True).values()) + 1
        self.named_tokens = named
        ids = {name: self.special_tokens[text] for name, text in named.items()}
        self.bos_id, self.eos_id = ids.get("bos_token"), ids.get("eos_token")
        self.pad_id = ids.get("pad_token", self.eos_id or 0)
        self.stop_ids = settings.stop_ids | ({self.eos_id} - {None})
        reads_bos = ids_with_bos[:1] == [self.bos_id] if settings.adds_bos is None else settings.adds_bos
        self.adds_bos = self.bos_id is not None and reads_bos
        self.chat_template = settings.chat_template
        self.files = settings.files
        facts = json.dumps([self.special_tokens, self.named_tokens, self.adds_bos], sort_keys=True)
        self.digest = hashlib.sha256(path.read_bytes() + facts.encode()).hexdigest()
        self._prepare(tok, added, ids.get("unk_token"))
        self._name = str(path)

    def _prepare(self, tok, added: dict, unk_id: int | None) -> None:
        """Turns the matching of special tokens in text off, and adds the separators."""
        from tokenizers import AddedToken

        tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in self.special_tokens])
        tok.encode_special_tokens = True
        tok.add_tokens([AddedToken(s, normalized=False, lstrip=left, rstrip=right) for (left, right), s in SEPARATORS.items()])
        self._tok = tok
        self._text_of = {i: t for t, i in self.special_tokens.items()}
        self._separator_of = {
            i: SEPARATORS[added[t].lstrip, added[t].rstrip] if t in added else CUT for t, i in self.special_tokens.items()
        }
        size = max(tok.token_to_id(s) for s in SEPARATORS.values()) + 1
        self._is_separator = np.zeros(max(size, self.vocab_size), bool)
        self._is_separator[[tok.token_to_id(s) for s in SEPARATORS.values()]] = True
        self._is_special = np.zeros_like(self._is_separator)
        self._is_special[[i for i in self.special_tokens.values() if i != unk_id]] = True
        lookalikes = sorted(self.special_tokens, key=len, reverse=True)
        self._lookalike = re.compile("|".join(map(re.escape, lookalikes)) or "(?!)")
        probe = tok.encode(f"a{CUT}a", add_special_tokens=False).tokens
        after_cut = "".join(probe[probe.index(CUT) + 1 :])
        self._prefixes_sections = after_cut.startswith(("▁", "Ġ"))  # Llama's old way: a space before each stretch of text

    def encode(self, text: str) -> list[int]:
        return self.encode_texts([text])[0]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Each as `encode`, on all cores. Without offsets, which cost as much as the encoding."""
        out = []
        for text, encoding in zip(texts, self._tok.encode_batch_fast(list(texts), add_special_tokens=False), strict=True):
            ids = encoding.ids
            found = np.array(ids, np.int32)
            clean = not (self._is_special[found] | self._is_separator[found]).any()
            out.append(ids if clean else self.encode_parts([text]).ids.tolist())
        return out

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        pieces = self.encode_parts([text])
        return pieces.ids.tolist(), list(zip(pieces.starts.tolist(), pieces.ends.tolist(), strict=True))

    def encode_parts(self, parts: Sequence[Part]) -> Pieces:
        pieces, clean = self._encode(parts)
        if not clean:  # a unigram model finds its special tokens in plain text
            pieces, clean = self._encode(break_inside(parts, self._lookalike))
        if not clean:
            raise DataError(f"{self._name}: this tokenizer makes a special token out of plain text: {self._excerpt(parts)}")
        return pieces

    def encode_many(self, chats: Sequence[Sequence[Part]], names: Sequence[str]) -> list[Pieces]:
        """Each as `encode_parts`, on all cores and faster, but a token's span is that of its whole part. Raises DataError with the name."""
        stretches = [[] if self._prefixes_sections else self._stretches(parts) for parts in chats]
        flats = ["".join(flat for flat, _, _ in chat) for chat in stretches]
        encodings = self._tok.encode_batch_fast(flats, add_special_tokens=False)
        out = []
        for parts, chat, encoding, name in zip(chats, stretches, encodings, names, strict=True):
            pieces = self._pieces_by_part(chat, np.array(encoding.ids, np.int32))
            try:
                out.append(self.encode_parts(parts) if pieces is None else pieces)
            except DataError as error:
                raise DataError(f"{name}: {error}") from error
        return out

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return self._tok.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def _encode(self, parts: Sequence[Part]) -> tuple[Pieces, bool]:
        """The pieces, and whether no special token came out of text."""
        stretches = self._stretches(parts)
        flat_at = np.cumsum([0, *(len(flat) for flat, _, _ in stretches)])  # where each starts in the flat text
        text_at = np.cumsum([0, *(length for _, length, _ in stretches)])  # and in the parts joined
        encoding = self._tok.encode("".join(flat for flat, _, _ in stretches), add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        clean = not self._is_special[ids].any()
        at = np.searchsorted(flat_at, spans[:, 0], side="right") - 1  # the stretch of each token
        spans += (text_at - flat_at)[at][:, None]
        keep = np.ones(len(ids), bool)
        separators = [(k, i) for k, (_, _, i) in enumerate(stretches) if i is not None]
        places = np.flatnonzero(self._is_separator[ids])
        if len(places) != len(separators):
            raise DataError(f"{self._name}: a text holds the noncharacters this library marks tokens with: {self._excerpt(parts)}")
        for place, (k, i) in zip(places, separators, strict=True):
            ids[place], spans[place], keep[place] = i, (text_at[k], text_at[k + 1]), i >= 0
        pieces = Pieces(ids[keep], spans[keep, 0], spans[keep, 1])
        if self._prefixes_sections:
            self._check_joints(parts, pieces)
        return pieces, clean

    def _pieces_by_part(self, stretches: list[tuple[str, int, int | None]], ids: np.ndarray) -> Pieces | None:
        """The tokens with the spans of their stretches; None where only offsets tell them, or the text needs a second look."""
        is_separator = self._is_separator[ids]
        places = np.flatnonzero(is_separator)
        separators = [k for k, (_, _, i) in enumerate(stretches) if i is not None]
        if not stretches or len(places) != len(separators) or self._is_special[ids].any():
            return None
        at = np.cumsum([0, *(length for _, length, _ in stretches)])
        bounds = np.array([(at[k], at[k + 1]) for k in separators], np.int64).reshape(-1, 2)  # (separators, 2)
        edges = np.concatenate([[0], bounds.ravel(), at[-1:]]).reshape(-1, 2)  # (separators + 1, 2): the text between them
        passed = np.cumsum(is_separator)
        spans = edges[passed]
        spans[places] = bounds
        ids[places] = [stretches[k][2] for k in separators]
        keep = ids >= 0
        return Pieces(ids[keep], spans[keep, 0], spans[keep, 1])

    def _stretches(self, parts: Sequence[Part]) -> list[tuple[str, int, int | None]]:
        """(flat text, length in the parts joined, id of the separator's token or -1 for a cut or None for text)."""
        stretches: list[tuple[str, int, int | None]] = []
        for part in parts:
            if isinstance(part, int):
                stretches.append((self._separator_of[part], len(self._text_of[part]), part))
            elif part:
                if stretches and stretches[-1][2] is None and not self._prefixes_sections:
                    stretches.append((CUT, 0, -1))
                stretches.append((part, len(part), None))
        return stretches

    def _check_joints(self, parts: Sequence[Part], pieces: Pieces) -> None:
        """A cut would get a space here, so the texts were joined; fine unless a token runs over the joint."""
        at = 0
        for before, part in pairwise([*parts, ""]):
            at += len(before) if isinstance(before, str) else len(self._text_of[before])
            if isinstance(before, str) and isinstance(part, str) and ((pieces.starts < at) & (pieces.ends > at)).any():
                raise DataError(
                    f"{self._name}: this tokenizer puts a space before each stretch of text, so text can't be cut before {part[:40]!r}: "
                    "use the model's newer tokenizer.json, or a template that has a special token there"
                )

    def _excerpt(self, parts: Sequence[Part]) -> str:
        return repr("".join(p for p in parts if isinstance(p, str))[:80])


def _read(path: Path):
    import tokenizers

    try:
        tok = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path}: not a tokenizer.json this library can read ({error}): download the file again") from error
    tok.no_truncation()
    tok.no_padding()
    return tok
