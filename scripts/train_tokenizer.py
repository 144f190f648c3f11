"""Trains a tokenizer on your own text: byte-level BPE, written as a folder that `tokenizer.path` and transformers read.

    python scripts/train_tokenizer.py FOLDER corpus/*.txt more.jsonl --vocab-size 32000

Bytes are the alphabet, so no text is unknown. Words are split as in GPT-2 but for numbers, whose digits stand alone. Texts begin with
<|begin_of_text|> and end with <|end_of_text|>; <|im_start|> and <|im_end|> are kept for chats later. Same files, same tokenizer.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from torchft.data.text import TextConfig, open_documents
from torchft.errors import ConfigError, DataError, Problem, TorchftError
from torchft.tokenizers.load import load_tokenizer

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
SPECIAL = (BOS, EOS, "<|im_start|>", "<|im_end|>")
SMALLEST = len(SPECIAL) + 256
PIECE = 100_000  # characters given to the trainer at once


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the tokenizer goes; must not hold one yet")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="text (.txt, .md) or JSON (.json, .jsonl) files, folders or globs")
    parser.add_argument("--vocab-size", type=int, default=32000, help="tokens in all, special ones included (default: 32000)")
    parser.add_argument("--text-key", default="text", help="where a JSON record has its text (default: text)")
    parser.add_argument("--max-samples", type=int, help="documents taken of each path; all by default")
    args = parser.parse_intermixed_args(argv)
    try:
        sources = [TextConfig(path, text_key=args.text_key, max_samples=args.max_samples) for path in args.paths]
        train_tokenizer(args.folder, sources, args.vocab_size)
    except TorchftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def train_tokenizer(folder: Path, sources: Sequence[TextConfig], vocab_size: int) -> None:
    """Trains and writes tokenizer.json and tokenizer_config.json. Raises ConfigError or DataError."""
    if vocab_size < SMALLEST:
        expected = f"at least {SMALLEST}: 256 bytes and {len(SPECIAL)} special tokens"
        raise ConfigError(
            Problem("--vocab-size", str(vocab_size), expected, "use e.g. 4096 for a few megabytes of text, 32000 for gigabytes")
        )
    if (folder / "tokenizer.json").exists():
        raise ConfigError(Problem("FOLDER", str(folder), "a folder without tokenizer.json", "choose another, or delete that one"))
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_texts(sources), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        print(f"the text gave {tokenizer.get_vocab_size()} tokens, fewer than the {vocab_size} asked for")
    bos, eos = ((token, tokenizer.token_to_id(token)) for token in (BOS, EOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[bos, eos])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    print(f"{folder}: {load_tokenizer(folder).vocab_size} tokens")


def _texts(sources: Sequence[TextConfig]) -> Iterator[str]:
    """All documents, long ones in pieces cut at line breaks, since the trainer counts words and needs no whole documents."""
    for source in sources:
        records = open_documents(source)
        for _, record, where in records.read(0, len(records)):
            text = record.get(source.text_key)
            if not isinstance(text, str):
                raise DataError(f"{where}: no text under {source.text_key!r}: name the key that holds it by --text-key")
            while len(text) > PIECE:
                end = text.find("\n", PIECE) + 1 or len(text)
                yield text[:end]
                text = text[end:]
            yield text


if __name__ == "__main__":
    sys.exit(main())
