"""Rotary positions in config.json: `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` with both (5), and back.

A section names its kind (`rope_type`, in older files `type`); every other key of it is read or an error, since a scaling that is
ignored shows only at long positions. A family says which kinds its models have. Written is the spelling of transformers 4.
"""

from collections.abc import Collection
from typing import Any

from torchft.models.hf_config import HfConfig, is_number
from torchft.models.spec import RopeScaling, RopeSpec, rotary_dim

BASE = 10000.0  # where a file names none
KINDS = ("linear", "llama3", "dynamic", "yarn")  # longrope in files of phi3 alone


def read_rope(
    read: HfConfig, max_seq_len: int, head_dim: int, *, kinds: Collection[str] = KINDS, partial: bool = False, original: int | None = None
) -> RopeSpec:
    """The rope of a model with one. partial: whether `partial_rotary_factor` may be below 1; original: longrope's, where the family
    has it outside the section.

    Two spellings in one file that disagree are a problem.
    """
    theta = read.number("rope_theta", None)
    outer = read.number("partial_rotary_factor", 1.0) if partial else 1.0
    old, new = read.section("rope_scaling"), read.section("rope_parameters")
    if old is not None and new is not None:
        read.reject("rope_scaling", "either rope_scaling or rope_parameters", "keep the one the model was trained with")
    section = old if new is None else new
    if section is None:
        return RopeSpec(theta or BASE, partial=outer)
    if new is None:
        return read_section(old, theta or BASE, max_seq_len, head_dim, kinds=kinds, partial=outer, original=original)
    base = new.number("rope_theta", theta or BASE)
    rope = read_section(new, base, max_seq_len, head_dim, kinds=kinds, partial=outer, original=original)
    if theta is not None and theta != rope.base:
        read.reject("rope_theta", f"rope_parameters.rope_theta={rope.base}", "keep the one the model was trained with")
    return rope


def read_section(
    read: HfConfig,
    base: float,
    max_seq_len: int,
    head_dim: int,
    *,
    kinds: Collection[str] = KINDS,
    partial: float = 1.0,
    original: int | None = None,
) -> RopeSpec:
    """`rope_scaling`, `rope_parameters` or one layer type's part of the latter."""
    known, before = ("default", *kinds, *(("su",) if "longrope" in kinds else ())), len(read.problems)  # su: Phi-3's first name of it
    names = [read.choice(key, known, None) for key in ("rope_type", "type")]  # some files say it twice
    if len(read.problems) > before:
        return RopeSpec(base)  # the other keys of an unknown kind need not be reported one by one
    if names[1] not in (None, names[0] or names[1]):
        read.reject("type", repr(names[0]), "rope_type and type must agree: correct the file")
    kind = names[0] or names[1] or "default"
    kind = "longrope" if kind == "su" else kind
    inner = (
        read.number("partial_rotary_factor", partial) if "longrope" in kinds else float(read.choice("partial_rotary_factor", (1, 1.0), 1))
    )
    scaling = None if kind == "default" else _READERS[kind](read, max_seq_len, original, rotary_dim(RopeSpec(partial=inner), head_dim) // 2)
    read.finish()
    return RopeSpec(base, scaling, inner)


def write_rope(rope: RopeSpec) -> dict[str, Any]:
    """The keys of config.json for a RopeSpec, in the spelling of transformers 4, which 5 reads as well."""
    scaling = rope.scaling
    if scaling is None:
        return {"rope_theta": rope.base, "rope_scaling": None}
    section: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        section |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind in ("llama3", "yarn"):
        section |= {"original_max_position_embeddings": scaling.original_max_seq_len}
    if scaling.kind == "yarn":
        section |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        section |= {} if scaling.truncate else {"truncate": False}
    if scaling.kind == "longrope":
        section = {"type": "longrope", "short_factor": list(scaling.short_factors), "long_factor": list(scaling.long_factors)}
    if scaling.attention_factor is not None:
        section["attention_factor"] = scaling.attention_factor
    return {"rope_theta": rope.base, "rope_scaling": section}


def _linear(read: HfConfig, max_seq_len: int, original: int | None, num_pairs: int) -> RopeScaling:
    return RopeScaling("linear", read.number("factor"))


def _llama3(read: HfConfig, max_seq_len: int, original: int | None, num_pairs: int) -> RopeScaling:
    factor, low, high = (read.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        read.reject("high_freq_factor", f"more than low_freq_factor={low}", "correct the file")
    return RopeScaling("llama3", factor, low, high, read.integer("original_max_position_embeddings"))


def _dynamic(read: HfConfig, max_seq_len: int, original: int | None, num_pairs: int) -> RopeScaling:
    """Grows from the model's max_position_embeddings on, as in transformers."""
    return RopeScaling("dynamic", read.number("factor"), original_max_seq_len=max_seq_len)


def _yarn(read: HfConfig, max_seq_len: int, original: int | None, num_pairs: int) -> RopeScaling:
    return RopeScaling(
        "yarn",
        read.number("factor"),
        original_max_seq_len=read.integer("original_max_position_embeddings", max_seq_len),
        beta_fast=read.number("beta_fast", 32.0),
        beta_slow=read.number("beta_slow", 1.0),
        truncate=read.boolean("truncate", True),
        attention_factor=read.number("attention_factor", None),
    )


def _longrope(read: HfConfig, max_seq_len: int, original: int | None, num_pairs: int) -> RopeScaling:
    """`factor` is the ratio of the lengths: a file that says another is refused. transformers 5 writes `original` inside as well."""
    if original is not None:
        read.choice("original_max_position_embeddings", (original,), original)
    original = original or read.integer("original_max_position_embeddings")
    factors = []
    for key in ("short_factor", "long_factor"):
        expected = f"a list of {num_pairs} numbers > 0, one a rotary pair"
        factors.append(read.items(key, lambda v: is_number(v, int | float) and 0 < v < 1e300, num_pairs, expected) or ())
        if not read.given(key):
            read.reject(key, expected, "correct the file, or take it again from its source")
    return RopeScaling(
        "longrope",
        read.choice("factor", (max_seq_len / original,), max_seq_len / original),
        original_max_seq_len=original,
        attention_factor=read.number("attention_factor", None),
        short_factors=tuple(map(float, factors[0])),
        long_factors=tuple(map(float, factors[1])),
    )


_READERS = {"linear": _linear, "llama3": _llama3, "dynamic": _dynamic, "yarn": _yarn, "longrope": _longrope}
