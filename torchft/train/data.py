"""From config to batches: tokenizer and template, the tokenised caches, the training loader and the validation passes.

Chats (SourceConfig, with a template) and documents (TextConfig, without one) differ in how a record becomes tokens, and in nothing
after that.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from torchft.batch import Batch
from torchft.data.cache import CacheKey, TokenCache
from torchft.data.cache_build import build_cache
from torchft.data.files import find_files
from torchft.data.holdout import held_out_names, hold_out
from torchft.data.lines import STREAMED, Lines
from torchft.data.loader import DataConfig, Loader, evaluation_steps
from torchft.data.mixture import build_mixture
from torchft.data.sources import SourceConfig, mapping_of, open_records, resolve
from torchft.data.streaming import VirtualStreams
from torchft.data.templates import Template, Thinking, build_template
from torchft.data.text import TextConfig, TextDataConfig, encode_document, encode_documents, open_documents
from torchft.data.tokenize import all_roles, encode_all, encode_record, encode_records
from torchft.data.truncation import truncate
from torchft.data.types import Encoded, Message
from torchft.dist import World
from torchft.errors import ConfigError, Problem
from torchft.log import get_logger
from torchft.models.spec import ModelSpec
from torchft.parallel.mesh import Mesh
from torchft.tokenizers.load import load_tokenizer
from torchft.tokenizers.protocol import Tokenizer

log = get_logger(__name__)

MAX_THREADS = 8  # that encode in one process: more wait for each other's Python
Source = SourceConfig | TextConfig


@dataclass
class TextTokenizerConfig:
    path: str | None = None  # folder with a tokenizer (docs/tokenizers.md), its file, or a hub id; null: model.path
    add_tokens: list[str] = field(default_factory=list)  # new tokens that are matched whole in any text, such as <note>
    add_special_tokens: list[str] = field(default_factory=list)  # new tokens that no text becomes, such as <|tool|>


@dataclass
class TokenizerConfig(TextTokenizerConfig):
    template: str = "auto"  # chat template: auto (the tokenizer's own) or a name of docs/data.md, such as chatml
    thinking: Thinking = "mixed"  # replies with <think> and without; always: each has it; never: left out, and prompts say so


@dataclass(frozen=True)
class Text:
    """How records become tokens."""

    tokenizer: Tokenizer
    template: Template | None  # None: documents, not chats


@dataclass(frozen=True)
class Rows:
    """How this run cuts its rows: the same for training and validation."""

    micro_batch_size: int
    multiple_of: int  # a row's length must divide by it under this layout
    mesh: Mesh


def build_text(cfg: TokenizerConfig | TextTokenizerConfig, model_path: str | None) -> Text:
    """Reads the tokenizer and, for chats, the template. Raises ConfigError or DataError if there are none."""
    if not (cfg.path or model_path):
        fix = "give a folder that has one; scripts/train_tokenizer.py makes one from your own text"
        raise ConfigError(Problem("tokenizer.path", "nothing, and no model.path", "a folder with a tokenizer", fix))
    new = {"add_tokens": cfg.add_tokens, "add_special_tokens": cfg.add_special_tokens}
    tokenizer = load_tokenizer(Path(cfg.path or model_path or ""), **new)
    return Text(tokenizer, build_template(cfg.template, tokenizer, thinking=cfg.thinking) if isinstance(cfg, TokenizerConfig) else None)


def check_vocabulary(spec: ModelSpec, text: Text, cfg: TextTokenizerConfig) -> Iterator[Problem]:
    """A model from scratch or a continued one needs a row for each token of documents; chat models may name tokens they never use."""
    size = text.tokenizer.vocab_size
    if size <= spec.num_tokens:
        return
    if cfg.add_tokens or cfg.add_special_tokens:
        fix = f"set model.vocab.size={size}, which makes rows for the new tokens"
        yield Problem("model.vocab.size", str(spec.num_tokens), f"at least the {size} tokens of tokenizer.path and the added ones", fix)
    elif text.template is None:
        fix = f"set model.spec.vocab_size={-(-size // 64) * 64}, or take the model's own tokenizer"
        yield Problem("model.spec.vocab_size", str(spec.vocab_size), f"at least the tokenizer's {size} tokens", fix)


@dataclass(frozen=True)
class Tokens:
    """All tokenised data of a run."""

    train: list[TokenCache]
    validation: dict[str, TokenCache]  # by name, as in metrics: val/<name>/loss


def build_tokens(cfg: DataConfig | TextDataConfig, text: Text, world: World) -> Tokens:
    """The tokenised sources, made by all ranks together where they don't exist yet, and what is held out of them. Of a source that is
    streamed there is nothing."""
    train = [] if cfg.streaming else [build_source(source, text, cfg, world) for source in cfg.train]
    validation = {name: build_source(source, text, cfg, world) for name, source in cfg.validation.items()}
    if cfg.validation_size:
        pairs = [hold_out(cache, cfg.validation_size) for cache in train]
        train = [rest for rest, _ in pairs]
        held = dict(zip(held_out_names(cfg), (part for _, part in pairs), strict=True))
        validation |= {name: replace(part, name=name) for name, part in held.items()}
    return Tokens(train, validation)


def encode_prompts(prompts: Sequence[str], text: Text) -> list[list[int]]:
    """Token ids to continue: a user's message where there is a chat template, else the text as it stands."""
    if text.template is not None:
        return [text.template.prompt([Message("user", prompt)]) for prompt in prompts]
    tokenizer = text.tokenizer
    return [[tokenizer.bos_id] * tokenizer.adds_bos + tokenizer.encode(prompt) for prompt in prompts]


