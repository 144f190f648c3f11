"""Data sets of the hub, by name and as folders: the files of the wanted subset and split, fetched or read in place, at one commit."""

import json
from types import SimpleNamespace

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchft.data.hub import PARQUET_COPY, Part, choose
from torchft.data.sources import SourceConfig, open_records
from torchft.data.text import TextConfig, open_documents
from torchft.errors import DataError

NAMES = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"]


def read_all(**options):
    records = open_records(SourceConfig(**options))
    return [record for _, record, _ in records.read(0, len(records))]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on disk: folders <tmp>/<name>/<revision>, each revision a commit of the same name; and what was fetched from it."""
    fetched: list[str] = []

    def dataset_info(self, name, *, revision=None):
        folder = tmp_path / name / (revision or "main").replace("/", "_")
        if not folder.is_dir():
            raise OSError(f"no {name} at {revision}")
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        return SimpleNamespace(sha=f"sha-{folder.name}", siblings=[SimpleNamespace(rfilename=file) for file in files])

    def fetch(name, file, *, repo_type, revision):
        assert repo_type == "dataset"
        fetched.append(file)
        return str(tmp_path / name / revision.removeprefix("sha-") / file)

    class Remote:
        def open(self, address, mode):
            assert mode == "rb" and address.startswith("hf://datasets/")
            fetched.append(address)
            name, _, rest = address.removeprefix("hf://datasets/").partition("@sha-")
            return open(tmp_path / name / rest, mode)  # pyarrow closes it

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Remote)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kw: (_ for _ in ()).throw(OSError("offline")))
    return SimpleNamespace(folder=tmp_path, fetched=fetched)


def put(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_splits_by_name(hub):
    """Without a README the split's word in the names decides; train is what is meant without one; only its files are fetched."""
    for i, name in enumerate(NAMES):
        put(hub.folder / "me/set/main" / name, [{"a": i}])
    assert read_all(path="hf://me/set") == [{"a": 0}, {"a": 1}]
    assert hub.fetched == NAMES[:2]
    assert read_all(path="hf://datasets/me/set", split="test") == [{"a": 2}]
    with pytest.raises(DataError, match="hf://me/set: no file of split 'validation' among data/t"):
        read_all(path="hf://me/set", split="validation")
    assert open_records(SourceConfig(path="hf://me/set")).name == "set"


def test_revision(hub):
    """A branch, tag or commit is read instead of main."""
    put(hub.folder / "me/set/main/train.jsonl", [{"a": 0}])
    put(hub.folder / "me/set/v2/train.jsonl", [{"a": 2}])
    assert read_all(path="hf://me/set", revision="v2") == [{"a": 2}]


README = """---
license: mit
configs:
- config_name: en
  data_files:
  - {split: train, path: "en/*.jsonl"}
  - {split: dev, path: ["more/**/d.jsonl", "x.jsonl"]}
- config_name: de
  default: true
  data_dir: de
---
# A set
"""


def test_configs_of_the_readme(hub):
    """`configs` in the README says which files a subset and split have, in each of its forms."""
    folder = hub.folder / "me/set/main"
    for i, name in enumerate(
        ["en/1.jsonl", "en/deep/no.jsonl", "more/d.jsonl", "more/a/b/d.jsonl", "x.jsonl", "de/1.jsonl", "de/a/2.jsonl"]
    ):
        put(folder / name, [{"n": i}])
    (folder / "README.md").write_text(README)
    assert read_all(path="hf://me/set") == [{"n": 5}, {"n": 6}]
    assert read_all(path="hf://me/set", subset="en") == [{"n": 0}]
    assert sorted(row["n"] for row in read_all(path="hf://me/set", subset="en", split="dev")) == [2, 3, 4]
    assert read_all(path=str(folder), subset="en") == [{"n": 0}]  # the same as a local folder
    for options, message in (
        ({"subset": "fr"}, "no subset 'fr': set subset to one of en, de"),
        ({"split": "test"}, "no split 'test'.*train"),
    ):
        with pytest.raises(DataError, match=message):
            read_all(path="hf://me/set", **options)


