"""Tokens a user adds: ids behind the others, words matched whole, special ones never made from text, all of it after export and reload."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.tokenizers import (
    make_byte_fallback_tokenizer,
    make_hf_tokenizer,
    make_rank_tokenizer,
    make_sp_tokenizer,
    make_tekken_tokenizer,
)
from torchft.errors import DataError
from torchft.tokenizers.load import load_tokenizer

MAKERS = {
    "hf": make_hf_tokenizer,
    "byte fallback": make_byte_fallback_tokenizer,
    "sentencepiece": make_sp_tokenizer,
    "unigram": lambda folder: make_sp_tokenizer(folder, model_type="unigram"),
    "ranks": make_rank_tokenizer,
    "qwen": lambda folder: make_rank_tokenizer(folder, "qwen"),
    "tekken": make_tekken_tokenizer,
}
NEW = {"add_tokens": ["<note>", "[x]"], "add_special_tokens": ["<|tool|>"]}


@pytest.fixture(scope="module", params=MAKERS)
def before_and_after(request, tmp_path_factory):
    """The tokenizer without new tokens, with them, and opened again from the files it exports."""
    folder = tmp_path_factory.mktemp("new")
    made = MAKERS[request.param](folder / "made")
    grown = load_tokenizer(made, **NEW)
    return load_tokenizer(made), grown, load_tokenizer(write(grown.to_files(), folder / "exported"))


def write(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_ids_follow_the_largest(before_and_after):
    """Each new token has one id behind all that were there; the others keep theirs; an exported folder says the same."""
    before, grown, again = before_and_after
    ids = {**grown.added_words, **grown.special_tokens}
    assert sorted(ids[t] for t in ("<note>", "[x]", "<|tool|>")) == list(range(before.vocab_size, before.vocab_size + 3))
    assert grown.vocab_size == again.vocab_size == before.vocab_size + 3
    assert {t: i for t, i in grown.special_tokens.items() if t != "<|tool|>"} == before.special_tokens
    assert again.special_tokens == grown.special_tokens
    assert (again.bos_id, again.eos_id, again.pad_id) == (before.bos_id, before.eos_id, before.pad_id)
    assert grown.digest != before.digest


def test_words_are_matched_whole_and_special_ones_never(before_and_after):
    """`<note>` in text is its one token; `<|tool|>` in text is ordinary pieces, and the token only when it is given by id."""
    before, grown, again = before_and_after
    tool, note = grown.special_tokens["<|tool|>"], grown.encode("a<note>")[-1]
    for tokenizer in (grown, again):
        ids = tokenizer.encode_parts(["a<note>b", tool, "x<|tool|>y"]).ids.tolist()
        assert (ids.count(note), ids.count(tool)) == (1, 1)
        assert tokenizer.decode(ids) == "a<note>bx<|tool|>y" and tokenizer.decode(ids, skip_special=False) == "a<note>b<|tool|>x<|tool|>y"
        assert tokenizer.encode("The red boat") == before.encode("The red boat")


def test_no_text_becomes_special(before_and_after):
    """The same for any mixture of the tokens' texts and letters, from memory and from the exported folder, whose ids agree."""
    _, grown, again = before_and_after
    special = set(grown.special_tokens.values()) - {grown.special_tokens.get("<unk>")}

    @given(st.lists(st.sampled_from([*"ab <|>[x]\n", "<|tool|>", "<note>", "é", *list(grown.special_tokens)[:40]])).map("".join))
    def holds(text):
        ids = grown.encode(text)
        assert not special & set(ids) and again.encode(text) == ids

    holds()


def test_transformers_has_the_new_tokens(tmp_path):
    """The exported folder gives the new ids in transformers too."""
    transformers = pytest.importorskip("transformers")
    for name in ("hf", "ranks", "tekken"):
        grown = load_tokenizer(MAKERS[name](tmp_path / name), **NEW)
        theirs = transformers.AutoTokenizer.from_pretrained(write(grown.to_files(), tmp_path / "out" / name))
        ids = theirs.encode("a<note>b<|tool|>", add_special_tokens=False)
        assert ids == grown.encode_parts(["a<note>b", grown.special_tokens["<|tool|>"]]).ids.tolist()
        assert theirs.decode(ids, skip_special_tokens=True) == "a<note>b"


def test_tokens_that_are_there_already(tmp_path):
    """Those of the same sort keep their ids (a run that goes on from its own export); of another sort, they are an error."""
    folder = make_hf_tokenizer(tmp_path / "a")
    grown = load_tokenizer(folder, **NEW)
    assert load_tokenizer(write(grown.to_files(), tmp_path / "b"), **NEW).vocab_size == grown.vocab_size
    with pytest.raises(DataError, match="another sort"):
        load_tokenizer(folder, add_tokens=["<|im_end|>"])
    with pytest.raises(DataError, match="another sort"):
        load_tokenizer(folder, add_special_tokens=["<think>"])


@pytest.mark.parametrize("tokens", [["<a>", "<a>"], [""], [" <a>"]])
def test_texts_that_can_be_no_token(tmp_path, tokens):
    """Twice the same, empty, white space at an end."""
    with pytest.raises(DataError, match="expected: texts like"):
        load_tokenizer(make_hf_tokenizer(tmp_path), add_tokens=tokens)


def test_sentencepiece_itself_makes_no_new_special_token(tmp_path):
    """In the exported model the special token is a control piece and the word a user-defined one, for any program that reads it."""
    from sentencepiece import SentencePieceProcessor

    grown = load_tokenizer(make_sp_tokenizer(tmp_path), **NEW)
    model = SentencePieceProcessor(model_proto=grown.to_files()["tokenizer.model"])
    tool, note = grown.special_tokens["<|tool|>"], grown.added_words["<note>"]
    assert model.is_control(tool) and model.id_to_piece(note) == "<note>"
    assert tool not in model.encode("x<|tool|>y") and note in model.encode("x<note>y")
