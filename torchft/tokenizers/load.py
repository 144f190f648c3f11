"""Finds the tokenizer of a model folder, whichever format it is in.

    tokenizer.json (HF)  >  tekken*.json (Mistral)  >  *.tiktoken  >  tokenizer.model (SentencePiece, or Llama 3's ranks)

What stands first is taken; a path to the file itself takes that file. What the files beside it say: settings.py.
"""

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

from torchft.errors import DataError
from torchft.tokenizers.protocol import Tokenizer
from torchft.tokenizers.rank_files import is_rank_file
from torchft.tokenizers.settings import Settings, read_settings

PATTERNS = ("tokenizer.json", "tekken*.json", "*.tiktoken", "tokenizer.model*")


def load_tokenizer(path: str | Path, *, add_tokens: Collection[str] = (), add_special_tokens: Collection[str] = ()) -> Tokenizer:
    """The tokenizer of a model folder, or in a file.

    add_tokens: new tokens, matched whole in any text; add_special_tokens: new tokens that no text becomes. They take the ids after the
    largest; one that is there already keeps its id. Raises DataError if there is no tokenizer, or no reading it.
    """
    path = Path(path)
    file = path if path.is_file() else _find(path)
    return _open(file, read_settings(file.parent, words=add_tokens, special=add_special_tokens))


def tokenizer_of(files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer that these files, by name, make: of a model that stands in no folder yet. Raises DataError."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        return load_tokenizer(folder)


def _open(file: Path, settings: Settings) -> Tokenizer:
    if is_rank_file(file):
        from torchft.tokenizers.rank_files import read_rank_file
        from torchft.tokenizers.ranks import RankTokenizer

        return RankTokenizer(read_rank_file(file, settings.config.get("rank_kind")), settings)
    if file.suffix == ".json":
        from torchft.tokenizers.hf import HfTokenizer

        return HfTokenizer(file, settings)
    from torchft.tokenizers.sentencepiece import SentencePieceTokenizer

    return SentencePieceTokenizer(file, settings)


def tokenizer_files_in(folder: Path) -> list[Path]:
    """The files of the first format that the folder holds; usually one."""
    return next((found for pattern in PATTERNS if (found := sorted(folder.glob(pattern)))), [])


def _find(folder: Path) -> Path:
    """The folder's tokenizer file."""
    found = tokenizer_files_in(folder)
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(
            f"{folder}: {len(found)} tokenizers\n  given:    {', '.join(p.name for p in found[:8])}\n  expected: one\n"
            "  fix:      point tokenizer.path at one of these files"
        )
    given = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing" if folder.is_dir() else "no such folder"
    raise DataError(
        f"{folder}: no tokenizer here\n  given:    {given}\n  expected: tokenizer.json, or tokenizer.model (SentencePiece, Llama 3), "
        "tekken.json, *.tiktoken\n"
        "  fix:      copy the tokenizer files of the model into this folder, or point tokenizer.path at a folder that has them"
    )
