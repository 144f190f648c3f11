"""Rank files (tiktoken, tekken): ids of the tiktoken library, text never special, exact characters, long and odd texts, tokenizer.json."""

import json
import time
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.tokenizers import make_hf_tokenizer, make_rank_tokenizer, make_sp_tokenizer, make_tekken_tokenizer
from torchft.errors import DataError
from torchft.tokenizers.load import load_tokenizer
from torchft.tokenizers.nfc import compose
from torchft.tokenizers.rank_files import KINDS, TEKKEN_SPECIAL, read_rank_file

KIND_NAMES = ["llama3", "qwen", "cl100k_base", "o200k_base", "r50k_base", "o200k_harmony"]
ATOMS = [*"ab Z1\n\t'/-!", "  ", "\r\n", "e\u0301", "é", "日本", "😀", "\u1112\u1161\u11ab", "\0", "'ll", "user\n", "\u0300", "\u3000"]
MARKS = ["<|eot_id|>", "<|im_end|>", "<|endoftext|>", "<|end|>", "[INST]", "</s>", "<SPECIAL_3>", "<|start_header_id|>system"]
MIXED = st.lists(st.sampled_from([*ATOMS, *MARKS]), max_size=30).map("".join)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """All rank tokenizers by name, and each opened again from the files it exports."""
    folder = tmp_path_factory.mktemp("ranks")
    found = {kind: load_tokenizer(make_rank_tokenizer(folder / kind, kind)) for kind in KIND_NAMES}
    return found | {"tekken": load_tokenizer(make_tekken_tokenizer(folder / "tekken"))}


