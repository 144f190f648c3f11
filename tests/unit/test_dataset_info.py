"""Entries of a dataset_info.json: each schema's records as LLaMA-Factory means them, and an error for what we don't read."""

import json

import pytest

from torchft.data.formats import read_record
from torchft.data.sources import SourceConfig, mapping_of, open_records, resolve
from torchft.data.types import Document, Labelled, Message, Pair
from torchft.errors import DataError

ROLES = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
CASES = {  # name -> (entry, record, what is read)
    "alpaca": (
        {},
        {"instruction": "q", "input": "i", "output": "a", "system": "not named: not used"},
        [("user", "q\ni"), ("assistant", "a")],
    ),
    "alpaca columns": (
        {"columns": {"prompt": "ask", "response": "say", "system": "sys", "history": "past"}},
        {"ask": "q", "say": "a", "sys": "S", "past": [["x", "y"]], "input": "not named: not used"},
        [("system", "S"), ("user", "x"), ("assistant", "y"), ("user", "q"), ("assistant", "a")],
    ),
    "text": ({"columns": {"prompt": "text"}}, {"text": "long", "url": "u"}, Document),
    "sharegpt": ({"formatting": "sharegpt"}, {"conversations": TURNS, "tools": "[{"}, [("user", "q"), ("assistant", "a")]),
    "sharegpt tools": (
        {"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools"}},
        {"conversations": TURNS, "tools": '[{"name": "f"}]'},
        [("user", "q"), ("assistant", "a")],
    ),
    "sharegpt tags": (
        {
            "formatting": "sharegpt",
            "columns": {"messages": "chat"},
            "tags": {"role_tag": "who", "content_tag": "said", "user_tag": "U", "assistant_tag": "A"},
        },
        {"chat": [{"who": "U", "said": "q"}, {"who": "A", "said": "a"}]},
        [("user", "q"), ("assistant", "a")],
    ),
    "openai": (
        {"formatting": "openai", "columns": {"messages": "messages"}, "tags": ROLES | {"observation_tag": "tool"}},
        {"messages": [{"role": "user", "content": "q"}, {"role": "tool", "content": "1"}, {"role": "assistant", "content": "a"}]},
        [("user", "q"), ("tool", "1"), ("assistant", "a")],
    ),
    "preference": (
        {"formatting": "sharegpt", "ranking": True, "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}},
        {"conversations": TURNS[:1], "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}},
        Pair,
    ),
    "alpaca preference": (
        {"ranking": True, "columns": {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}},
        {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
        Pair,
    ),
    "kto": (
        {"formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "label"}, "tags": ROLES},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "label": True},
        Labelled,
    ),
    "label not named": ({"formatting": "sharegpt"}, {"conversations": TURNS, "label": 3}, [("user", "q"), ("assistant", "a")]),
}


def source(tmp_path, entry, name="mine", **options):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"other": {}, "mine": entry}))
    return SourceConfig(path=str(tmp_path / "dataset_info.json"), entry=name, **options)


@pytest.mark.parametrize("case", CASES)
def test_entries(tmp_path, case):
    """The file beside the dataset_info.json is read as the entry says; columns that it does not name are not used."""
    entry, record, expected = CASES[case]
    (tmp_path / "rows.json").write_text(json.dumps([record]))
    cfg = resolve(source(tmp_path, {"file_name": "rows.json", **entry}))
    records = open_records(source(tmp_path, {"file_name": "rows.json", **entry}))
    [(_, row, where)] = records.read(0, 1)
    read = read_record(row, where, cfg.format, mapping_of(cfg))
    assert records.name == "mine" and where == f"{tmp_path / 'rows.json'}:1"
    if isinstance(expected, type):
        assert isinstance(read, expected)
    else:
        assert [(m.role, m.content) for m in read.messages] == expected
    if case == "sharegpt tools":
        assert read.tools == ({"type": "function", "function": {"name": "f"}},)
    if case.endswith("preference"):
        assert (read.chosen.messages[-1], read.rejected.messages[-1]) == (Message("assistant", "good"), Message("assistant", "bad"))


def test_where_the_data_is(tmp_path):
    """num_samples, subset, folder and split; keys of the source itself win."""
    entry = {"hf_hub_url": "me/set", "subset": "en", "split": "test", "num_samples": 7}
    cfg = resolve(source(tmp_path, entry))
    assert (cfg.path, cfg.subset, cfg.split, cfg.max_samples, cfg.entry) == ("hf://me/set", "en", "test", 7, None)
    cfg = resolve(source(tmp_path, entry, split="dev", max_samples=3, columns={"output": "answer"}))
    assert (cfg.split, cfg.max_samples, cfg.columns["output"], cfg.name) == ("dev", 3, "answer", "mine")
    assert resolve(source(tmp_path, {"hf_hub_url": "me/set", "folder": "python"})).subset == "python"


BAD = [
    ({"script_url": "x"}, "given script_url, expected file_name or hf_hub_url"),
    ({"ms_hub_url": "x"}, "given ms_hub_url, expected file_name or hf_hub_url"),
    ({}, "given none of them, expected file_name or hf_hub_url"),
    ({"file_name": "a.json", "formating": "sharegpt"}, "unknown key 'formating'"),
    ({"file_name": "a.json", "formatting": "chatml"}, "formatting is 'chatml', expected one of alpaca, sharegpt, openai"),
    ({"file_name": "a.json", "columns": {"images": "images"}}, "has images: models here read text alone"),
    ({"file_name": "a.json", "columns": {"prompts": "x"}}, "columns.prompts is unknown with formatting alpaca"),
    ({"file_name": "a.json", "formatting": "sharegpt", "tags": {"roles": "x"}}, "tags.roles is unknown"),
    ("a.json", "is str, expected an object"),
]


@pytest.mark.parametrize("entry, message", BAD)
def test_bad_entries(tmp_path, entry, message):
    """Each error names the file, the entry and the key."""
    with pytest.raises(DataError, match=f"dataset_info.json: entry 'mine'.*{message}"):
        resolve(source(tmp_path, entry))


def test_bad_files(tmp_path):
    """A file that is not there, no JSON, or without the entry."""
    with pytest.raises(DataError, match="no entry 'yours': it has other, mine"):
        resolve(source(tmp_path, {}, name="yours"))
    path = tmp_path / "dataset_info.json"
    path.write_text('{"a": {},}')
    with pytest.raises(DataError, match="dataset_info.json:1:10: trailing comma"):
        resolve(SourceConfig(path=str(path), entry="a"))
    with pytest.raises(DataError, match="not readable"):
        resolve(SourceConfig(path=str(tmp_path / "no" / "dataset_info.json"), entry="a"))


def test_entry_and_path_belong_together():
    """An entry without a dataset_info.json, or the other way round, is a problem."""
    assert [p.key for p in SourceConfig(path="a.jsonl", entry="x").check()] == ["entry"]
    assert [p.key for p in SourceConfig(path="data/dataset_info.json").check()] == ["entry"]
    assert not list(SourceConfig(path="data/dataset_info.json", entry="x").check())
    assert [p.key for p in SourceConfig(path="a.jsonl", format="alpacca").check()] == ["format"]
