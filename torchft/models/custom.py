"""A model of your own size: a family's architecture with other numbers.

    published size --to_hf--> config.json --numbers by HF's keys--> config.json --from_hf--> ModelSpec

The numbers take the way through the family's config.json, so what it derives from them (head size, scales) and what it refuses hold
here as well, and the export's config.json says the same.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from torchft.errors import ConfigError, Problem
from torchft.models.build import FAMILIES, spec_from_config, spec_of_size
from torchft.models.spec import ModelSpec


@dataclass
class CustomSpec:
    """Numbers that differ from the named size's; without a size the first four are required."""

    hidden_size: int | None = None  # width of the model
    intermediate_size: int | None = None  # width inside an MLP
    num_layers: int | None = None  # number of layers
    num_heads: int | None = None  # attention heads
    num_kv_heads: int | None = None  # key and value heads; null: the size's, or without a size num_heads
    head_dim: int | None = None  # width of a head; null: hidden_size / num_heads
    vocab_size: int | None = None  # at least the tokenizer's; null: the size's, or without a size that of the family's first size
    max_seq_len: int | None = None  # longest row; null: as for vocab_size, and so on
    tie_embeddings: bool | None = None  # the output uses the embedding's weights
    rope_base: float | None = None  # base of the rotary frequencies
    init_std: float | None = None  # standard deviation of random weights

    def given(self) -> dict[str, int | float | bool]:
        """The numbers that are set, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def missing(self) -> list[str]:
        """What is required without a named size and is not set."""
        return [name for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads") if getattr(self, name) is None]

    def check(self) -> Iterator[Problem]:
        for name, value in self.given().items():
            if value is not False and value <= 0:
                yield Problem(f"model.spec.{name}", str(value), "more than 0", "use a positive number")


HF_KEYS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
    "rope_base": "rope_theta",
    "init_std": "initializer_range",
}


def custom_spec(family: str, size: str | None, custom: CustomSpec) -> ModelSpec:
    """The family's `size` (None: its first one, for all that `custom` leaves open) with the custom numbers. Raises ConfigError."""
    changes = custom.given()
    base = spec_of_size(family, size or next(iter(FAMILIES[family].SIZES), "") if family in FAMILIES else "")
    if not changes:
        return base
    config = FAMILIES[family].to_hf(base)
    strange = [name for name in changes if HF_KEYS[name] not in config]
    if strange:
        have = ", ".join(name for name, key in HF_KEYS.items() if key in config)
        raise ConfigError(
            Problem(f"model.spec.{n}", str(changes[n]), f"a number that {family} has: {have}", "leave it out") for n in strange
        )
    if size is None:
        changes = {"num_kv_heads": changes["num_heads"]} | changes
    if "head_dim" in config and "head_dim" not in changes and {"hidden_size", "num_heads"} & changes.keys():
        changes = changes | {"head_dim": _head_dim(config | {HF_KEYS[name]: value for name, value in changes.items()})}
    if "num_layers" in changes:  # what is listed by layer ends with the layers
        by_layer = [key for key, value in config.items() if isinstance(value, list) and len(value) == base.num_layers]
        config |= {key: config[key][: changes["num_layers"]] for key in by_layer}
    names = {key: f"model.spec.{name}" for name, key in HF_KEYS.items()}
    try:
        return spec_from_config(config | {HF_KEYS[name]: value for name, value in changes.items()}, where="model.spec")
    except ConfigError as error:
        raise ConfigError(replace(p, key=names.get(p.key, p.key), where="") for p in error.problems) from None


def _head_dim(config: dict[str, Any]) -> int:
    """hidden_size / num_heads, said out loud: the default of some families is a fixed number."""
    hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
    if hidden_size % (2 * num_heads):
        given = f"hidden_size={hidden_size} / num_heads={num_heads}"
        raise ConfigError(Problem("model.spec.head_dim", given, "an even number", "set head_dim, or change one of the two"))
    return hidden_size // num_heads
