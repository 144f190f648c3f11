"""From config to batches: tokenizer and template, the tokenised caches, the training loader and the validation passes."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchft.batch import Batch
from torchft.data.cache import CacheKey, TokenCache, build_cache
from torchft.data.loader import DataConfig, Loader, evaluation_steps
from torchft.data.sources import SourceConfig, open_records
from torchft.data.templates import Template, build_template
from torchft.data.tokenize import encode_record, truncate
from torchft.dist import World
from torchft.log import get_logger
from torchft.parallel.mesh import Mesh
from torchft.tokenizers.load import load_tokenizer
from torchft.tokenizers.protocol import Tokenizer

log = get_logger(__name__)


@dataclass
class TokenizerConfig:
    path: str | None = None  # folder with tokenizer.json or tokenizer.model; null: model.path
    template: str = "auto"  # chat template: auto (the tokenizer's own) or chatml


@dataclass(frozen=True)
class Text:
    """How chats become tokens."""

    tokenizer: Tokenizer
    template: Template


@dataclass(frozen=True)
class Rows:
    """How this run cuts its rows: the same for training and validation."""

    micro_batch_size: int
    multiple_of: int  # a row's length must divide by it under this layout
    mesh: Mesh


def build_text(cfg: TokenizerConfig, model_path: str | None) -> Text:
    """Reads tokenizer and template. Raises DataError if there are none."""
    tokenizer = load_tokenizer(Path(cfg.path or model_path or ""))
    return Text(tokenizer, build_template(cfg.template, tokenizer))


def build_caches(sources: Iterable[SourceConfig], text: Text, cfg: DataConfig, world: World) -> list[TokenCache]:
    """The tokenised sources, made by all ranks together where they don't exist yet."""
    return [_build_cache(source, text, cfg, world) for source in sources]


def data_facts(train: list[TokenCache], validation: Mapping[str, TokenCache]) -> list[dict[str, Any]]:
    """What the sources hold, as JSON values: counts, and the lengths of the kept samples (shortest, median, 95%, longest)."""
    named = [("train", cache.name, cache) for cache in train] + [("validation", name, cache) for name, cache in validation.items()]
    return [{"use": use, "name": name, **asdict(cache.counts), "lengths": _lengths(cache)} for use, name, cache in named]


def _lengths(cache: TokenCache) -> list[int]:
    return np.percentile(np.diff(cache.offsets), (0, 50, 95, 100)).astype(int).tolist()


def build_loader(caches: list[TokenCache], cfg: DataConfig, rows: Rows, text: Text, *, global_batch_size: int, seed: int) -> Loader:
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
        shuffle=cfg.shuffle,
        window=cfg.window,
        pad_id=text.tokenizer.pad_id,
        multiple_of=rows.multiple_of,
        prefetch=cfg.workers > 0,
        pin_memory=rows.mesh.device.type == "cuda",
    )


def validation_passes(caches: Mapping[str, TokenCache], cfg: DataConfig, rows: Rows, text: Text) -> dict[str, Iterable[list[Batch]]]:
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


def _build_cache(source: SourceConfig, text: Text, cfg: DataConfig, world: World) -> TokenCache:
    records = open_records(source)
    return build_cache(
        cfg.cache,
        records,
        lambda record, where: encode_record(record, where, format=source.format, template=text.template),
        CacheKey(records.digest, source.format, text.tokenizer.digest, text.template.digest, cfg.seq_len, cfg.truncation),
        truncate=lambda encoded, where: truncate(encoded, cfg.seq_len, cfg.truncation, where),
        rank=world.rank,
        world_size=world.size,
        max_dropped_share=cfg.max_dropped_share,
        report=log.info,
    )
