"""The loader: this data rank's part of each step of the global order. One cursor, the same on all ranks, is its whole state.

    step     the next global_batch_size packs of the order, never across an epoch's end
    rank r   in micro-batch m: the step's packs from (m * dp_size + r) * micro_batch_size on, micro_batch_size of them

So which samples a step trains on does not depend on dp_size, micro_batch_size or prefetching, and a state saved by one world size is
right for any other. An epoch's last step takes what is left and is filled up with rows of weight 0: all ranks always have the same
number of micro-batches, all of the same length.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
from torch import Tensor

from torchft.batch import Batch
from torchft.data.cache import TokenCache
from torchft.data.checks import check_data
from torchft.data.collate import collate
from torchft.data.masks import MaskConfig
from torchft.data.mixture import Mixture, MixtureConfig
from torchft.data.order import VERSION, Cursor, Order, Place
from torchft.data.prefetch import Prefetch
from torchft.data.sources import SourceConfig
from torchft.data.stream import StreamOrder
from torchft.data.streaming import VirtualStreams
from torchft.data.truncation import Truncation
from torchft.errors import CheckpointError, ConfigError, Problem

Packing = bool | Literal["cut"]
Plan = tuple[list[list[Any]], int, int]  # rows of each micro-batch, their length, the epoch


@dataclass
class DataConfig:
    """Section `data`: what is trained and validated on, and in which order."""

    train: list[SourceConfig] = field(default_factory=list)  # training sources, put together by `mixture`
    validation: dict[str, SourceConfig] = field(default_factory=dict)  # validation sources by name
    validation_size: float = 0  # held out from each training source: below 1 a share of it, else a number of samples
    mixture: MixtureConfig = field(default_factory=MixtureConfig)  # what an epoch takes of each training source
    seq_len: int = 2048  # tokens in a row; longer samples are handled by `truncation`
    packing: bool = True  # several samples share a row, without seeing each other; false: one sample a row, padded
    group_by_length: bool = False  # without packing: the rows of a step are of like length, so less is padded
    masks: MaskConfig = field(default_factory=MaskConfig)  # which messages are trained
    truncation: Truncation = "error"  # samples over seq_len: error | drop | left (keeps the end) | right (the start) | proportional
    max_dropped_share: float = 0.5  # stop if a larger share of a source's samples is dropped
    max_bad_records: int = 0  # broken records of a source to leave out, counted and named; 0: the first is an error
    shuffle: bool = True  # a new order in each epoch; false: the files' order
    window: int = 4096  # samples from which packs are made at once
    seed: int | None = None  # of the order; null: the run's seed
    workers: int = 1  # threads that prepare batches ahead; 0: none
    prefetch: int = 2  # steps prepared ahead
    cache: str = ".cache/tokens"  # folder of tokenised sources, seen by all processes
    streaming: bool = False  # tokenise the training source, JSON Lines, as training goes, without a cache; needs train.steps
    streams: int = 64  # with streaming: places in its files that are read side by side; best a multiple of the rows of a micro-batch

    def check(self) -> Iterator[Problem]:
        yield from check_data(self)
        if not 0 <= self.max_dropped_share <= 1:
            yield Problem("data.max_dropped_share", str(self.max_dropped_share), "a share from 0 to 1", "use e.g. 0.5")
        if self.group_by_length and self.packing:
            yield Problem("data.group_by_length", "true", "data.packing=false: packs are full already", "set one of the two to false")


def grad_accum(global_batch_size: int, *, micro_batch_size: int, dp_size: int) -> int:
    """Micro-batches of a step on each data rank. Raises ConfigError if global_batch_size can't be dealt out evenly."""
    at_once = dp_size * micro_batch_size
    if global_batch_size > 0 and at_once > 0 and global_batch_size % at_once == 0:
        return global_batch_size // at_once
    given = f"{global_batch_size} with train.micro_batch_size={micro_batch_size} on {dp_size} data-parallel ranks"
    below, above = global_batch_size // max(1, at_once) * at_once, (global_batch_size // max(1, at_once) + 1) * at_once
    fix = f"use train.global_batch_size={' or '.join(str(size) for size in (below, above) if size > 0)}"
    rows = global_batch_size // dp_size if global_batch_size % dp_size == 0 else 0
    legal = [size for size in range(1, rows + 1) if rows % size == 0]
    if legal:
        fix += f", or train.micro_batch_size={' or '.join(map(str, legal))}"
    expected = f"a positive multiple of {dp_size} ranks x {micro_batch_size} rows = {at_once}"
    raise ConfigError(Problem("train.global_batch_size", given, expected, fix))


