"""What stands beside a vocabulary in a model folder: named tokens, flags, chat template, stop ids; and the tokens a user adds.

The files are HF's: tokenizer_config.json, special_tokens_map.json, added_tokens.json, chat_template.jinja or .json and
generation_config.json. None of them is required.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchft.errors import DataError

NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
REQUIRED = ("bos_token", "eos_token")  # if named they must be there; padding and unknown tokens are not needed
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class Settings:
    """What the files beside the vocabulary say, and the user's new tokens."""

    folder: Path
    config: dict[str, Any]  # tokenizer_config.json
    named_tokens: dict[str, str]  # bos_token, eos_token, pad_token, unk_token, as far as given
    marked_special: dict[str, bool]  # token -> whether the files call it special
    added_ids: dict[str, int]  # token -> id, for tokens outside a SentencePiece vocabulary or a rank file
    adds_bos: bool | None  # None: not said
    adds_prefix_space: bool | None
    chat_template: str | None
    stop_ids: frozenset[int]
    new_words: tuple[str, ...] = ()  # added by the user: matched whole in text ...
    new_special: tuple[str, ...] = ()  # ... and never made from text

    def number_new(self, special: Collection[str], words: Collection[str], *, first: int, where: str) -> dict[str, int]:
        """Ids from `first` on for the new tokens that are not there yet. Raises DataError for one that is there as something else."""
        for token in self.new_words + self.new_special:
            wanted, other = ("special token", words) if token in self.new_special else ("word", special)
            if token in other:
                fix = "add it under the other key, or leave it out: it is there"
                raise DataError(f"{where}: new {wanted} {token!r}\n  given:    a token that is there as another sort\n  fix:      {fix}")
        new = [token for token in self.new_words + self.new_special if token not in special and token not in words]
        return {token: first + i for i, token in enumerate(new)}

    def names_among(self, special: Collection[str], own: Mapping[str, str], *, where: str) -> dict[str, str]:
        """bos, eos, pad, unk among the special tokens: as the files say, else the vocabulary's `own`. Raises DataError if one lacks."""
        names = {name: text for name, text in own.items() if text in special} | self.named_tokens
        missing = sorted({text for name, text in names.items() if name in REQUIRED and text not in special})
        if missing:
            raise DataError(
                f"{where}: tokenizer_config.json names {', '.join(missing)}, which it does not have: take both files from one model"
            )
        return {name: text for name, text in names.items() if text in special}

    def other_files(self) -> dict[str, bytes]:
        """The files beside the vocabulary, by name, but for tokenizer_config.json."""
        return {name: path.read_bytes() for name in BESIDE[1:] if (path := self.folder / name).is_file()}

    def config_file(self, more: Mapping[str, Any], added: Mapping[str, int] | None = None) -> bytes:
        """tokenizer_config.json with `more` in it, for a folder that holds a tokenizer.json; `added`: the new tokens' ids."""
        decoder = dict(self.config.get("added_tokens_decoder") or {})
        decoder |= {str(i): {"content": token, "special": token in self.new_special} for token, i in (added or {}).items()}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | self.config | dict(more)
        for key in ("rank_kind", "auto_map"):  # auto_map names Python code
            settings.pop(key, None)
        return _dump(settings | ({"added_tokens_decoder": decoder} if decoder else {}))


def read_settings(folder: Path, *, words: Collection[str] = (), special: Collection[str] = ()) -> Settings:
    """Reads the small files of a folder; what is missing is None or empty. words, special: the user's new tokens."""
    _check_new([*words, *special])
    config = read_json(folder / "tokenizer_config.json")
    tokens_map = read_json(folder / "special_tokens_map.json")
    added = {**read_json(folder / "added_tokens.json")}
    marked = {}
    for key, entry in (config.get("added_tokens_decoder") or {}).items():
        added[entry["content"]] = int(key)
        marked[entry["content"]] = bool(entry.get("special", False))
    named = {}
    for name in NAMES:
        text = _text(config[name] if name in config else tokens_map.get(name))
        if text is not None:
            named[name] = text
    for token in _further_special(config, tokens_map):
        marked[token] = True
    return Settings(
        folder=folder,
        config=config,
        named_tokens=named,
        marked_special=marked,
        added_ids=added,
        adds_bos=config.get("add_bos_token"),
        adds_prefix_space=config.get("add_prefix_space"),
        chat_template=_read_template(folder, config),
        stop_ids=_read_stop_ids(folder),
        new_words=tuple(words),
        new_special=tuple(special),
    )


def _check_new(tokens: list[str]) -> None:
    bad = next((t for t in tokens if not t.strip() or t != t.strip() or tokens.count(t) > 1), None)
    if bad is not None:
        what = "twice" if bad.strip() == bad != "" else "empty, or with white space at its ends"
        raise DataError(f"new token {bad!r}\n  given:    {what}\n  expected: texts like <|tool|>, each once\n  fix:      write it so")


def _read_template(folder: Path, config: dict) -> str | None:
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    template = read_json(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):  # several by name
        by_name = {entry["name"]: entry["template"] for entry in template}
        return by_name.get("default")
    return template


def _read_stop_ids(folder: Path) -> frozenset[int]:
    eos = read_json(folder / "generation_config.json").get("eos_token_id")
    if eos is None:
        return frozenset()
    return frozenset(map(int, eos if isinstance(eos, list) else [eos]))


def _further_special(config: dict, tokens_map: dict) -> list[str]:
    """additional_special_tokens / extra_special_tokens: a list, or a dict of names."""
    found = []
    for source in (config, tokens_map):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            value = source.get(key) or []
            found += map(_text, value.values() if isinstance(value, dict) else value)
    return [token for token in found if token]


def _text(token: str | dict | None) -> str | None:
    """A token as text: the files hold plain strings or {"content": ...}."""
    return token["content"] if isinstance(token, dict) else token


def read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}): download this file of the model again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: given {type(value).__name__}, expected a JSON object: download this file of the model again")
    return value


def _dump(value: dict) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
