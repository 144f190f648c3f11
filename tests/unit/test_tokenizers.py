"""Tokenizers: text never becomes a special token, offsets are exact, ids are those of the reference libraries, settings are found."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.tokenizers import CONFIG, SPECIAL, corpus, make_hf_tokenizer, make_prefixing_tokenizer, make_sp_tokenizer
from torchft.errors import DataError
from torchft.tokenizers.load import load_tokenizer

LOOKALIKES = ["<|im_end|>", "<|im_end|><|im_start|>system", "a<|endoftext|> b", "<s>", "</s>[INST]", "x <|im_start|>", "<|<|im_end|>|>"]
TEXTS = ["", "The red boat", " lead", "a  b\n\n\nc ", "é😀日本 naïve", "user\nhi", "12 apples!", "\n", "[INST] x [/INST]", *corpus()[:5]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def hf(folder):
    return load_tokenizer(make_hf_tokenizer(folder / "hf"))


@pytest.fixture(scope="module")
def sp(folder):
    return load_tokenizer(make_sp_tokenizer(folder / "sp"))


@pytest.fixture(scope="module")
def unigram(folder):
    return load_tokenizer(make_sp_tokenizer(folder / "unigram", model_type="unigram"))


@pytest.fixture(params=["hf", "sp", "unigram"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def special_in(tokenizer, ids) -> set[int]:
    unknown = tokenizer.special_tokens.get("<unk>")
    return {i for i in ids if i in tokenizer.special_tokens.values() and i != unknown}


@pytest.mark.parametrize("text", LOOKALIKES)
def test_text_never_becomes_special(tokenizer, text):
    """Text that looks like a special token gives ordinary ids, alone and beside real special tokens, and decodes to itself."""
    assert not special_in(tokenizer, tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    end = tokenizer.special_tokens["<|im_end|>"]
    assert special_in(tokenizer, tokenizer.encode_parts([end, text, end]).ids.tolist()) == {end}
    assert tokenizer.encode_parts([end, text, end]).ids.tolist().count(end) == 2


@pytest.mark.parametrize("text", LOOKALIKES)
def test_lookalikes_are_the_models_own_pieces(hf, folder, text):
    """Text that looks special is split as the same model without any added token splits it."""
    from tokenizers import Tokenizer

    bare = json.loads((folder / "hf" / "tokenizer.json").read_text()) | {"added_tokens": []}
    assert hf.encode(text) == Tokenizer.from_str(json.dumps(bare)).encode(text, add_special_tokens=False).ids


@given(text=st.lists(st.sampled_from([*"ab <|>/s_\n😀é", "<|im_end|>", "<s>", "</s>"])).map("".join))
def test_no_text_becomes_special(hf, sp, unigram, text):
    """The same for any mixture of markup, letters and spaces; the text comes back."""
    for tokenizer in (hf, sp, unigram):
        ids = tokenizer.encode(text)
        assert not special_in(tokenizer, ids)
        if tokenizer is hf:
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_cover_the_text(tokenizer, text):
    """Spans begin at 0, end at the end, leave no gap, and each token decodes to its span if it is whole characters."""
    ids, spans = tokenizer.encode_offsets(text)
    assert ids == tokenizer.encode(text)
    assert len(ids) == len(spans)
    at = 0
    for start, end in spans:
        assert start <= at <= end  # bytes of one character share its span
        at = end
    assert at == len(text)


def test_parts(tokenizer):
    """Ids stand in the parts' order with their own text as span; two texts side by side are a boundary; empty texts are nothing."""
    end, start = tokenizer.special_tokens["<|im_end|>"], tokenizer.special_tokens["<|im_start|>"]
    text, offset = "<|im_start|>The red boat sails<|im_end|><|im_end|>", len("<|im_start|>")
    whole = tokenizer.encode_parts([start, "The red boat sails", end, end])
    cut = next(a + 1 for a, b in zip(whole.starts, whole.ends) if a > offset and b > a + 1 and text[a] != "<")  # inside a token
    pieces = tokenizer.encode_parts(["", start, text[offset:cut], "", text[cut : cut + 5], text[cut + 5 : -20], end, end, ""])
    ids, starts, ends = pieces.ids.tolist(), pieces.starts.tolist(), pieces.ends.tolist()
    assert [(i, text[a:b]) for i, a, b in zip(ids, starts, ends) if i in (start, end)] == [
        (start, "<|im_start|>"),
        (end, "<|im_end|>"),
        (end, "<|im_end|>"),
    ]
    assert not any(a < place < b for a, b in zip(starts, ends) for place in (cut, cut + 5))
    assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.decode(ids) == "The red boat sails"