def test_parquet_copy(hub):
    """A repository without files we read has a copy on the hub, by subset and split."""
    put(hub.folder / "me/set/main/script.py", [])
    copy = hub.folder / "me/set" / PARQUET_COPY.replace("/", "_")
    put(copy / "default/train/0000.parquet", [{"a": 1}])
    put(copy / "default/test/0000.parquet", [{"a": 2}])
    assert read_all(path="hf://me/set", split="test") == [{"a": 2}]
    put(copy / "other/train/0000.parquet", [{"a": 3}])
    assert read_all(path="hf://me/set", subset="other") == [{"a": 3}]


def test_streaming(hub):
    """parquet is read in place, at the commit's address; the same records; other files can't be."""
    put(hub.folder / "me/set/main/train.parquet", [{"text": f"doc {i}"} for i in range(9)])
    assert read_all(path="hf://me/set", streaming=True, max_samples=2) == [{"text": "doc 0"}, {"text": "doc 1"}]
    assert set(hub.fetched) == {"hf://datasets/me/set@sha-main/train.parquet"}
    documents = open_documents(TextConfig(path="hf://me/set", streaming=True))
    assert [record["text"] for _, record, _ in documents.read(7, 9)] == ["doc 7", "doc 8"]
    put(hub.folder / "me/lines/main/train.jsonl", [{"a": 1}])
    with pytest.raises(DataError, match="can't be streamed, only parquet can: set streaming: false"):
        read_all(path="hf://me/lines", streaming=True)


def test_offline(hub, monkeypatch):
    """What was fetched before is read without the network; what was not is an error that says what to check."""
    put(hub.folder / "copy/train.jsonl", [{"a": 1}])
    with pytest.raises(DataError, match="hf://me/none: can't be fetched .*check name, access and network"):
        read_all(path="hf://me/none")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kw: str(hub.folder / "copy"))
    assert read_all(path="hf://me/none") == [{"a": 1}]


def save_like_datasets(folder, rows):
    """The files that `Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": None}))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "cache-123.arrow").write_bytes(b"left by map")


def test_saved_by_datasets(tmp_path):
    """A folder saved by the package datasets, one set or several splits, gives the files it lists."""
    save_like_datasets(tmp_path / "one", [{"a": 1}])
    assert read_all(path=str(tmp_path / "one")) == [{"a": 1}]
    save_like_datasets(tmp_path / "both/train", [{"a": 2}])
    save_like_datasets(tmp_path / "both/test", [{"a": 3}])
    (tmp_path / "both/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert read_all(path=str(tmp_path / "both")) == [{"a": 2}]
    assert read_all(path=str(tmp_path / "both"), split="test") == [{"a": 3}]
    with pytest.raises(DataError, match="no split 'dev': it has train, test"):
        read_all(path=str(tmp_path / "both"), split="dev")


def test_index_file_stays_in_its_folder(tmp_path):
    """A state.json that names a file elsewhere does not reach it."""
    save_like_datasets(tmp_path / "set", [{"a": 1}])
    (tmp_path / "secret.arrow").write_bytes(b"")
    (tmp_path / "set/state.json").write_text(json.dumps({"_data_files": [{"filename": "../secret.arrow"}]}))
    with pytest.raises(DataError, match=r"set/state.json: names a file outside its folder"):
        read_all(path=str(tmp_path / "set"))


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["a.jsonl", "b.jsonl"], None, ["a.jsonl", "b.jsonl"]),
        (["dev.jsonl", "train.jsonl", "test.jsonl"], "validation", ["dev.jsonl"]),
        (["train/a.jsonl", "valid/a.jsonl"], "validation", ["valid/a.jsonl"]),
        (["train_sft.jsonl", "extra.jsonl"], None, ["train_sft.jsonl"]),
        (["training.jsonl", "contest.jsonl"], "test", []),
        (["holdout-1.jsonl", "train.jsonl"], "holdout", ["holdout-1.jsonl"]),
    ],
)
def test_words_of_a_split(names, split, expected):
    """A split's word must stand alone in the name; a split of any other name is its own word."""
    assert choose(names, "", Part(split=split), "x") == expected


def test_keys_that_do_nothing_are_problems():
    """revision and streaming are of the hub."""
    assert {p.key for p in SourceConfig(path="a.jsonl", revision="v1", streaming=True).check()} == {"revision", "streaming"}
    assert {p.key for p in TextConfig(path="a.txt", revision="v1", streaming=True).check()} == {"revision", "streaming"}
    assert not list(SourceConfig(path="hf://me/set", revision="v1", streaming=True).check())
