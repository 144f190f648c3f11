"""What is wrong with a section `data`, of chats or of documents, as far as it can be seen without opening a file."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torchft.data.holdout import held_out_names
from torchft.data.mixture import MixtureConfig, Share
from torchft.errors import Problem

GIVEN = ("weight", "epochs", "tokens")


def check_data(cfg: Any) -> Iterator[Problem]:
    """What is wrong with a section `data`, of chats or of documents."""
    if not cfg.train:
        yield Problem("data.train", "no source", "at least one source", "add one, e.g. data.train=[{path: FILE}]")
    if cfg.seq_len < 2:
        yield Problem("data.seq_len", str(cfg.seq_len), "at least 2", "use the length of your samples in tokens, e.g. 2048")
    for key, least, default in (("max_bad_records", 0, 0), ("window", 1, 4096), ("workers", 0, 1), ("prefetch", 1, 2), ("streams", 1, 64)):
        if getattr(cfg, key) < least:
            yield Problem(f"data.{key}", str(getattr(cfg, key)), f"at least {least}", f"use {default}")
    size = cfg.validation_size
    if size < 0 or (size >= 1 and size != int(size)):
        yield Problem("data.validation_size", str(size), "a share below 1, or a whole number of samples", "use e.g. 0.05 or 200")
    for name in set(held_out_names(cfg)) & set(cfg.validation):
        yield Problem(f"data.validation.{name}", "a name that data.validation_size takes", "another name", "rename this source")
    yield from _check_shares(cfg.train, cfg.mixture)
    yield from _check_streaming(cfg)
    for name, source in cfg.validation.items():
        for key in GIVEN:
            if getattr(source, key) is not None:
                given = str(getattr(source, key))
                fix = "leave it out; max_samples shortens a source"
                yield Problem(f"data.validation.{name}.{key}", given, "nothing: a validation pass takes all once", fix)


def _check_shares(shares: Sequence[Share], cfg: MixtureConfig) -> Iterator[Problem]:
    for i, share in enumerate(shares):
        where = f"data.train.{i}"
        for key in GIVEN:
            value = getattr(share, key)
            if value is not None and not (0 < value < math.inf):
                yield Problem(f"{where}.{key}", str(value), "more than 0", "leave the source out, or give a positive number")
        if share.epochs is not None and share.tokens is not None:
            yield Problem(f"{where}.tokens", f"{share.tokens} with epochs={share.epochs}", "one of the two", "leave one of them out")
        if share.weight is not None and cfg.mode == "concat":
            fix = "set data.mixture.mode to first_exhausted, all_exhausted or no_repeats; or use epochs instead of weight"
            yield Problem(f"{where}.weight", f"{share.weight} with data.mixture.mode=concat", "no weight: concat takes all", fix)
    if not (0 < cfg.temperature < math.inf):
        yield Problem("data.mixture.temperature", str(cfg.temperature), "more than 0", "use 1, or e.g. 2 to lift small sources")
    elif cfg.temperature != 1 and cfg.mode == "concat":
        fix = "set data.mixture.mode to first_exhausted, all_exhausted or no_repeats"
        yield Problem("data.mixture.temperature", f"{cfg.temperature} with data.mixture.mode=concat", "1: concat has no shares", fix)


def _check_streaming(cfg: Any) -> Iterator[Problem]:
    """What needs all of a source at once."""
    if not cfg.streaming:
        return
    given = {"data.mixture.mode": cfg.mixture.mode != "concat" and cfg.mixture.mode, "data.validation_size": cfg.validation_size}
    given["data.packing"] = not cfg.packing and "false"
    given["data.train"] = len(cfg.train) > 1 and f"{len(cfg.train)} sources"
    for i, source in enumerate(cfg.train):
        given |= {f"data.train.{i}.{key}": getattr(source, key) for key in (*GIVEN, "max_samples")}
    for key, value in given.items():
        if value:
            expected = "nothing of this with data.streaming=true: one packed source (a file, folder or glob), read as it comes"
            yield Problem(key, str(value), expected, "leave it out, or set data.streaming=false")
