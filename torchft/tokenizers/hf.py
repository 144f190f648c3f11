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
from itertools import groupby, pairwise, zip_longest
from pathlib import Path

import numpy as np

from torchft.errors import DataError
from torchft.tokenizers.protocol import Part, Pieces, break_inside, check_whole
from torchft.tokenizers.settings import REQUIRED, VOCABULARIES, Settings

# Noncharacters of Unicode, never in text meant for others; one word for each pair of whitespace flags (lstrip, rstrip).
SEPARATORS = {(left, right): f"\ufdd0\ufdd1\ufdd0{chr(0xFDD2 + 2 * left + right)}" for left in (False, True) for right in (False, True)}
CUT = SEPARATORS[False, False]  # between two texts: a separator that stands for no token


class HfTokenizer:
    """A fast tokenizer; see `Tokenizer` for its fields. Raises DataError for a file that is damaged or does not fit its config."""

    def __init__(self, path: Path, settings: Settings):
        tok = _read(path)
        self._settings, self._new = settings, self._add(tok, settings, path)
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
        self._content = tok.to_str(pretty=False).encode() if self._new else path.read_bytes()
        facts = json.dumps([self.special_tokens, self.named_tokens, self.adds_bos, *sorted(self._new)], sort_keys=True)
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
        byte_tokens = {tok.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)} if "ByteFallback" in str(tok.decoder) else {}
        self._byte_of, self._cut_id = {i: b for i, b in byte_tokens.items() if i is not None}, tok.token_to_id(CUT)
        probe = tok.encode(f"a{CUT}a", add_special_tokens=False).tokens
        after_cut = "".join(probe[probe.index(CUT) + 1 :])
        self._prefixes_sections = after_cut.startswith(("▁", "Ġ"))  # Llama's old way: a space before each stretch of text

    def encode(self, text: str) -> list[int]:
        return self.encode_texts([text])[0].tolist()

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each as `encode`, (n,) int32, by all of the library's threads and without holding Python's. Raises DataError as `encode` does."""
        check_whole(texts)
        encodings = self._tok.encode_batch_fast(texts, add_special_tokens=False)  # without offsets, which cost as much as the encoding
        found = [np.array(encoding.ids, np.int32) for encoding in encodings]
        return [ids if self._is_text(ids) else self.encode_parts([text]).ids for text, ids in zip(texts, found, strict=True)]

    def _is_text(self, ids: np.ndarray) -> bool:
        return not (self._is_special[ids] | self._is_separator[ids]).any()

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
        for parts, name in zip(chats, names, strict=True):
            check_whole(parts, name)
        stretches = [[] if self._prefixes_sections else self._stretches(parts) for parts in chats]
        flats = ["".join(flat for flat, _, _ in chat) for chat in stretches]
        encodings = self._tok.encode_batch_fast(flats, add_special_tokens=False)
        ids = [np.array(encoding.ids, np.int32) for encoding in encodings]
        together = self._pieces_by_part(stretches, ids)
        if together is not None:
            return together
        out = []
        for parts, chat, found, name in zip(chats, stretches, ids, names, strict=True):
            alone = self._pieces_by_part([chat], [found])
            try:
                out += alone or [self.encode_parts(parts)]
            except DataError as error:
                raise DataError(f"{name}: {error}") from error
        return out

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        ids = [int(i) for i in ids]
        if not self._byte_of:
            return self._tok.decode(ids, skip_special_tokens=skip_special)
        if skip_special:
            ids = [i for i in ids if i not in self._text_of]
        # The library gives U+FFFD for each byte of a run of byte tokens that is not all whole characters; here whole ones are kept,
        # so that a text that comes token by token never changes what it began with.
        runs = [(is_bytes, list(run)) for is_bytes, run in groupby(ids, self._byte_of.__contains__)]
        filled = [i for is_bytes, run in runs for i in ([self._cut_id] if is_bytes else run)]
        stretches = self._tok.decode(filled, skip_special_tokens=False).split(CUT)
        texts = [bytes(self._byte_of[i] for i in run).decode("utf-8", "replace") for is_bytes, run in runs if is_bytes]
        return "".join(text for pair in zip_longest(stretches, texts, fillvalue="") for text in pair)

    def to_files(self) -> dict[str, bytes]:
        folder = self._settings.folder
        files = {name: path.read_bytes() for name in VOCABULARIES if (path := folder / name).is_file()} if not self._new else {}
        config = folder / "tokenizer_config.json"
        if self._new:
            files["tokenizer_config.json"] = self._settings.config_file({}, self._new)
        elif config.is_file():
            files["tokenizer_config.json"] = config.read_bytes()
        return files | self._settings.other_files() | {"tokenizer.json": self._content}

    def _add(self, tok, settings: Settings, path: Path) -> dict[str, int]:
        """Adds the user's new tokens; their ids."""
        from tokenizers import AddedToken

        added = tok.get_added_tokens_decoder().values()
        special = {t.content for t in added if t.special} | {t for t, marked in settings.marked_special.items() if marked}
        first = max(tok.get_vocab(with_added_tokens=True).values()) + 1
        new = settings.number_new(special, tok.get_vocab(with_added_tokens=True).keys() - special, first=first, where=str(path))
        for token in new:
            tok.add_tokens([AddedToken(token, normalized=False, special=token in settings.new_special)])
        if any(tok.token_to_id(token) != i for token, i in new.items()):
            raise DataError(f"{path}: ids with gaps, so new tokens would not come after the largest: add none to this tokenizer")
        return new

    def _encode(self, parts: Sequence[Part]) -> tuple[Pieces, bool]:
        """The pieces, and whether no special token came out of text."""
        check_whole(parts)
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

    def _pieces_by_part(self, chats: list[list[tuple[str, int, int | None]]], ids: list[np.ndarray]) -> list[Pieces] | None:
        """The tokens of chats, each with the span of its stretch; None where only offsets tell them, or a text needs a second look."""
        flat = np.concatenate(ids)
        is_separator = self._is_separator[flat]
        first = np.cumsum([0, *map(len, ids)])  # (chats + 1,): where each chat's tokens begin
        passed = np.cumsum(np.concatenate([[0], is_separator]))  # (tokens + 1,): separators before each token
        tokens: list[int] = []  # of all separators
        starts: list[int] = []  # of the texts: before the first separator of a chat, and after each of its separators
        ends: list[int] = []
        expected = []
        for stretches in chats:
            at = 0
            starts.append(0)
            for _, length, token in stretches:
                if token is not None:
                    tokens.append(token)
                    ends.append(at)
                    starts.append(at + length)
                at += length
            ends.append(at)
            expected.append(len(tokens))
        if not all(chats) or passed[first[1:]].tolist() != expected or self._is_special[flat].any():
            return None
        text = passed[1:] + np.repeat(np.arange(len(ids)), np.diff(first))  # (tokens,): the one a token is in, or that follows it
        places, of_texts = np.flatnonzero(is_separator), np.array([starts, ends])
        spans = of_texts[:, text]  # (2, tokens)
        spans[:, places] = of_texts[1, text[places] - 1], of_texts[0, text[places]]  # between the texts at its sides
        flat[places] = tokens
        keep = flat >= 0  # all but the cuts
        kept = np.concatenate([[0], np.cumsum(keep)])[first].tolist()
        flat, spans = flat[keep], spans[:, keep]
        return [Pieces(flat[lo:hi], spans[0, lo:hi], spans[1, lo:hi]) for lo, hi in pairwise(kept)]

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
