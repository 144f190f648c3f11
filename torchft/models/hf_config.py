"""A strict reader of HF's config.json: every key is read, or known to be harmless, or an error.

A key that changes the maths must not be dropped in silence (bug class "RoPE scaling ignored"). A family asks for its keys by name
and type; `finish` then reports everything wrong at once: missing keys, wrong types, values that aren't supported, keys nobody read.
The file is data: nothing in it is ever imported or run (`auto_map` and its kin).
"""

import difflib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torchft.errors import ConfigError, Problem

REQUIRED = object()
CONFIG_BYTES = 1 << 20  # the largest config.json that is read; real ones hold a few kB

HARMLESS = {
    "names and versions": "_name_or_path name_or_path architectures model_type transformers_version transformers.js_config tokenizer_class",
    "storage dtype; the recipe chooses its own": "dtype torch_dtype use_bfloat16",
    "code is never loaded": "auto_map custom_pipelines",
    "token ids; they belong to the tokenizer and to generation_config.json": """bos_token_id eos_token_id pad_token_id unk_token_id
        sep_token_id decoder_start_token_id""",
    "attention kernel choice": "_attn_implementation _attn_implementation_autoset _attn_implementation_internal attn_implementation",
    "caching and outputs of another implementation": """use_cache return_dict return_dict_in_generate output_hidden_states
        output_attentions output_scores torchscript chunk_size_feed_forward cache_implementation""",
    "classification labels of other heads": "id2label label2id problem_type num_labels finetuning_task task_specific_params",
    "generation settings of old files": """max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups
        diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
        encoder_no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values exponential_decay_length_penalty
        suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id prefix""",
    "encoder-decoder leftovers without effect on a decoder": "is_decoder tie_encoder_decoder cross_attention_hidden_size tf_legacy_loss",
}
HARMLESS_KEYS = {key: reason for reason, keys in HARMLESS.items() for key in keys.split()}  # key -> why it may be ignored
ONLY = {"is_encoder_decoder": (False,), "add_cross_attention": (False,), "pruned_heads": ({},)}  # may stand there with this value alone
UNSUPPORTED = "a model with this value can't be run: choose another checkpoint"
HINTS = {
    "quantization_config": "quantised weights can't be trained in full: take the unquantised checkpoint of this model, or train adapters "
    "on it (recipes/lora_finetune.py)"
}