@given(parts=st.lists(st.sampled_from([*SPECIAL, "The red", " boat", "\n", "user\n", "😀", "  ", "12"]), max_size=8))
def test_parts_are_what_transformers_gives(hf, folder, parts):
    """A text with special tokens, given as parts, has the ids that transformers finds in it."""
    reference = reference_hf(folder / "hf")
    merged = "".join(parts)
    split, text = [], ""
    for part in parts:
        if part in SPECIAL:
            split += [text, hf.special_tokens[part]]
            text = ""
        else:
            text += part
    assert hf.encode_parts([*split, text]).ids.tolist() == reference(merged, add_special_tokens=False)["input_ids"]


def reference_hf(folder):
    from transformers import PreTrainedTokenizerFast

    if folder not in REFERENCES:
        REFERENCES[folder] = PreTrainedTokenizerFast.from_pretrained(folder)
    return REFERENCES[folder]


REFERENCES: dict = {}


def reference_llama(folder):
    """transformers' Llama tokenizer (legacy=False) over the same vocabulary; it reads tokenizer.model itself only with protobuf."""
    from transformers import LlamaTokenizer
    from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

    vocab, _, merges = SentencePieceExtractor(str(folder / "tokenizer.model")).extract(vocab_scores=True)
    return LlamaTokenizer(vocab=vocab, merges=merges, legacy=False, additional_special_tokens=list(SPECIAL[1:3]))


def test_sentencepiece_is_what_transformers_gives(sp, folder):
    """Ids equal transformers' Llama tokenizer: the prefix space at the beginning only, none after special tokens, spaces kept."""
    reference = reference_llama(folder / "sp")
    start, end = (sp.special_tokens[t] for t in SPECIAL[1:3])
    for text in TEXTS:
        assert sp.encode(text) == reference.encode(text, add_special_tokens=False), text
        ids = sp.encode_parts([start, text, end, text]).ids.tolist()
        assert ids == reference.encode(f"<|im_start|>{text}<|im_end|>{text}", add_special_tokens=False), text


def test_sentencepiece_plain_text_is_the_models_own(unigram, folder):
    """Plain text has the ids of the SentencePiece library."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "unigram" / "tokenizer.model"))
    for text in corpus():
        assert unigram.encode(text) == model.encode(text)


def test_whitespace_flags(tmp_path):
    """A special token that swallows the white space beside it (lstrip, rstrip) does so here as in the library."""
    from tokenizers import AddedToken, Tokenizer

    make_hf_tokenizer(tmp_path)
    tok = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tok.add_special_tokens([AddedToken("<|end|>", rstrip=True), AddedToken("<mask>", lstrip=True)])
    tok.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    parts = ["a ", ours.special_tokens["<|end|>"], "\n b  ", ours.special_tokens["<mask>"], " c"]
    assert ours.encode_parts(parts).ids.tolist() == tok.encode("a <|end|>\n b  <mask> c", add_special_tokens=False).ids


def test_special_token_in_a_unigram_vocabulary(tmp_path):
    """A tokenizer.json whose unigram model holds its special tokens as pieces still makes none out of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = [(c, -4.0) for c in "▁<>/sab"]
    tok = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *letters], unk_id=0))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tok.add_special_tokens(["</s>", "<unk>"])
    tok.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "unk_token": "<unk>"}))
    with pytest.raises(DataError, match="can't be cut before '/s>'"):  # the cut would get a space
        load_tokenizer(tmp_path).encode("a</s>")
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(prepend_scheme="never"), decoders.Metaspace(prepend_scheme="never")
    tok.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert ours.eos_id not in ours.encode("a</s>b")
    assert ours.decode(ours.encode("a</s>b")) == "a</s>b"


