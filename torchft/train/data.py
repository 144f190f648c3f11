"""From config to batches: tokenizer and template, the tokenised caches, the training loader and the validation passes.

Chats (SourceConfig, with a template) and documents (TextConfig, without one) differ in how a record becomes tokens, and in nothing
after that.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from torchft.batch import Batch
from torchft.data.cache import CacheKey, TokenCache, build_cache
from torchft.data.loader import DataConfig, Loader, evaluation_steps
from torchft.data.sources import SourceConfig, mapping_of, open_records, resolve
from torchft.data.templates import Template, Thinking, build_template
from torchft.data.text import TextConfig, TextDataConfig, encode_document, open_documents
from torchft.data.tokenize import encode_record
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


def build_caches(sources: Iterable[Source], text: Text, cfg: DataConfig | TextDataConfig, world: World) -> list[TokenCache]:
    """The tokenised sources, made by all ranks together where they don't exist yet."""
    return [_build_cache(source, text, cfg, world) for source in sources]


def data_facts(train: list[TokenCache], validation: Mapping[str, TokenCache]) -> list[dict[str, Any]]:
    """What the sources hold, as JSON values: counts, and the lengths of the kept samples (shortest, median, 95%, longest)."""
    named = [("train", cache.name, cache) for cache in train] + [("validation", name, cache) for name, cache in validation.items()]
    return [{"use": use, "name": name, **asdict(cache.counts), "lengths": _lengths(cache)} for use, name, cache in named]


def _lengths(cache: TokenCache) -> list[int]:
    return np.percentile(np.diff(cache.offsets), (0, 50, 95, 100)).astype(int).tolist()


def build_loader(
    caches: list[TokenCache], cfg: DataConfig | TextDataConfig, rows: Rows, text: Text, *, global_batch_size: int, seed: int
) -> Loader:
    """The training loader of this data rank."""
    return Loader(
        caches,
        seq_len=cfg.seq_len,
        micro_batch_size=rows.micro_batch_size,
        global_batch_size=global_batch_size,
        dp_rank=rows.mesh.dp_rank,
        dp_size=rows.mesh.dp_size,
        seed=seed if cfg.seed is None else cfg.seed,
        packing=cfg.packing,
        group_by_length=cfg.group_by_length,
        shuffle=cfg.shuffle,
        window=cfg.window,
        pad_id=text.tokenizer.pad_id,
        multiple_of=rows.multiple_of,
        prefetch=cfg.workers > 0,
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


def encode_for(source: Source, text: Text, cfg: DataConfig | TextDataConfig) -> Callable[[dict, str], Encoded | None]:
    """(record, where) -> tokens of this source, in full length."""
    if isinstance(source, TextConfig):
        return partial(encode_document, text_key=source.text_key, tokenizer=text.tokenizer)
    source = resolve(source)
    return partial(encode_record, template=text.template, format=source.format, mapping=mapping_of(source), masks=cfg.masks)


def _build_cache(source: Source, text: Text, cfg: DataConfig | TextDataConfig, world: World) -> TokenCache:
    plan = _documents(source, text) if isinstance(source, TextConfig) else _chats(source, text, cfg)
    encode = encode_for(source, text, cfg)
    shared = {"max_bad_records": cfg.max_bad_records, "rank": world.rank, "world_size": world.size, "report": log.info}
    return build_cache(cfg.cache, encode=encode, **plan, **shared)


def _chats(source: SourceConfig, text: Text, cfg: DataConfig) -> dict[str, Any]:
    """What build_cache needs to know of chats."""
    records = open_records(source)
    masks = json.dumps(asdict(cfg.masks), sort_keys=True)
    return {
        "records": records,
        "key": CacheKey(records.digest, masks, text.tokenizer.digest, text.template.digest, cfg.seq_len, cfg.truncation),
        "truncate": lambda encoded, where: truncate(encoded, cfg.seq_len, cfg.truncation, where, keep_end=cfg.masks.replies == "last"),
        "max_dropped_share": cfg.max_dropped_share,
    }


def _documents(source: TextConfig, text: Text) -> dict[str, Any]:
    """The same of documents: whole, so that one cache serves every seq_len."""
    records = open_documents(source)
    return {"records": records, "key": CacheKey(records.digest, "text", text.tokenizer.digest, "", 0, "none")}