class HfConfig:
    """One config.json, or a section of it. Problems are collected and raised by `finish`."""

    def __init__(self, config: Mapping[str, Any], prefix: str = "", problems: list[Problem] | None = None):
        self._config, self._prefix = config, prefix
        self._unread = dict.fromkeys(config)
        self._known: dict[str, None] = {}  # names asked for, in order: what "did you mean" chooses from
        self.problems: list[Problem] = [] if problems is None else problems

    def integer(self, key: str, default: Any = REQUIRED, *, maximum: int = 2**40) -> Any:
        """A whole number from 1 to maximum; the bound keeps a hostile file from asking for all memory."""
        return self._take(key, default, lambda v: is_number(v, int) and 1 <= v <= maximum, f"a whole number from 1 to {maximum}", 1)

    def number(self, key: str, default: Any = REQUIRED) -> Any:
        """A finite number > 0, as a float."""
        value = self._take(key, default, lambda v: is_number(v, int | float) and 0 < v < 1e300, "a number > 0", 1.0)
        return float(value) if is_number(value, int) else value

    def boolean(self, key: str, default: Any = REQUIRED) -> Any:
        """true or false."""
        return self._take(key, default, lambda v: isinstance(v, bool), "true or false", False)

    def choice(self, key: str, supported: tuple, default: Any) -> Any:
        """One of the values this library computes."""
        return self._take(key, default, lambda v: v in supported, " or ".join(map(repr, supported)), supported[0], UNSUPPORTED)

    def items(self, key: str, is_good: Callable[[Any], bool], count: int, expected: str) -> Any:
        """A list of `count` good items, as a tuple; None if it is absent or null."""
        good = self._take(key, None, lambda v: isinstance(v, list) and len(v) == count and all(map(is_good, v)), expected, None)
        return None if good is None else tuple(good)

    def section(self, key: str) -> "HfConfig | None":
        """A nested object; None if it is absent, null or no object (then a problem)."""
        value = self._take(key, None, lambda v: isinstance(v, Mapping), "an object", None)
        return None if value is None else HfConfig(value, f"{self._prefix}{key}.", self.problems)

    def ignore(self, key: str) -> None:
        """A key that this family has and that does not change the computation, whatever its value."""
        self._unread.pop(key, None)

    def given(self, key: str) -> bool:
        """True if the key stands there with a value that is not null."""
        return self._config.get(key) is not None

    def present(self, key: str) -> bool:
        """True if the key stands there, be it with null."""
        return key in self._config

    def reject(self, key: str, expected: str, fix: str) -> None:
        """Records that this key's value is not usable."""
        self.problems.append(Problem(self._prefix + key, repr(self._config.get(key)), expected, fix))

    def finish(self) -> None:
        """Raises ConfigError with all problems, those of sections included. A section is finished before the whole."""
        for key, values in ONLY.items():
            if key in self._unread:
                self.choice(key, (*values, None), None)
        for key in self._unread:
            if key not in HARMLESS_KEYS:
                self.reject(key, "a key this model family reads", self._advice(key))
        if not self._prefix and self.problems:
            raise ConfigError(self.problems)

    def _advice(self, key: str) -> str:
        close = difflib.get_close_matches(key, self._known, n=1, cutoff=0.75)
        guess = f"did you mean {close[0]}? Otherwise " if close else ""
        return HINTS.get(key) or f"{guess}remove it if it does not change the computation; if it does, this model can't be run"

    def _take(self, key: str, default: Any, is_good: Callable[[Any], bool], expected: str, wrong: Any, fix: str = "") -> Any:
        """The key's value; `default` if absent or null; after a problem `wrong`, so that reading goes on and finds the rest."""
        self._unread.pop(key, None)
        self._known[key] = None
        value = self._config.get(key)
        if value is None and default is not REQUIRED:
            return default
        if not is_good(value):
            given = repr(value) if key in self._config else "nothing"
            fix = fix or "correct the file, or take it again from its source"
            self.problems.append(Problem(self._prefix + key, given, expected, fix))
            return wrong
        return value


def read_json(path: Path, *, max_bytes: int = CONFIG_BYTES) -> dict[str, Any]:
    """A small JSON file that holds one object. Raises ConfigError naming file, line and column."""
    size = path.stat().st_size
    if size > max_bytes:
        raise ConfigError(Problem(path.name, f"{size} bytes", f"at most {max_bytes}", "this is no real model file", str(path)))
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_duplicates)
    except UnicodeDecodeError as error:
        raise ConfigError(Problem(path.name, f"byte {error.start} is not UTF-8", "UTF-8 text", "take the file again", str(path))) from None
    except json.JSONDecodeError as error:
        place = f"{path}:{error.lineno}:{error.colno}"
        raise ConfigError(Problem(path.name, error.msg, "valid JSON", "correct the file at this place", place)) from None
    except KeyError as error:
        fix = "correct the file: readers differ in which of the two they take"
        raise ConfigError(Problem(path.name, f"{error} twice in one object", "each key once", fix, str(path))) from None
    except RecursionError:
        raise ConfigError(
            Problem(path.name, "too many nested brackets", "a flat object", "this is no real model file", str(path))
        ) from None
    if not isinstance(value, dict):
        raise ConfigError(Problem(path.name, type(value).__name__, "a JSON object {...}", "take the file again", str(path)))
    return value


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's dict, for json.loads; KeyError if a key comes twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyError(next(name for name in names if names.count(name) > 1)[:200])
    return value


def is_number(value: Any, kind: Any) -> bool:
    """True for an int or float of that kind; a bool is none."""
    return isinstance(value, kind) and not isinstance(value, bool)
