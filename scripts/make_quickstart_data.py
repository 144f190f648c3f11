"""Write the quickstart's data set: a sentence that books a table -> one line of JSON.

    Could we have a table for six on Friday at half past seven? The name is Nora.
    {"name":"Nora","day":"Fri","time":"7:30","people":6}

The skill is to find and copy a name, to shorten a day, and to turn spoken hours and number words into figures. All the text is made here.
Every choice is a hash of (split, row, field), so the files are the same bytes on every machine and Python version. No held-out booking
occurs in the training set; every fourth held-out row has a name, every fifth a phrasing that is never trained on.

    python scripts/make_quickstart_data.py [--out FOLDER]
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

NUM_TRAIN, NUM_HELDOUT = 304, 80
SYSTEM = "JSON"
FOLDER = Path(__file__).resolve().parent.parent / "configs" / "quickstart" / "data"

NAMES = (
    "Alice Andrew Anna Ben Carlos Chen Clara Daniel David Emma Frank George Grace Hannah Hassan Helen Henry Ivan James Jane Julia Karen "
    "Kim Laura Leila Leo Li Lily Lucy Marco Maria Mark Martin Mary Michael Nadia Nina Nora Oliver Omar Oscar Paul Peter Petra Ravi "
    "Richard Rosa Rose Ruth Sam Samuel Sara Sarah Thomas Tom Vera Victor Walter William Yuki"
).split()
NEW_NAMES = "Arthur Charles Emily Jacob Joan Louis Max Maya Robert Simon".split()
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

SHAPES = (
    "Please book a table for {people} on {day} at {time}, name {name}.",
    "Table for {people}, {day} {time}, under {name}.",
    "{name} here, could you fit {people} of us in on {day} at {time}?",
    "Hi, this is {name}. We are {people}, coming {day} at {time}.",
    "Can I reserve for {people} people at {time} on {day}? It's {name}.",
    "{day} at {time} please, a party of {people}, for {name}.",
    "We'd like to eat at {time} on {day}. {people} guests, name of {name}.",
    "Could {name} have a table on {day}, {time}, for {people}?",
    "I'm {name} and I need {people} seats for {day} at {time}.",
    "Is {time} on {day} free? There are {people} of us. {name}.",
)
NEW_SHAPES = (
    "{name} wants dinner with {people} in all, {day}, {time}.",
    "On {day} we come at {time}, {people} persons, my name is {name}.",
)


class Booking(NamedTuple):
    """What a sentence says, in the form the reply gives it."""

    name: str
    day: str  # three letters
    time: str  # h:mm, in the evening
    people: int

    def reply(self) -> str:
        return json.dumps(self._asdict(), separators=(",", ":"))


def main(argv: Sequence[str] | None = None) -> None:
    """Write train.jsonl and heldout.jsonl."""
    parser = argparse.ArgumentParser(description="Write the quickstart's data set.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for train.jsonl and heldout.jsonl")
    out = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    seen: set[Booking] = set()
    for split, num_rows in (("train", NUM_TRAIN), ("heldout", NUM_HELDOUT)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows(split, num_rows, seen)]
        (out / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


def make_rows(split: str, num_rows: int, seen: set[Booking]) -> list[dict]:
    """Rows in the OpenAI messages format; adds their bookings to `seen` and never repeats one that is there."""
    rows = []
    candidate = 0
    while len(rows) < num_rows:
        sentence, booking = _example(split, candidate, len(rows))
        candidate += 1
        if booking in seen:
            continue
        seen.add(booking)
        turns = (("system", SYSTEM), ("user", sentence), ("assistant", booking.reply()))
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return rows


def _example(split: str, candidate: int, row: int) -> tuple[str, Booking]:
    is_heldout = split == "heldout"

    def pick(field: str, options: Sequence[str]) -> str:
        return options[_hash(split, candidate, field) % len(options)]

    name = pick("name", NEW_NAMES if is_heldout and row % 4 == 0 else NAMES)
    shape = pick("shape", NEW_SHAPES if is_heldout and row % 5 == 0 else SHAPES)
    day = pick("day", DAYS)
    people = 2 + _hash(split, candidate, "people") % 8
    spoken_people = pick("digits", (NUMBERS[people - 1], str(people)))
    spoken_time, time = _time(
        5 + _hash(split, candidate, "hour") % 5, pick("minute", ("00", "30", "15")), pick("words", ("figures", "words"))
    )
    sentence = shape.format(name=name, day=day, time=spoken_time, people=spoken_people)
    return sentence[0].upper() + sentence[1:], Booking(name, day[:3], time, people)


def _time(hour: int, minute: str, style: str) -> tuple[str, str]:
    """A time as it is spoken and as the reply gives it."""
    word = NUMBERS[hour - 1]
    if style == "words":
        return {"00": f"{word} o'clock", "30": f"half past {word}", "15": f"a quarter past {word}"}[minute], f"{hour}:{minute}"
    return (f"{hour} pm" if minute == "00" else f"{hour}:{minute} pm"), f"{hour}:{minute}"


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


if __name__ == "__main__":
    main()
