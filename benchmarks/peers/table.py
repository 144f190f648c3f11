"""From measured runs to the table: medians over rounds, ratios to ours, and whether all trained the same thing.

Speed of full rows: tokens of a step over the median step after the warm-up. Of chats: real tokens over the time of all steps after the
warm-up but the last, which may be short; padding counts for nothing. Losses: of full rows each step's, of chats (learning rate 0) the
mean over all trained tokens of the epoch.
"""

import math
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

from peers.cases import PEERS
from peers.measure import Case, Measured

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # of a loss, relative to ours
HEAD = ("", "tokens/s", "min-max", "ours / it", "step s", "peak GiB", "ours / it", "first step s", "loss", "off by", "same work")


def tokens_per_s(one: Measured, warmup: int) -> float:
    """Real tokens per second of one run; its first step is no part of `seconds`."""
    seconds, tokens = one.seconds[warmup - 1 :], one.tokens[warmup:]
    if one.case.mode == "chat":
        return sum(tokens[:-1]) / sum(seconds[:-1])
    return statistics.median(tokens) / statistics.median(seconds)


def loss_difference(one: Measured, ours: Measured) -> float:
    """The largest relative difference of the losses that must agree; infinite if not the same tokens were trained."""
    if sum(one.trained) != sum(ours.trained) or sum(one.tokens) != sum(ours.tokens):
        return math.inf
    mine, reference = ([_mean_loss(m)] if one.case.mode == "chat" else m.losses for m in (one, ours))
    return max(abs(a - b) / b for a, b in zip(mine, reference, strict=True))


def _mean_loss(one: Measured) -> float:
    """Over all trained tokens of the run."""
    return math.fsum(loss * count for loss, count in zip(one.losses, one.trained, strict=True)) / sum(one.trained)


def sections(measured: Sequence[Measured], warmup: int) -> str:
    """A Markdown table for each dtype and mode there is."""
    found = dict.fromkeys((m.case.dtype, m.case.mode) for m in measured)
    return "\n".join(_section(dtype, mode, measured, warmup) for dtype, mode in found)


def _section(dtype: str, mode: str, measured: Sequence[Measured], warmup: int) -> str:
    runs = {name: [m for m in measured if m.case == Case(name, mode, dtype)] for name in PEERS}
    ours = runs["ours"]
    rows = [_row(_label(name, mode), mode, runs[name], ours, warmup) for name in PEERS if runs[name]]
    lines = ["| " + " | ".join(cells) + " |" for cells in (HEAD, ["---", *["---:"] * (len(HEAD) - 1)], *rows)]
    every = [m for name in PEERS for m in runs[name]]
    loads = [m.load for m in every]
    commits = ", ".join(dict.fromkeys(m.commit for m in every if m.commit))
    how = f"Commit {commits or 'unknown'}; load (1-minute average before a run) {min(loads):.1f} to {max(loads):.1f}.\n\n"
    return f"## {TITLES[mode]}, {NAMES[dtype]}\n\n{how}" + "\n".join(lines) + "\n"


TITLES = {
    "eager": "Full rows, eager",
    "compiled": "Full rows, compiled",
    "chat": "Chats, prompts masked: real tokens per second",
    "lora": "LoRA on full rows, eager",
}
HOW = """- Full rows: 4 rows a step, every row a chat of exactly 512 tokens, the same for all; learning rate 1e-5, gradients clipped at 1.
  Each step's loss must agree with ours.
- Chats: 1 to 7 turns, prompts masked. A step has 4 rows: packed to 512 tokens, or one chat each, padded to the longest, as each library
  does it. Only real tokens count. One epoch at learning rate 0: the mean loss over all trained tokens must agree with ours.
- LoRA: the same rows, an adapter of rank 16 and alpha 32 on all seven linear layers of every block, without dropout, at learning rate
  1e-3; base, adapter and optimizer state in one dtype. All start from the same A and B, B not zero, so that the first loss shows the
  adapter's factor and layers. HF Trainer and TRL train peft's; peft's own default would keep the adapter in fp32.
- All: SmolLM2-135M, AdamW (fused) at a constant learning rate without decay, no recomputation (TRL's default is switched off), attention
  by PyTorch's SDPA, parameters, gradients and optimizer state all bf16 or all fp32. litgpt has no clipping, no constant learning rate and
  no compiled fine-tuning: an optimizer given by its own option does the first two.
- tokens/s: median of the rounds, each without its warm-up steps, all that stands between two steps included. peak GiB: the largest
  process's resident memory during these steps. first step s: from a prepared model to the end of step 1, compilation without a cache.
- ours / it: torchft's number divided by the line's. same work: the losses differ by no more than 1e-4 (fp32) or 2e-2 (bf16), relative,
  and the numbers of tokens and of trained tokens are equal.
"""
NAMES = {"bf16": "pure bf16", "fp32": "fp32"}


def _label(name: str, mode: str) -> str:
    return PEERS[name].label + (f" ({PEERS[name].chat})" if mode == "chat" else "")


def _row(label: str, mode: str, runs: Sequence[Measured], ours: Sequence[Measured], warmup: int) -> list[str]:
    """The cells of one library; where ours was not run there is nothing to compare with."""
    speeds = [tokens_per_s(m, warmup) for m in runs]
    speed, peak = statistics.median(speeds), statistics.median(m.peak_mib for m in runs)
    step = statistics.median(s for m in runs for s in m.seconds[warmup - 1 :])
    cold = [m.first_step_s for m in runs if m.cold] or [m.first_step_s for m in runs]
    loss = _mean_loss(runs[0]) if mode == "chat" else runs[0].losses[0]
    faster = smaller = difference = same = "-"
    if ours:
        faster = f"{statistics.median(tokens_per_s(m, warmup) for m in ours) / speed:.2f}x"
        smaller = f"{statistics.median(m.peak_mib for m in ours) / peak:.2f}x"
        off = max(loss_difference(m, ours[0]) for m in runs)
        difference, same = f"{off:.0e}", "yes" if off <= TOLERANCE[runs[0].case.dtype] else "NO"
    first = [label, f"{speed:.0f}", f"{min(speeds):.0f}-{max(speeds):.0f}", faster, f"{step:.2f}"]
    return [*first, f"{peak / 1024:.2f}", smaller, f"{max(cold):.1f}", f"{loss:.5f}", difference, same]


def hardware() -> dict[str, str]:
    """The processor, what it can do for bf16, memory and system."""
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in cpu.split("\n\n")[0].splitlines() if ":" in line)
    names = {key.strip(): value.strip() for key, value in fields.items()}
    flags = names.get("flags", "").split()
    fast = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": f"{names.get('model name', platform.processor())}, {os.cpu_count()} cores",
        "instructions": ", ".join(fast) + ("" if "amx_bf16" in fast else " (no AMX)"),
        "memory": f"{memory:.0f} GiB",
        "system": f"{platform.system()} {platform.release().partition('-')[0]}, Python {platform.python_version()}",
    }
