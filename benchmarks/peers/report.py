"""What a peer's driver reads and writes: its job, and one row a step, flushed, as torchft's own metrics.jsonl has them.

    {"begin": time, "versions": {...}}      {"time": ..., "loss": ..., "tokens": ...}      ...

This file runs in the environments of all libraries: it imports nothing of them.
"""

import json
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """What to train; see measure.py, which writes it."""

    model: str  # HF folder
    data: str  # tokens.jsonl: {"input_ids": [...], "labels": [...]} a line
    out: str  # rows go here
    scratch: str  # an empty folder
    mode: str  # eager | compiled | chat | lora
    dtype: str  # bf16 (parameters, gradients and optimizer state) | fp32
    rows: int  # of a step
    seq_len: int
    lr: float
    max_norm: float
    adapter: str  # folder with PEFT's files, the LoRA to train over the frozen model; "": train the model


def read_job() -> Job:
    """The job named on the command line."""
    return Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


def read_samples(job: Job) -> list[dict[str, list[int]]]:
    """The samples as lists of ids."""
    return [json.loads(line) for line in Path(job.data).read_text(encoding="utf-8").splitlines()]


class Report:
    """The rows of a run."""

    def __init__(self, job: Job, *packages: str):
        self._file = open(job.out, "w", encoding="utf-8")  # noqa: SIM115 - open until the process ends
        self._versions = {name: version(name) for name in ("torch", *packages)}

    def begin(self) -> None:
        """Just before the first step: model and optimizer are there."""
        self._write({"begin": time.time(), "versions": self._versions})

    def step(self, loss: float, tokens: int, trained: int) -> None:
        """After the optimizer step. loss: mean over the trained tokens; tokens: without padding."""
        self._write({"time": time.time(), "loss": loss, "tokens": tokens, "trained": trained})

    def _write(self, row: dict) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def count_tokens(input_ids, labels, attention_mask=None) -> tuple[int, int]:
    """(tokens that are not padding, tokens that are predicted and trained) of (b, t) tensors; labels under their own ids."""
    real = input_ids.numel() if attention_mask is None else int((attention_mask != 0).sum())
    return real, int((labels[:, 1:] != -100).sum())