def test_old_llama_prefix(tmp_path):
    """A tokenizer that puts a space before each stretch of text: ids as the library gives, cuts only where a token ends anyway."""
    from tokenizers import Tokenizer

    ours = load_tokenizer(make_prefixing_tokenizer(tmp_path))
    tok = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    expected = tok.encode("<s>The boat answers</s>user", add_special_tokens=False).ids
    assert ours.encode_parts([ours.bos_id, "The boat", " answers", ours.eos_id, "user"]).ids.tolist() == expected
    with pytest.raises(DataError, match="can't be cut before 'd boat'"):
        ours.encode_parts([ours.bos_id, "The re", "d boat"])


def test_separators_in_text_are_refused(hf):
    """The noncharacters that stand for tokens can't be smuggled in; other noncharacters are text like any."""
    with pytest.raises(DataError, match="noncharacters"):
        hf.encode("x\ufdd0\ufdd1\ufdd0\ufdd2y")
    assert hf.decode(hf.encode("x\ufdd0\ufdd2y")) == "x\ufdd0\ufdd2y"


def test_added_words_are_text(hf):
    """Added tokens that are not special are matched whole in any text, as in the library."""
    assert hf.encode("<think>") == [hf.added_words["<think>"]]
    assert "<think>" not in hf.special_tokens


def test_named_token_is_special_whatever_its_flag(tmp_path):
    """A tokenizer.json that does not mark its eos as special can't let text end a turn either."""
    make_hf_tokenizer(tmp_path, eos_token="</think>")
    ours = load_tokenizer(tmp_path)
    assert ours.special_tokens["</think>"] == ours.eos_id
    assert ours.eos_id not in ours.encode("</think>")
    ids = ours.encode_parts(["a", ours.eos_id]).ids.tolist()
    assert ids[-1] == ours.eos_id and ours.decode(ids) == "a"


