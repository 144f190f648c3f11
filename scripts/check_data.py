"""Reads every data file of a folder and compares the counts of records with those its SOURCES.txt states.

    python scripts/check_data.py FOLDER

Each file is read by content and, once more, through the dataset_info.json entry that LLaMA-Factory has for its kind; every record must
be a chat, a pair, a labelled chat or a document. Lines of SOURCES.txt that count: `name.json  999 records` or `lines`.
"""

import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

from torchft.data.formats import read_record
from torchft.data.sources import SourceConfig, mapping_of, open_records, resolve

ROLES = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
MESSAGES = {"messages": "conversations"}
ENTRIES = {  # what a record's keys say -> the entry's own keys
    "instruction": {},
    "chosen": {"formatting": "sharegpt", "ranking": True, "columns": MESSAGES | {"chosen": "chosen", "rejected": "rejected"}},
    "label": {"formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "label"}, "tags": ROLES},
    "tools": {"formatting": "sharegpt", "columns": MESSAGES | {"tools": "tools"}},
    "text": {"columns": {"prompt": "text"}},
}


def main(folder: Path) -> int:
    """Prints a line for each file; 1 if a count differs. Raises DataError at a record that can't be read."""
    stated = dict(re.findall(r"^(\S+\.jsonl?)\s+(\d+) (?:records|lines)", (folder / "SOURCES.txt").read_text(), re.MULTILINE))
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name, count in stated.items():
            plain = SourceConfig(path=str(folder / name))
            record = next(open_records(plain).read(0, 1))[1]
            entry = next(entry for key, entry in ENTRIES.items() if key in record)
            info = Path(scratch) / "dataset_info.json"
            info.write_text(json.dumps({"it": {"file_name": str((folder / name).resolve()), **entry}}))
            kinds = [read_all(plain), read_all(SourceConfig(path=str(info), entry="it"))]
            right = all(found.total() == int(count) for found in kinds) and kinds[0] == kinds[1]
            wrong += not right
            print(f"{name}: {count} stated, {kinds[0].total()} read, {dict(kinds[0])}; through dataset_info.json {dict(kinds[1])}")
    return int(wrong > 0 or not stated)


def read_all(source: SourceConfig) -> Counter[str]:
    """How many records of each kind."""
    records, source = open_records(source), resolve(source)
    rows = records.read(0, len(records))
    return Counter(type(read_record(record, where, source.format, mapping_of(source))).__name__ for _, record, where in rows)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