def check_prompts(prompts: Sequence[str], spec: ModelSpec, text: Text) -> Iterator[Problem]:
    """Prompts that leave the model nothing to continue, or no room to."""
    for i, ids in enumerate(encode_prompts(prompts, text)):
        if not 0 < len(ids) < spec.max_seq_len:
            expected = f"1 to {spec.max_seq_len - 1} tokens"
            yield Problem(f"validate.prompts.{i}", f"{len(ids)} tokens", expected, "give a text that the model has room to continue")


def data_facts(train: list[TokenCache], validation: Mapping[str, TokenCache]) -> list[dict[str, Any]]:
    """What the sources hold, as JSON values: counts, and the lengths of the kept samples (shortest, median, 95%, longest)."""
    named = [("train", cache.name, cache) for cache in train] + [("validation", name, cache) for name, cache in validation.items()]
    return [{"use": use, "name": name, **asdict(cache.counts), "lengths": _lengths(cache)} for use, name, cache in named]


def _lengths(cache: TokenCache) -> list[int]:
    return np.percentile(cache.lengths(np.arange(len(cache))), (0, 50, 95, 100)).astype(int).tolist()


def build_loader(
    caches: list[TokenCache], cfg: DataConfig | TextDataConfig, rows: Rows, text: Text, *, global_batch_size: int, seed: int
) -> Loader:
    """The training loader of this data rank."""
    seed = seed if cfg.seed is None else cfg.seed
    sizes, tokens = [len(cache) for cache in caches], [cache.counts.tokens for cache in caches]
    return Loader(
        open_streams(cfg.train[0], text, cfg, seed) if cfg.streaming else caches,
        seq_len=cfg.seq_len,
        micro_batch_size=rows.micro_batch_size,
        global_batch_size=global_batch_size,
        dp_rank=rows.mesh.dp_rank,
        dp_size=rows.mesh.dp_size,
        seed=seed,
        packing=cfg.packing,
        group_by_length=cfg.group_by_length,
        shuffle=cfg.shuffle,
        window=cfg.window,
        mixture=build_mixture(cfg.train, cfg.mixture, sizes=sizes, tokens=tokens) if caches else None,
        pad_id=text.tokenizer.pad_id,
        multiple_of=rows.multiple_of,
        workers=cfg.workers,
        prefetch=cfg.prefetch,
        pin_memory=rows.mesh.device.type == "cuda",
    )


def validation_passes(
    caches: Mapping[str, TokenCache], cfg: DataConfig | TextDataConfig, rows: Rows, text: Text
) -> dict[str, Iterable[list[Batch]]]:
    """One pass over each validation source, in file order; the same number of steps on every rank."""
    return {
        name: evaluation_steps(
            [cache],
            seq_len=cfg.seq_len,
            micro_batch_size=rows.micro_batch_size,
            dp_rank=rows.mesh.dp_rank,
            dp_size=rows.mesh.dp_size,
            packing=cfg.packing,
            window=cfg.window,
            pad_id=text.tokenizer.pad_id,
            multiple_of=rows.multiple_of,
            num_micro_batches=rows.mesh.degrees["pp"],
            pin_memory=rows.mesh.device.type == "cuda",
        )
        for name, cache in caches.items()
    }