def test_settings_in_all_spellings(tmp_path):
    """Names as strings or objects, in either file; an explicit null wins; jinja file before config; several templates; stop ids."""
    plain = load_tokenizer(make_hf_tokenizer(tmp_path / "a", bos_token="<|bos|>"))
    objects = load_tokenizer(make_hf_tokenizer(tmp_path / "b", bos_token={"content": "<|bos|>", "lstrip": False}))
    assert plain.bos_id == objects.bos_id == plain.special_tokens["<|bos|>"]
    assert plain.digest == objects.digest

    make_hf_tokenizer(tmp_path / "c")
    (tmp_path / "c" / "tokenizer_config.json").write_text(json.dumps({"bos_token": None}))
    (tmp_path / "c" / "special_tokens_map.json").write_text(json.dumps({**CONFIG, "bos_token": "<|bos|>"}))
    mapped = load_tokenizer(tmp_path / "c")
    assert mapped.bos_id is None
    assert (mapped.eos_id, mapped.pad_id) == (plain.eos_id, plain.special_tokens["<|endoftext|>"])

    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    make_hf_tokenizer(tmp_path / "d", template=None, chat_template=several)
    assert load_tokenizer(tmp_path / "d").chat_template == "yes"
    (tmp_path / "d" / "chat_template.jinja").write_text("file")
    (tmp_path / "d" / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    last = load_tokenizer(tmp_path / "d")
    assert last.chat_template == "file"
    assert last.stop_ids == {0, 2}
    assert last.to_files() == {p.name: p.read_bytes() for p in (tmp_path / "d").iterdir() if p.name != "generation_config.json"}


def test_pad(tmp_path):
    """Without a pad token eos stands in, without eos 0; where pad is eos it stays so."""
    assert load_tokenizer(make_hf_tokenizer(tmp_path / "a", pad_token=None)).pad_id == 2
    assert load_tokenizer(make_hf_tokenizer(tmp_path / "b", pad_token=None, eos_token=None)).pad_id == 0
    assert load_tokenizer(make_hf_tokenizer(tmp_path / "d", pad_token="[PAD]")).pad_id == 2  # named, but not in the vocabulary
    same = load_tokenizer(make_hf_tokenizer(tmp_path / "c", pad_token="<|im_end|>"))
    assert same.pad_id == same.eos_id == 2


def test_adds_bos(tmp_path, sp):
    """Whether plain text begins with BOS is read from the config, else from what the tokenizer does; encode never adds it."""
    from tokenizers import Tokenizer, processors

    assert not load_tokenizer(make_hf_tokenizer(tmp_path, bos_token="<|bos|>")).adds_bos
    tok = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tok.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", tok.token_to_id("<|bos|>"))])
    tok.save(str(tmp_path / "tokenizer.json"))
    with_bos = load_tokenizer(tmp_path)
    assert with_bos.adds_bos
    assert with_bos.bos_id not in with_bos.encode("The")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": False}))
    assert not load_tokenizer(tmp_path).adds_bos
    assert sp.adds_bos
    assert sp.bos_id not in sp.encode("The")


def test_digest_tells_tokenizers_apart(tmp_path):
    """Same files elsewhere: same digest. Another special token or vocabulary: another."""
    one = load_tokenizer(make_hf_tokenizer(tmp_path / "a")).digest
    assert one == load_tokenizer(make_hf_tokenizer(tmp_path / "b")).digest
    assert one != load_tokenizer(make_hf_tokenizer(tmp_path / "c", eos_token="<|endoftext|>")).digest
    assert one != load_tokenizer(make_sp_tokenizer(tmp_path / "d")).digest


def test_sentencepiece_config(tmp_path):
    """User-defined markup is special unless the config says otherwise; tokens added behind the vocabulary have their ids and text."""
    size = load_tokenizer(make_sp_tokenizer(tmp_path / "a")).vocab_size
    decoder = {"3": {"content": "<|im_start|>", "special": False}, str(size + 1): {"content": "<|new|>", "special": True}}
    ours = load_tokenizer(make_sp_tokenizer(tmp_path / "b", added_tokens_decoder=decoder, eos_token="<|new|>"))
    assert "<|im_start|>" not in ours.special_tokens
    assert 3 in ours.encode("<|im_start|>")
    assert (ours.eos_id, ours.vocab_size) == (size + 1, size + 2)
    ids = ours.encode_parts(["The boat", ours.eos_id, " a"]).ids.tolist()
    assert ours.decode(ids, skip_special=False) == "The boat<|new|> a"
    assert ours.decode(ids) == "The boat a"
    assert ours.eos_id not in ours.encode("<|new|>")


def test_errors(tmp_path):
    """No tokenizer, damaged files, a config of another model: DataError with what is there and what to do."""
    with pytest.raises(DataError, match="no such folder"):
        load_tokenizer(tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"given:    notes.txt\n  expected: tokenizer.json, or tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="not a tokenizer.json"):
        load_tokenizer(tmp_path)
    make_hf_tokenizer(tmp_path, eos_token="<|other|>")
    with pytest.raises(DataError, match=r"names <\|other\|>"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{'a'}")
    with pytest.raises(DataError, match="tokenizer_config.json: not readable as JSON"):
        load_tokenizer(tmp_path)
    broken = tmp_path / "sp"
    broken.mkdir()
    (broken / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        load_tokenizer(broken)
