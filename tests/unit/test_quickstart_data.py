"""The quickstart's data set: made by its script to the byte, and honest about what is held out."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = ROOT / "configs" / "quickstart" / "data"


def generator():
    spec = importlib.util.spec_from_file_location("make_quickstart_data", ROOT / "scripts" / "make_quickstart_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def chats(split: str) -> list[tuple[str, str]]:
    """(sentence, reply) of each row."""
    rows = [json.loads(line)["messages"] for line in (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all([turn["role"] for turn in row] == ["system", "user", "assistant"] for row in rows)
    return [(row[1]["content"], row[2]["content"]) for row in rows]


def test_the_script_makes_the_bundled_files(tmp_path):
    """The files in configs/ are what scripts/make_quickstart_data.py writes, byte for byte."""
    generator().main(["--out", str(tmp_path)])
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name


def test_nothing_held_out_is_trained_on():
    """At least 300 training rows; no booking occurs twice, in one split or in both; some held-out names are never trained on."""
    train, heldout = chats("train"), chats("heldout")
    assert len(train) >= 300 and len(heldout) >= 60
    replies = [reply for _, reply in train + heldout]
    assert len(set(replies)) == len(replies)
    known = {json.loads(reply)["name"] for _, reply in train}
    new = [reply for _, reply in heldout if json.loads(reply)["name"] not in known]
    assert len(new) == len(heldout) // 4


def test_a_reply_says_what_the_sentence_says():
    """Name, first letters of the day and the number of people of each reply stand in its sentence; the reply is one line of JSON."""
    numbers = generator().NUMBERS
    for sentence, reply in chats("train") + chats("heldout"):
        booking = json.loads(reply)
        assert list(booking) == ["name", "day", "time", "people"]
        assert booking["name"] in sentence and booking["day"] in sentence
        hour, minute = map(int, booking["time"].split(":"))
        words = sentence.lower().replace(".", " ").replace(",", " ").replace("?", " ").split()
        for number in (booking["people"], hour):
            assert numbers[number - 1] in words or any(word.split(":")[0] == str(number) for word in words), sentence
        spoken = {0: ("pm", "o'clock"), 15: ("quarter", f"{hour}:15"), 30: ("half", f"{hour}:30")}[minute]
        assert any(word in words for word in spoken), sentence