@pytest.fixture(scope="module")
def exported(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    return {name: load_tokenizer(write(tokenizer.to_files(), folder / name)) for name, tokenizer in ours.items()}


def write(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def library(folder: Path, kind: str):
    """The tiktoken library with the same ranks, by its own reader."""
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(folder / "tokenizer.model"))
    return tiktoken.Encoding("reference", pat_str=KINDS[kind].words, mergeable_ranks=ranks, special_tokens={})


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_ids_are_the_librarys(tmp_path, kind):
    """For any mixture of letters, marks, white space and odd characters (in NFC for Qwen)."""
    mine, reference = load_tokenizer(make_rank_tokenizer(tmp_path / "m", kind)), library(tmp_path / "m", kind)

    @given(MIXED)
    def holds(text):
        assert mine.encode(text) == reference.encode_ordinary(unicodedata.normalize("NFC", text) if kind == "qwen" else text)

    holds()


@given(MIXED)
def test_text_never_becomes_special(ours, text):
    """Whatever it looks like; it decodes to itself, and its spans begin at 0, end at its end and leave no gap."""
    for name, tokenizer in ours.items():
        pieces = tokenizer.encode_parts([text])
        assert not set(pieces.ids.tolist()) & set(tokenizer.special_tokens.values()), name
        assert tokenizer.decode(pieces.ids) == (unicodedata.normalize("NFC", text) if name == "qwen" else text)
        at = 0
        for start, end in zip(pieces.starts, pieces.ends):
            assert start <= at <= end
            at = end
        assert at == len(text)


def test_every_special_token_in_text(ours):
    """The text of each special token of each kind, inside a text and between real ones: only those given by id come out as special."""
    for tokenizer in ours.values():
        real = next(iter(tokenizer.special_tokens.values()))
        for text in tokenizer.special_tokens:
            ids = tokenizer.encode_parts([real, f"a{text}b", real, text]).ids.tolist()
            assert [i for i in ids if i in tokenizer.special_tokens.values()] == [real, real]


@given(MIXED)
def test_exported_files_give_the_same_ids(ours, exported, text):
    """tokenizer.json, made from the ranks, encodes as the ranks do."""
    for name, tokenizer in ours.items():
        assert exported[name].encode(text) == tokenizer.encode(text), name


def test_every_cut_of_a_token_is_a_merge(tmp_path):
    """Tokens that can be joined from either side: whichever pair has the lower rank goes first, in tokenizer.json as in the ranks."""
    import base64

    tokens = [bytes([i]) for i in range(256)] + [b"bc", b"abc", b"ab", b"de", b"def", b"ef", b"cd", b"abcd"]
    make_rank_tokenizer(tmp_path / "a")
    lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (tmp_path / "a" / "tokenizer.model").write_text(lines)
    ours = load_tokenizer(tmp_path / "a")
    exported = load_tokenizer(write(ours.to_files(), tmp_path / "b"))
    words = ["xabcx", "xdefx", "xabcdx", "abcdef", "xefx", "xcdefabc", "dedefef", "ababcbc"]
    assert [exported.encode(word) for word in words] == [ours.encode(word) for word in words]
    assert ours.encode("xdefx") == [120, 260, 120] and ours.encode("xabcx") == [120, 257, 120]


def test_exported_files_say_the_same(ours, exported):
    """Special tokens, names, BOS and size survive."""
    for name, tokenizer in ours.items():
        for field in ("special_tokens", "named_tokens", "adds_bos", "bos_id", "eos_id", "pad_id", "vocab_size", "chat_template"):
            assert getattr(exported[name], field) == getattr(tokenizer, field), (name, field)


def test_transformers_reads_the_exported_files(ours, tmp_path):
    """With BOS where the model was pretrained with it, and special tokens found in its own way of writing them."""
    transformers = pytest.importorskip("transformers")
    for name, tokenizer in ours.items():
        theirs = transformers.AutoTokenizer.from_pretrained(write(tokenizer.to_files(), tmp_path / name))
        text = "The red boat 12 sails\n café"
        bos = [tokenizer.bos_id] if tokenizer.adds_bos else []
        assert theirs.encode(text) == bos + tokenizer.encode(text), name
        eos = tokenizer.named_tokens["eos_token"]
        assert (theirs.eos_token, theirs.encode(text + eos)[-1]) == (eos, tokenizer.eos_id)
        assert len(theirs) == len(tokenizer.special_tokens) + len(tokenizer._ids)


def test_parts(ours):
    """Ids stand in the parts' order with their own text as span; two texts side by side are a boundary; empty texts are nothing."""
    tokenizer = ours["llama3"]
    start, end = (tokenizer.special_tokens[t] for t in ("<|start_header_id|>", "<|eot_id|>"))
    text = "<|start_header_id|>The ré😀d boat<|eot_id|>"
    pieces = tokenizer.encode_parts(["", start, "The r", "é😀d", " boat", "", end])
    words = {(text[a:b], i) for i, a, b in zip(pieces.ids.tolist(), pieces.starts, pieces.ends) if i in (start, end)}
    assert words == {("<|start_header_id|>", start), ("<|eot_id|>", end)}
    assert not any(a < 24 < b or a < 27 < b for a, b in zip(pieces.starts, pieces.ends))
    assert tokenizer.decode(pieces.ids, skip_special=False) == text and tokenizer.decode(pieces.ids) == "The ré😀d boat"
    emoji = text.index("😀")
    assert [(a, b) for a, b in zip(pieces.starts, pieces.ends) if a == emoji] == [(emoji, emoji + 1)] * 4  # its four bytes
    assert tokenizer.encode_parts([]).ids.shape == tokenizer.encode_parts([""]).ids.shape == (0,)


@given(st.text(st.sampled_from("ae\u0301\u0300\u0323 \u00e9\u1112\u1161\u11ab\u09c7\u09be\u0344\u212bx")))
def test_compose_is_nfc_with_the_way_back(text):
    """Equal to unicodedata's NFC; each composed character comes from the text at its place, in order, none lost."""
    composed, origin = compose(text)
    assert composed == unicodedata.normalize("NFC", text)
    if origin is None:
        assert composed == text
        return
    assert len(origin) == len(composed) + 1 and origin[0] == 0 and origin[-1] == len(text) and (origin[1:] >= origin[:-1]).all()
    cuts = sorted(set(origin.tolist()))
    parts = [unicodedata.normalize("NFC", text[a:b]) for a, b in pairwise(cuts)]
    assert "".join(parts) == composed


def reference_cuts(text: str) -> list[str]:
    """Llama 3's reference, character by character: windows of 400,000, then runs of at most 25,000 with or without white space."""
    pieces = []
    for first in range(0, len(text), 400_000):
        window, start, length, space = text[first : first + 400_000], 0, 0, None
        for i, character in enumerate(window):
            if character.isspace() != space:
                length, space = 1, character.isspace()
                continue
            length += 1
            if length > 25_000:
                pieces.append(window[start:i])
                start, length = i, 1
        pieces.append(window[start:])
    return pieces


@pytest.mark.parametrize(
    "text",
    ["answers" * 9_001, "x " + " " * 30_000 + "y", "ab " * 150_000, "word " * 3 + "é" * 25_001 + " end", "a" * 25_000 + " " + "b" * 25_000],
    ids=["letters", "spaces", "long", "accents", "just not"],
)
def test_long_texts_are_cut_as_the_reference_does(ours, text):
    """Llama 3: ids of the reference's pieces one after the other; the spans still cover the text."""
    tokenizer = ours["llama3"]
    pieces = tokenizer.encode_parts([text])
    want = [i for piece in reference_cuts(text) for i in tokenizer._core.encode_ordinary(piece)]
    assert pieces.ids.tolist() == want
    assert pieces.ends[-1] == len(text) and (pieces.starts[1:] <= pieces.ends[:-1]).all()


@pytest.mark.parametrize("character", ["a", " ", "日", "\u0301"])
def test_a_million_of_one_character(ours, character, tmp_path):
    """1 MB of one character is encoded by every format within seconds, and comes back."""
    more = {"hf": make_hf_tokenizer(tmp_path / "hf"), "sp": make_sp_tokenizer(tmp_path / "sp")}
    more["unigram"] = make_sp_tokenizer(tmp_path / "unigram", model_type="unigram")
    text = "a" + character * (1_000_000 // len(character.encode()))
    tokenizers = {name: ours[name] for name in ("llama3", "qwen", "tekken")} | {name: load_tokenizer(path) for name, path in more.items()}
    for name, tokenizer in tokenizers.items():
        began = time.process_time()  # of this process: the machine may be busy
        ids = tokenizer.encode(text)
        assert time.process_time() - began < 20, name
        assert tokenizer.decode(ids) == (unicodedata.normalize("NFC", text) if name == "qwen" else text), name


def test_odd_texts(ours, tmp_path):
    """Half a surrogate pair is an error that shows it, in every format; NUL and the empty text are texts."""
    more = {"hf": load_tokenizer(make_hf_tokenizer(tmp_path / "hf")), "sp": load_tokenizer(make_sp_tokenizer(tmp_path / "sp"))}
    for tokenizer in {**ours, **more}.values():
        with pytest.raises(DataError, match=r"half a surrogate pair, '\\ud83d', in 'so \\ud83d is it'"):
            tokenizer.encode("so \ud83d is it")
        assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""
        assert tokenizer.decode(tokenizer.encode("a\0b\0")) == "a\0b\0"


def test_kind_by_config_name_or_size(tmp_path):
    """rank_kind, else the file's name, else the number of ranks; a file that none of them tells is an error with the fix."""
    make_rank_tokenizer(tmp_path / "a", "o200k_base", file="o200k_base.tiktoken")
    (tmp_path / "a" / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path / "a").eos_id == 401
    make_rank_tokenizer(tmp_path / "b", "llama3")
    (tmp_path / "b" / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match=r'400 ranks in a file(.|\n)*"rank_kind": "llama3"'):
        load_tokenizer(tmp_path / "b")
    make_rank_tokenizer(tmp_path / "c", rank_kind="lama3")
    with pytest.raises(DataError, match="did you mean llama3"):
        load_tokenizer(tmp_path / "c")
    make_rank_tokenizer(tmp_path / "d", "qwen", file="other.tiktoken")
    with pytest.raises(DataError, match=r"2 tokenizers\n  given:    \w+.tiktoken, other.tiktoken"):
        load_tokenizer(make_rank_tokenizer(tmp_path / "d", "qwen", file="another.tiktoken"))
    assert load_tokenizer(tmp_path / "d" / "other.tiktoken").eos_id == 400


def test_config_beside_a_rank_file(tmp_path):
    """Special tokens of added_tokens_decoder replace the kind's; words among them are matched whole; names and BOS as it says."""
    decoder = {"400": {"content": "<|end|>", "special": True}, "401": {"content": "<think>", "special": False}}
    config = {"eos_token": "<|end|>", "bos_token": "<|end|>", "add_bos_token": False, "chat_template": "x"}
    tokenizer = load_tokenizer(make_rank_tokenizer(tmp_path / "a", added_tokens_decoder=decoder, **config))
    assert (tokenizer.special_tokens, tokenizer.added_words, tokenizer.vocab_size) == ({"<|end|>": 400}, {"<think>": 401}, 402)
    assert not tokenizer.adds_bos and tokenizer.bos_id == 400 and tokenizer.chat_template == "x"
    pieces = tokenizer.encode_parts(["é <think>a"])
    assert 401 in pieces.ids and (2, 9) in zip(pieces.starts.tolist(), pieces.ends.tolist())
    assert tokenizer.decode(pieces.ids) == "é <think>a"
    with pytest.raises(DataError, match=r"names <\|no\|>"):
        load_tokenizer(make_rank_tokenizer(tmp_path / "b", eos_token="<|no|>"))


def test_tekken_special_tokens(tmp_path, ours):
    """The file's own, the published ones where an old file has none, fillers for the rest; a new file without them is an error."""
    assert list(ours["tekken"].special_tokens.values()) != [] and set(TEKKEN_SPECIAL) == set(ours["tekken"].special_tokens)
    assert (ours["tekken"].bos_id, ours["tekken"].eos_id, ours["tekken"].pad_id, ours["tekken"].vocab_size) == (1, 2, 11, 400)
    listed = [{"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(["<unk>", "<s>", "</s>", "[THINK]"])]
    own = load_tokenizer(make_tekken_tokenizer(tmp_path / "a", version="v13", special=listed))
    assert own.special_tokens["[THINK]"] == 3 and own.special_tokens["<SPECIAL_4>"] == 4 and len(own.special_tokens) == 20
    with pytest.raises(DataError, match="version v13 without special_tokens"):
        load_tokenizer(make_tekken_tokenizer(tmp_path / "b", version="v13"))


@pytest.mark.parametrize(
    "content, words",
    [
        ("YQ== 0\nnonsense\n", "tokenizer.model:2: given b'nonsense'"),
        ("YQ== 0\n", "no token for byte 0"),
        ("YQ=b= 0\n", "not a SentencePiece model"),
    ],
)
def test_damaged_rank_files(tmp_path, content, words):
    """A line that is none, bytes without tokens, something else entirely."""
    make_rank_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text(content)
    with pytest.raises(DataError, match=words):
        load_tokenizer(tmp_path)


def test_damaged_tekken(tmp_path):
    """No JSON, no vocabulary, tokens missing, a token that is no base64: DataError, nothing else."""
    path = make_tekken_tokenizer(tmp_path) / "tekken.json"
    good = json.loads(path.read_text())
    token = {"rank": 0, "token_bytes": "?", "token_str": None}
    for bad in (
        "{",
        "[]",
        "{}",
        json.dumps(good | {"vocab": good["vocab"][1:]}),
        json.dumps(good | {"vocab": [token, *good["vocab"][1:]]}),
    ):
        path.write_text(bad)
        with pytest.raises(DataError, match="take the file again"):
            read_rank_file(path)


def test_digest(tmp_path):
    """Equal for equal files; another for another kind or another special token, whose ids differ."""
    one, same = (load_tokenizer(make_rank_tokenizer(tmp_path / name, "o200k_base")) for name in "ab")
    other = load_tokenizer(make_rank_tokenizer(tmp_path / "c", "o200k_base", rank_kind="o200k_harmony"))
    assert one.digest == same.digest != other.digest