class Loader:
    """This data rank's micro-batches, step after step, for as many epochs as asked for.

    packing: several samples a row, or one ("cut": one after the other, cut where a row ends, see stream.py).
    mixture: what an epoch takes of each source; None: all. group_by_length: without packing, the rows of a step are of like length.
    multiple_of: row lengths are multiples of it (the parallel layout's demand). workers: threads that make batches `prefetch` steps
    ahead; they change neither order nor state. pin_memory: for CUDA. Raises ConfigError if the sizes don't fit each other.
    """

    def __init__(
        self,
        data: Sequence[TokenCache] | VirtualStreams,
        *,
        seq_len: int,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        seed: int = 0,
        packing: Packing = True,
        group_by_length: bool = False,
        shuffle: bool = True,
        window: int = 4096,
        mixture: Mixture | None = None,
        pad_id: int = 0,
        multiple_of: int = 1,
        workers: int = 0,
        prefetch: int = 1,
        pin_memory: bool = False,
    ):
        self.grad_accum = grad_accum(global_batch_size, micro_batch_size=micro_batch_size, dp_size=dp_size)
        if packing and seq_len % multiple_of:
            lower, upper = seq_len // multiple_of * multiple_of, _round_up(seq_len, multiple_of)
            expected = f"a multiple of {multiple_of} with packing, so that a row can be split by the parallel layout"
            raise ConfigError(Problem("data.seq_len", str(seq_len), expected, f"use {lower or upper} or {upper}"))
        self.order: Order | VirtualStreams
        if isinstance(data, VirtualStreams):
            self.order = data
        else:
            assert data and all(len(cache) and cache.key.seq_len <= seq_len for cache in data), "build the caches for this seq_len"
            assert len({cache.size for cache in data}) == 1, "pairs and single samples in one loader"
            plan: dict[str, Any] = {"seq_len": seq_len, "shuffle": shuffle, "window": window, "seed": seed, "mixture": mixture}
            group = global_batch_size if group_by_length else None
            self.order = StreamOrder(data, **plan) if packing == "cut" else Order(data, packing=packing, group=group, **plan)
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.pad_id, self.multiple_of, self.pin_memory = pad_id, multiple_of, pin_memory
        self.workers, self.prefetch = workers, prefetch
        self.cursor = self._before = self.order.start()
        self._ahead: Prefetch | None = None

    def next_step(self) -> list[Batch]:
        """grad_accum micro-batches of (micro_batch_size, t); t is the same for all of them, on all ranks."""
        if not self.workers:
            plan, after = self._plan(self.cursor)
            batches = self._make(plan)
        else:
            self._ahead = self._ahead or Prefetch(self._plan, self._make, self.cursor, workers=self.workers, depth=self.prefetch)
            batches, after = self._ahead.next()
        self._before, self.cursor = self.cursor, after
        return batches

    def repeat_step(self, micro_batch_size: int) -> list[Batch]:
        """The step that next_step gave last, dealt anew in micro-batches of another size, which also holds from here on."""
        self.close()  # the threads read the sizes that change now
        self.grad_accum = grad_accum(self.global_batch_size, micro_batch_size=micro_batch_size, dp_size=self.dp_size)
        self.micro_batch_size, self.cursor = micro_batch_size, self._before
        return self.next_step()

    def row_length(self, packs: list[Any]) -> int:
        """Tokens in each row of a step of these packs, padding included."""
        if self.order.packing:
            return self.order.seq_len
        return _round_up(int(self.order.lengths(np.concatenate(packs)).max()), self.multiple_of)

    def steps_per_epoch(self, epoch: int) -> int:
        """Plans the whole epoch when first asked for (with packing: seconds per million samples)."""
        return -(-self.order.num_rows(epoch) // self.global_batch_size)

    def num_steps(self, epochs: float) -> int:
        """The number of the step, counted from the run's first, that completes `epochs` passes: the steps made so far and those
        still to make, so it holds after a resume with another global_batch_size as well. A part of an epoch is rounded up."""
        cursor, step = self.cursor, self.cursor.step
        done = self.order.rows_before(cursor)
        for epoch in range(cursor.epoch, math.ceil(epochs)):
            rows = self.order.num_rows(epoch) * min(1.0, epochs - epoch)
            step += max(0, math.ceil((rows - done) / self.global_batch_size - 1e-9))
            done = 0
        return step

    def state(self) -> dict:
        """The state after the last step that next_step returned, as JSON: global, the same on every rank."""
        c, order = self.cursor, self.order
        sources = [{**source, "epoch": c.epoch} for source in order.source_states(c)]
        where = {"epoch": c.epoch, "window": c.window, "pack": c.pack, "step": c.step}
        plan = {"plan_hash": order.hash(), "plan": order.settings()}
        return {"version": VERSION, "seed": order.seed, **where, **plan, "sources": sources, "streams": order.stream_states(c)}

    def load_state(self, state: dict) -> None:
        """Continues behind that state's last step, whatever dp_size, micro_batch_size and global_batch_size are now.

        Raises CheckpointError, with a table of the differences, if this loader's order is not the one the state belongs to.
        """
        try:
            if state["version"] != VERSION or state["plan_hash"] != self.order.hash():
                raise CheckpointError(_difference(self.state(), state))
            taken, tokens = (tuple(int(source[key]) for source in state["sources"]) for key in ("taken", "tokens"))
            where = {key: int(state[key]) for key in ("epoch", "window", "pack", "step")}
            places = tuple(Place(**place) for place in state["streams"] or ())
            cursor = Cursor(**where, taken=taken, tokens=tokens, places=places)
            if not self.order.has(cursor):
                raise ValueError(f"{cursor} is outside of the data's order")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint's loader state can't be read: {error!r}; take another checkpoint") from error
        self.close()
        self.cursor = cursor

    def close(self) -> None:
        """Ends the threads; the next step begins anew from the cursor."""
        ahead, self._ahead = self._ahead, None
        if ahead:
            ahead.close()

    def _plan(self, cursor: Cursor) -> tuple[Plan, Cursor]:
        """This rank's rows of a step: a pure function of the cursor, so it may run ahead in a thread; so may _make."""
        packs, after = self.order.take(cursor, self.global_batch_size)
        fillers = [self.order.filler] * self.micro_batch_size
        rows = []
        for m in range(self.grad_accum):
            first = (m * self.dp_size + self.dp_rank) * self.micro_batch_size
            rows.append((packs[first : first + self.micro_batch_size] + fillers)[: self.micro_batch_size])
        rows, after = self.order.fetch(rows, cursor, after)
        return (rows, self.row_length(packs), cursor.epoch), after

    def _make(self, plan: Plan) -> list[Batch]:
        rows, t, epoch = plan
        return [self._collate(batch, epoch, t) for batch in rows]

    def _collate(self, packs: list[Any], epoch: int, t: int) -> Batch:
        rows, ids = zip(*(self.order.read(pack, epoch) for pack in packs), strict=True)
        batch = collate(rows, ids, t=t, pad_id=self.pad_id, epoch=epoch, in_units=self.order.in_units)
        if not self.pin_memory:
            return batch
        tensors = {f.name: value.pin_memory() for f in fields(batch) if isinstance(value := getattr(batch, f.name), Tensor)}
        return replace(batch, **tensors)


def evaluation_steps(
    caches: Sequence[TokenCache],
    *,
    seq_len: int,
    micro_batch_size: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    packing: Packing = True,
    window: int = 4096,
    pad_id: int = 0,
    multiple_of: int = 1,
    num_micro_batches: int = 1,
    pin_memory: bool = False,
) -> Iterator[list[Batch]]:
    """One pass in the files' order; all ranks get the same number of steps of num_micro_batches (a pipeline wants several)."""
    loader = Loader(
        caches,
        seq_len=seq_len,
        micro_batch_size=micro_batch_size,
        global_batch_size=micro_batch_size * dp_size * num_micro_batches,
        dp_rank=dp_rank,
        dp_size=dp_size,
        packing=packing,
        shuffle=False,
        window=window,
        pad_id=pad_id,
        multiple_of=multiple_of,
        pin_memory=pin_memory,
    )
    while loader.cursor.epoch == 0:
        yield loader.next_step()


def _round_up(size: int, multiple_of: int) -> int:
    return -(-size // multiple_of) * multiple_of


def _difference(given: dict, saved: dict) -> str:
    """Which parts of the order differ, each as given / expected."""
    pairs = [("data version", given["version"], saved["version"]), ("data.seed", given["seed"], saved["seed"])]
    pairs += [(f"data.{key}", given["plan"].get(key), saved["plan"].get(key)) for key in given["plan"] | saved["plan"]]
    ours, theirs = given["sources"], saved["sources"]
    pairs.append(("number of sources", len(ours), len(theirs)))
    for mine, other in zip(ours, theirs, strict=False):
        if mine["hash"] != other["hash"]:
            parts = [(f"{mine['name']}: {key}", mine["key"][key], other["key"].get(key)) for key in mine["key"]]
            parts = [part for part in parts if part[1] != part[2]]
            pairs += parts or [(f"{mine['name']}: contents", mine["hash"], other["hash"])]
    lines = [f"  {name}: given {mine}, expected {other}" for name, mine, other in pairs if mine != other]
    return "\n".join(
        [
            "the data or its order differ from the checkpoint's, so the run can't go on where it stopped:",
            *lines,
            "  fix: restore these settings, or start anew from the checkpoint's weights (checkpoint.load)",
        ]
    )
