"""Plain text as documents: split where it is said to be, nothing lost, every error names file and line."""

import json

import numpy as np
import pytest

from tests.helpers.tokenizers import make_hf_tokenizer
from torchft.data.text import TextConfig, TextDataConfig, encode_document, open_documents
from torchft.errors import DataError
from torchft.tokenizers.load import load_tokenizer


def write(path, data: str | bytes) -> str:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def read_all(path, **options) -> list[tuple[str, str]]:
    """(text, where) of each document."""
    records = open_documents(TextConfig(path=str(path), **options))
    return [(record[options.get("text_key", "text")], where) for _, record, where in records.read(0, len(records))]


def test_a_file_is_a_document(tmp_path):
    """A folder of text files: one document each, in the order of their names, without the line breaks at the ends; other files stay out."""
    write(tmp_path / "b.txt", "\n\nsecond\n\nstill second\n")
    write(tmp_path / "a.md", "\ufeff# first\r\nline\r\n")
    write(tmp_path / "c.py", "no text")
    write(tmp_path / "d.txt", " \n\n")
    a, b = str(tmp_path / "a.md"), str(tmp_path / "b.txt")
    assert read_all(tmp_path) == [("# first\nline", f"{a}:1"), ("second\n\nstill second", f"{b}:3")]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_split_at_blank_lines(tmp_path, end):
    """Any number of blank lines, spaces in them or not, is one border; lines are those of the file."""
    text = end.join(["", "one", "two", "", " \t", "three é", "", "", "", "  four", "", ""])
    path = write(tmp_path / "a.txt", text)
    assert read_all(path, separator="blank_lines") == [
        ("one\ntwo", f"{path}:2"),
        ("three é", f"{path}:6"),
        ("  four", f"{path}:10"),
    ]


@pytest.mark.parametrize("separator", ["<|endoftext|>", ".*", "é"])
def test_split_at_a_separator(tmp_path, separator):
    """Taken to the letter, never as a pattern; blank pieces are no documents."""
    path = write(tmp_path / "a.txt", separator.join(["one", "\ntwo x\n", "", " \n", "three"]))
    assert [text for text, _ in read_all(path, separator=separator)] == ["one", "two x", "three"]
    assert [where.rsplit(":", 1)[1] for _, where in read_all(path, separator=separator)] == ["1", "2", "4"]


def test_json_records(tmp_path):
    """JSON Lines and arrays, the text under a key of one's own; mixed with text files by a glob; any slice can be read."""
    write(tmp_path / "a.jsonl", "".join(json.dumps({"body": f"doc {i}\r\n", "n": i}) + "\n" for i in range(4)))
    write(tmp_path / "b.json", json.dumps([{"body": "doc 4"}, {"body": "doc 5"}]))
    write(tmp_path / "c.txt", "doc 6")
    records = open_documents(TextConfig(path=f"{tmp_path}/*", text_key="body"))
    assert [record["body"].strip() for _, record, _ in records.read(0, 7)] == [f"doc {i}" for i in range(7)]
    assert [i for i, _, _ in records.read(3, 6)] == [3, 4, 5]
    assert len(open_documents(TextConfig(path=f"{tmp_path}/*", text_key="body", max_samples=2))) == 2


def test_digest_tells_what_the_documents_are(tmp_path):
    """Another text, separator or key is another digest: no tokens of an old cache are read; another name is not."""
    path = write(tmp_path / "a.txt", "one\n\ntwo")
    same = write(tmp_path / "b.txt", "one\n\ntwo")
    digests = [open_documents(TextConfig(path=path, **o)).digest for o in ({}, {"separator": "blank_lines"}, {"text_key": "x"})]
    assert len(set(digests)) == 3 and open_documents(TextConfig(path=same)).digest == digests[0]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"fine\nbad \xff", r"a.txt:2:5: the byte 0xff is not UTF-8"),
        ("a.txt", b"\xff\xfea\x00", "UTF-16"),
        ("a.txt.gz", b"\x1f\x8b\x08", "damaged or cut compressed"),
        ("a.txt", b" \n", "no record"),
        ("a.txt", b"", "no record"),
        ("a.doc", b"text\n", "told by the name's ending"),
        ("a.jsonl", b'{"text": "a"}\n{"text": }\n', "a.jsonl:2"),
    ],
)
def test_wrong_files(tmp_path, name, data, message):
    """What is no text, or holds none, is an error with its place."""
    with pytest.raises(DataError, match=message):
        read_all(write(tmp_path / name, data))


def test_document_tokens(tmp_path):
    """BOS where the tokenizer adds one, the text's own tokens, EOS; all trained but the first. Special tokens in the text stay text."""
    make_hf_tokenizer(tmp_path / "plain")
    tokenizer = load_tokenizer(tmp_path / "plain")
    text = "Nobody answers <|im_end|> twice"
    encoded = encode_document({"text": f"\n{text}\n"}, "here", text_key="text", tokenizer=tokenizer)
    assert encoded.ids.tolist() == [*tokenizer.encode(text), tokenizer.eos_id] and tokenizer.eos_id not in encoded.ids[:-1]
    assert encoded.weights.tolist() == [0, *[1] * (len(encoded.ids) - 1)] and encoded.ids.dtype == np.int32
    make_hf_tokenizer(tmp_path / "bos", bos_token="<|bos|>", add_bos_token=True)
    with_bos = encode_document({"text": text}, "here", text_key="text", tokenizer=load_tokenizer(tmp_path / "bos"))
    assert with_bos.ids.tolist() == [tokenizer.special_tokens["<|bos|>"], *encoded.ids.tolist()]


@pytest.mark.parametrize("record", [{"text": " \n"}, {"text": ""}])
def test_empty_records_are_counted_out(tmp_path, record):
    """An empty record is None: the cache counts and prints it."""
    make_hf_tokenizer(tmp_path)
    assert encode_document(record, "here", text_key="text", tokenizer=load_tokenizer(tmp_path)) is None


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"content": "a"}, "x.jsonl:3: no text[\\s\\S]*keys are content[\\s\\S]*text_key"),
        ({"text": ["a"]}, "given:    list"),
        ({"text": "\ud800"}, "x.jsonl:3"),
    ],
)
def test_records_without_text(tmp_path, record, message):
    """No text under the key, something else there, or half a character: an error that names the record."""
    make_hf_tokenizer(tmp_path)
    with pytest.raises(DataError, match=message):
        encode_document(record, "x.jsonl:3", text_key="text", tokenizer=load_tokenizer(tmp_path))


def test_no_end_token(tmp_path):
    """A tokenizer without EOS can't end documents."""
    make_hf_tokenizer(tmp_path, eos_token=None)
    with pytest.raises(DataError, match="eos_token"):
        encode_document({"text": "a"}, "here", text_key="text", tokenizer=load_tokenizer(tmp_path))


def test_config_checks_itself():
    """Each bad value is a problem under its own key; a good section has none."""
    bad = TextDataConfig(train=[], seq_len=1, window=0, workers=-1)
    assert {problem.key for problem in bad.check()} == {"data.train", "data.seq_len", "data.window", "data.workers"}
    assert {problem.key for problem in TextConfig(path="a", max_samples=0, separator="").check()} == {"max_samples", "separator"}
    assert not list(TextDataConfig(train=[TextConfig(path="a.txt")]).check()) and not list(TextConfig(path="a.txt").check())
