"""What ended a run, in the user's terms: memory, a rank that hangs or is dead, or another error; and the marker exit.json.

    exception on this rank --note--> the ranks' store: "step 12: OutOfMemory: ..."     --explain--> OutOfMemory | RankLost | as it was

A rank whose collective failed waits a moment for the others' notes: whoever left none hangs or was killed, and is named.
"""

import json
import os
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from torchft.compat import default_store
from torchft.config.problems import redact_text
from torchft.dist import environment, rank, restart_count, world_size
from torchft.errors import NumericError, OutOfMemory, RankLost, TorchftError
from torchft.train.memory_advice import memory_advice

WAIT_FOR_NOTES_S = 5.0
MEANINGS = {
    0: "done",
    1: "unexpected error",
    2: "config, data or checkpoint can't be used",
    75: "stopped and saved: start the same command to go on",
    78: "out of memory",
    79: "loss, gradients or weights not finite",
    80: "a rank hangs or is dead",
    81: "crash loop: every restart died at the same step",
    130: "interrupted, not saved",
}
MARKER = "exit.json"
EXIT_CODES = "TORCHFT_EXIT_CODES"  # environment: the file for exit codes of a process that `torchft run` started
WAITING = "waiting for other ranks"
SHOWN = 8  # ranks in a message
GLOO = ("gloo/transport", "Application timeout caused pair closure", "Connection closed by peer")  # a plain RuntimeError's text


def explain(error: BaseException, place: str, cfg, sizes: dict[str, float]) -> BaseException:
    """The error to end with: one with a message for the user where the cause is known, else the same. place: what the run was doing.

    sizes: GiB of this rank by component, and `peak`.
    """
    if is_out_of_memory(error):
        error = OutOfMemory(f"out of memory at {place}\n{memory_advice(cfg, sizes, str(error))}")
    lost = is_lost_connection(error)
    if world_size() > 1:
        _note(f"{place}: {WAITING if lost else _line(error)}")
        if lost:
            return RankLost(_lost_text(place, error))
    return error


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's error, Python's, or that of torch's CPU allocator."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def is_lost_connection(error: BaseException) -> bool:
    """A collective that timed out or lost a peer; a later error that only says that is one too."""
    if isinstance(error, NumericError | OutOfMemory | KeyboardInterrupt):
        return False
    return isinstance(error, dist.DistError) or any(text in str(error) for text in GLOO)  # also a save that failed for it


def exit_code_of(error: BaseException) -> int:
    """The process's exit code after this error. A connection that nobody explained was lost while the ranks still met."""
    if isinstance(error, TorchftError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    return RankLost.exit_code if is_lost_connection(error) else 1


def report_exit(rank: int, code: int) -> None:
    """Tells `torchft run`, if it started this process: torchrun passes no worker's code on (launch.py)."""
    path = environment(EXIT_CODES)
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{rank} {code} {restart_count()}\n")


def write_marker(folder: Path, code: int, step: int, reason: str) -> None:
    """exit.json, by the first rank that ends: for schedulers, since torchrun ends with 1 whatever the run's code."""
    facts = {"code": code, "meaning": MEANINGS.get(code, ""), "step": step, "rank": rank(), "reason": redact_text(reason)}
    facts |= {"attempt": restart_count(), "time": time.time()}
    draft = folder / f".{MARKER}-{rank()}-{os.getpid()}"
    with suppress(OSError):  # there already, or a full disk: the process's own code says the same
        draft.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        os.link(draft, folder / MARKER)  # appears whole, and once
    draft.unlink(missing_ok=True)


def _line(error: BaseException) -> str:
    return redact_text(f"{type(error).__name__}: {error}".splitlines()[0])


def _note(text: str) -> None:
    with suppress(Exception):  # the store may have died with the rank that held it; what is known is printed all the same
        default_store().set(f"torchft/ended/{rank()}", text)


def _lost_text(place: str, error: BaseException) -> str:
    notes, gone = _notes()
    notes[rank()] = f"{place}: {WAITING}"
    silent = [number for number, note in enumerate(notes) if note is None]
    told = [(WAITING in note, f"rank {number}: {note}") for number, note in enumerate(notes) if note is not None]
    shown = [text for _, text in sorted(told)[:SHOWN]]  # those with an error of their own first
    shown += [f"and {len(told) - SHOWN} ranks more"] if len(told) > SHOWN else []
    who = "rank 0 is gone, and with it the ranks' store" if gone else "every rank could still tell"
    if silent and not gone:
        who = f"rank {', '.join(map(str, silent))} says nothing: it hangs or was killed"
    return (
        f"a collective failed at {place}: {who}\n  given:    {_line(error)[:300]}\n            "
        + "\n            ".join(shown)
        + "\n  expected: all ranks in every collective, within parallel.timeout_s (parallel.step_timeout_s in a step after the first)\n"
        "  fix:      see logs/rank_N.stack of a rank that hung, and its host's own log; the same command goes on from the last checkpoint"
    )


def _notes() -> tuple[list[str | None], bool]:
    """Every rank's note, after waiting a little for those that are on their way. True: rank 0 kept the store and has died."""
    limit, notes = time.monotonic() + WAIT_FOR_NOTES_S, [None] * world_size()
    try:
        store = default_store()
        while time.monotonic() < limit and None in notes:
            for number in (number for number, note in enumerate(notes) if note is None):
                if store.check([f"torchft/ended/{number}"]):
                    notes[number] = store.get(f"torchft/ended/{number}").decode()
            time.sleep(0.1)
    except Exception:  # whatever a store whose server is gone raises
        return notes, True
    return notes, False
