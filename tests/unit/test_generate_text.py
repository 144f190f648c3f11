"""Text as it comes: pieces joined are the whole text, characters are whole, stop texts are found across tokens and never shown."""

import random

import pytest

from tests.helpers.tokenizers import (
    make_byte_fallback_tokenizer,
    make_hf_tokenizer,
    make_rank_tokenizer,
    make_sp_tokenizer,
    make_tekken_tokenizer,
)
from torchft.generate.text import Detokenizer, SampleText, StopTexts
from torchft.tokenizers.load import load_tokenizer

TEXTS = ["Hello world", " leading", "naïve café 日本語 😀👩‍👩‍👧 é\u0301", "a\n\nb  c", "x" * 40, "¡ñandú! \ufffd ok", "日", " ", "  two"]


MAKERS = {
    "bpe": make_hf_tokenizer,
    "sentencepiece": make_sp_tokenizer,
    "byte fallback": make_byte_fallback_tokenizer,
    "ranks": make_rank_tokenizer,
    "tekken": make_tekken_tokenizer,
}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request, tmp_path_factory):
    return load_tokenizer(MAKERS[request.param](tmp_path_factory.mktemp(request.param)))


def pieces(tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_joined_are_the_text(tokenizer, text):
    """For accents, emoji of several code points and spaces the pieces are the decoded text, without half characters."""
    ids = tokenizer.encode(text)
    got = pieces(tokenizer, ids)
    assert "".join(got) == tokenizer.decode(ids)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in got)


def test_a_character_over_several_tokens_comes_once_and_whole(tokenizer):
    """An emoji that takes several tokens gives nothing until its last one."""
    ids = tokenizer.encode("a👩")
    got = pieces(tokenizer, ids)
    assert len(ids) > 3 and [p for p in got if p][-1] == "👩" and "".join(got) == tokenizer.decode(ids)


def test_any_ids(tokenizer):
    """Random ids, most of them broken UTF-8, special tokens between: joined pieces equal the text decoded at once, 300 times."""
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 40))]
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids), ids


def test_special_tokens_between_sentencepiece_texts(tmp_path):
    """Spaces after a special token in the middle are kept, those of the beginning dropped, as in the text decoded at once."""
    tokenizer = load_tokenizer(make_sp_tokenizer(tmp_path))
    special = tokenizer.special_tokens["<|im_end|>"]
    words = [tokenizer.encode(word) for word in (" The", "The", " ", "é 😀", "  user")]
    space = next(i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]) == "" and tokenizer.decode([*words[1], i]) == "The ")
    words += [[space], [space]]  # a space alone has no text of its own at the beginning
    rng = random.Random(1)
    for _ in range(200):
        ids = [i for _ in range(6) for i in (rng.choice(words) if rng.random() < 0.7 else [special])]
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids), ids


def test_only_a_few_tokens_are_decoded_at_once(tokenizer):
    """The work per token does not grow with the text: no call decodes more than a dozen of 400 tokens."""
    seen = []

    class Spy:
        def decode(self, ids):
            seen.append(len(ids))
            return tokenizer.decode(ids)

    ids = (tokenizer.encode("The red boat sails over the lake. ") * 50)[:400]
    detokenizer = Detokenizer(Spy())
    for i in ids:
        detokenizer.push(i)
    assert max(seen) <= 12


@pytest.mark.parametrize("stops", [["\nUser:"], ["END", "\nUser:", "User"], ["aab"], ["日本"], ["zzz"]])
def test_stop_texts_in_any_pieces(stops):
    """However the text is cut into pieces, what is given is the text before the first stop text, never a part of one."""
    text = "aaab says hi.\nUser: 日本 END more"
    at = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    want = text[: min(at)[1]] if at else text  # the one that is complete first
    rng = random.Random(2)
    for _ in range(200):
        cuts = sorted(rng.sample(range(len(text) + 1), rng.randrange(0, 12)))
        watcher, got = StopTexts(stops), ""
        for start, end in zip([0, *cuts], [*cuts, len(text)]):
            got += watcher.push(text[start:end])
            assert want.startswith(got)
        assert got + watcher.flush() == want and watcher.stopped == bool(at)


def test_a_stop_text_that_does_not_come_is_text_after_all(tokenizer):
    """The beginning of a stop text at the end of a sample is given when the sample ends."""
    sample = SampleText(tokenizer, ["boat!"])
    for i in tokenizer.encode("the boat"):
        sample.push(i)
    assert not sample.text.endswith("boat")
    sample.flush()
    assert sample.text == tokenizer.decode(tokenizer.encode("the boat")) and not sample.stopped


def test_byte_tokens_between_others(tmp_path):
    """Whole characters are kept beside broken bytes; a text without those is decoded as the library does, leading space included."""
    from tokenizers import Tokenizer

    folder = make_byte_fallback_tokenizer(tmp_path)
    tokenizer, library = load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ["日本 語", "日", " a 日 b", "The red boat 😀😀"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == library.decode(ids) == text.removeprefix(" ")
    first, second = tokenizer.encode("日"), tokenizer.encode("本")
    first, second = first[-3:], second[-3:]
    assert tokenizer.decode([*first, second[0]]) == "日\ufffd"
    assert pieces(tokenizer, [*first, *second]) == ["", "", "日", "", "", "本", ""]