def build_source(source: Source, text: Text, cfg: DataConfig | TextDataConfig, world: World, run: str | None = None) -> TokenCache:
    """One tokenised source, made by all of `world`; run: a word shared by them where they are no process group."""
    threads = min(MAX_THREADS, max(1, (os.cpu_count() or 1) // world.local_size))
    plan = source_plan(source, text, cfg) | {"max_bad_records": cfg.max_bad_records}
    return build_cache(cfg.cache, **plan, rank=world.rank, world_size=world.size, run=run, threads=threads, report=log.info)


def source_plan(source: Source, text: Text, cfg: DataConfig | TextDataConfig) -> dict[str, Any]:
    """What build_cache needs to know of a source: its records and how they become tokens."""
    records: Any = open_documents(source) if isinstance(source, TextConfig) else open_records(source)
    plan = _encoding(source, text, cfg)
    return {"records": records, **plan, "key": replace(plan["key"], source=records.digest)}


def open_streams(source: Source, text: Text, cfg: DataConfig | TextDataConfig, seed: int) -> VirtualStreams:
    """A source of JSON Lines, read and tokenised as training goes."""
    plan = _encoding(source, text, cfg)
    lines = Lines(source.name or Path(source.path).stem, find_files(source.path, STREAMED))
    return VirtualStreams(
        lines,
        plan["encode"],
        plan.get("truncate"),
        streams=cfg.streams,
        seq_len=cfg.seq_len,
        cuts=cfg.packing == "cut",
        shuffle=cfg.shuffle,
        window=cfg.window,
        seed=seed,
        encoding=plan["key"].digest,
        threads=cfg.workers,
        max_dropped_share=plan.get("max_dropped_share", 1.0),
    )


def encode_with_roles(
    record: dict, where: str, source: Source, text: Text, cfg: DataConfig | TextDataConfig
) -> Iterator[tuple[str, Encoded, list[str]]]:
    """All that a record holds, preference data included: what it is, its tokens in full length, and who wrote each."""
    if isinstance(source, TextConfig):
        whole = encode_for(source, text, cfg)(record, where)
        made, roles = {"text": whole} if whole else {}, {"text": None}
    else:
        how = _how(source, text, cfg)
        made, roles = encode_all(record, where, **how), all_roles(record, where, **how)
    for kind, encoded in made.items():
        yield kind, encoded, roles[kind] or ["document"] * len(encoded.ids)


def encode_for(source: Source, text: Text, cfg: DataConfig | TextDataConfig) -> Callable[[dict, str], Encoded | None]:
    """(record, where) -> tokens of this source, in full length."""
    if isinstance(source, TextConfig):
        return partial(encode_document, text_key=source.text_key, tokenizer=text.tokenizer)
    return partial(encode_record, **_how(source, text, cfg))


def _encoding(source: Source, text: Text, cfg: DataConfig | TextDataConfig) -> dict[str, Any]:
    """How records become tokens, and the key of that, still without the source's digest."""
    plan: dict[str, Any] = {"encode": encode_for(source, text, cfg)}
    if isinstance(source, TextConfig):  # documents are kept whole, so that one cache serves every seq_len
        batch = partial(encode_documents, text_key=source.text_key, tokenizer=text.tokenizer)
        return plan | {"encode_batch": batch, "key": CacheKey("", "text", text.tokenizer.digest, "", 0, "none")}
    masks = json.dumps(asdict(cfg.masks), sort_keys=True)
    return plan | {
        "encode_batch": partial(encode_records, **_how(source, text, cfg)),
        "key": CacheKey("", masks, text.tokenizer.digest, text.template.digest, cfg.seq_len, cfg.truncation),
        "truncate": lambda encoded, where: truncate(encoded, cfg.seq_len, cfg.truncation, where, keep_end=cfg.masks.replies == "last"),
        "max_dropped_share": cfg.max_dropped_share,
    }


def _how(source: SourceConfig, text: Text, cfg: DataConfig) -> dict[str, Any]:
    """How a source of chats is read and encoded: the keywords of tokenize.py's functions."""
    source = resolve(source)
    return {"template": text.template, "format": source.format, "mapping": mapping_of(source), "masks": cfg.masks}
