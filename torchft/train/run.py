"""A run: its processes and mesh, its folder, what it says, and how it stops. `with Run(cfg) as run:` holds a recipe's body.

    output_dir/{config.yaml, run.json, lock, metrics.jsonl, events.jsonl, goodput.json, exit.json, summary.json, report.html, logs/, ...}

The loop stands in the recipe; `steps` counts and times it and ends it early, on all ranks at the same step, when any rank was asked
to stop (stop.py). What ended a run otherwise is told in the user's terms (failure.py).
"""

import gc
import hashlib
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from torchft import dist, log
from torchft.checkpoint.background import Saved
from torchft.checkpoint.hf import weight_shapes
from torchft.config.problems import redact_text
from torchft.config.show import config_dict
from torchft.errors import NumericError, TorchftError
from torchft.faults import fire
from torchft.metrics.flops import flops_per_token, mfu, peak_tflops
from torchft.metrics.goodput import Goodput
from torchft.metrics.memory import peak_gib
from torchft.metrics.meters import StepMeter
from torchft.metrics.profile import Profiler
from torchft.metrics.rows import train_row, validation_row
from torchft.metrics.sinks import Sinks, build_sinks
from torchft.models.spec import ModelSpec
from torchft.parallel.mesh import build_mesh, resolve_degrees
from torchft.parallel.parts import Parts
from torchft.train import history
from torchft.train.claim import Claim
from torchft.train.failure import exit_code_of, explain, report_exit, write_marker
from torchft.train.memory_advice import component_sizes
from torchft.train.step import StepStats
from torchft.train.stop import Stop
from torchft.train.watch import Watch

logger = log.get_logger(__name__)


@dataclass
class DebugConfig:
    deterministic: bool = False  # only algorithms that give the same bits every time (CUDA); slower, and an error where there is none
    ledger: bool = False  # log each axis's collectives, bytes and seconds (rank 0's); waits for each of them, so steps are slower


STOPPED = 75  # exit code: asked to stop, and saved


class Run:
    """What a recipe's loop reports to. `step` is the last finished step."""

    def __init__(self, cfg):
        """cfg: a recipe's config. Joins the process group, builds the mesh, locks output_dir and writes config.yaml and run.json."""
        log.setup(int(dist.environment("RANK", "0")), cfg.metrics.level.upper())
        self.cfg = cfg
        self.world = dist.init_world(cfg.device, cfg.parallel.timeout_s)
        mixed, timeout_s = cfg.precision.is_mixed or cfg.parallel.fsdp.cpu_offload, cfg.parallel.timeout_s
        if mixed:
            dist.ensure_group(self.world, timeout_s)
        torch.set_float32_matmul_precision(cfg.precision.matmul)
        dist.set_deterministic(cfg.debug.deterministic)
        degrees = resolve_degrees(cfg.parallel, self.world.size)
        self.mesh = build_mesh(degrees, self.world.device, mixed=mixed, timeout_s=timeout_s)
        self.folder = Path(cfg.output_dir)
        self.config_hash = hashlib.sha256(json.dumps(config_dict(cfg), sort_keys=True, default=str).encode()).hexdigest()
        self.started, self.goodput = time.monotonic(), Goodput()
        self.step, self.tokens_total, self.skipped_steps, self._skipped_in_row = 0, 0, 0, 0
        self.sinks, self.meter = Sinks({}), StepMeter(0)
        self.profiler = Profiler(cfg.metrics.profile, self.folder / "profile", self.world.rank, self.world.device)
        self.ended_early, self.place = False, "set-up"
        self._at_end: list[Callable[[], None]] = []
        self._claim = Claim(cfg, self.folder, self.mesh)
        logs = self.folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self._end_log = log.add_file(logs / f"rank_{self.world.rank}.log", self.world.rank)
        limits = {"timeout_s": timeout_s, "step_timeout_s": cfg.parallel.step_timeout_s}
        self.watch = Watch(self.mesh, logs, **limits, every_steps=cfg.metrics.ranks_every_steps)
        self._stop = Stop(cfg.train.time_limit_s)

    @property
    def stopped(self) -> bool:
        """True once all ranks have agreed to stop before the last step."""
        return bool(self._stop.reason)

    @property
    def restarted(self) -> bool:
        """True if a launcher started this attempt after another of the same run."""
        return self._claim.restarted

    def check_restart(self) -> None:
        """Raises NotRestarted if a launcher restarts what would end in the same way."""
        if self.restarted:
            history.check_restart(self._claim.earlier)

    def asked_to_stop(self) -> bool:
        """The same, after asking all ranks whether any was told to; a collective."""
        return self._stop.asked()

    def at_end(self, close: Callable[[], None]) -> None:
        """Has `close` called when the run ends while all ranks still work together."""
        self._at_end.append(close)

    def begin(self, spec: ModelSpec, parts: Parts, optimizer: Optimizer, *, num_steps: int, seq_len: int) -> None:
        """Opens the sinks, once the number of steps and the step to go on from are known."""
        self.parts, self.optimizer = parts, optimizer
        if self.world.rank == 0:
            history.go_on(self.goodput, self.folder, self.step, self._claim.earlier, resumes=self.cfg.checkpoint.resume != "none")
        self.meter = StepMeter(num_steps, tokens_total=self.tokens_total)
        self.sinks = build_sinks(self.cfg.metrics, self.folder, num_steps=num_steps, resumed_step=self.step)
        peak = self.cfg.metrics.peak_tflops or peak_tflops(self.world.device)
        flops = flops_per_token(spec, seq_len)
        self._mfu: Callable[[float], float | None] = lambda rate: mfu(rate, flops, self.world.size, peak)
        model = {"family": spec.family, "layers": spec.num_layers, "hidden_size": spec.hidden_size, "vocab_size": spec.vocab_size}
        model |= {"parameters": sum(math.prod(shape) for shape in weight_shapes(spec).values()), "seq_len": seq_len}
        self.record(model=model, num_steps=num_steps, resumed_step=self.step)
        limit = self.cfg.train.max_crashes
        if self.restarted:
            history.check_crash_loop(self._claim.earlier, limit, self.step)
        self.sinks.event("attempt", self.step, died_at=self._claim.earlier.last_step, ended_by=self._claim.earlier.ended_by)
        left = f"steps {self.step + 1} to {num_steps}" if self.step < num_steps else f"all {num_steps} steps are done"
        logger.info("%s on %s, %s", left, self.mesh.describe(), self.world.device.type)

    def record(self, **facts: Any) -> None:
        """Adds to run.json what a reader of this run should know, as JSON values."""
        self._claim.record(**facts)

    def steps(self, last: int) -> Iterator[int]:
        """The numbers of the steps still to make, each timed until `log`; ends early, `stopped`, on all ranks together."""
        gc_every = self.cfg.memory.gc_every_steps
        if gc_every:
            gc.disable()  # a collection on one rank in the middle of a step keeps all others waiting
        self.goodput.begin()
        while not self.asked_to_stop() and self.step < last and not self.ended_early:
            self.place = f"step {self.step + 1}"
            self.watch.before_step()
            self.meter.start()
            fire("step", step=self.step + 1)
            self.profiler.before(self.step + 1)
            yield self.step + 1
            self.step += 1
            self.profiler.after(self.step)
            if gc_every and self.step % gc_every == 0:
                gc.collect()
        self.place = "the end of the run"
        if self.stopped:
            self.sinks.event("stopped", self.step, reason=self._stop.reason)

    def end_early(self, step: int, reason: str) -> None:
        """Lets `steps` end after `step`; the run then finishes as after its last step. On all ranks alike."""
        self.ended_early = True
        self.sinks.event("ended early", step, reason=reason)
        logger.info("ending early after step %d: %s", step, reason)

    def log(self, step: int, stats: StepStats, lr: float) -> None:
        """Counts the step and, when due, writes its row. Raises NumericError after too many skipped steps in a row."""
        self.place = f"validation or checkpoint after step {step}"
        self.tokens_total += stats.num_tokens
        due = step % self.cfg.metrics.every_steps == 0
        loss = self.parts.reduce_metrics(stats.metrics)["loss"] if due else 0.0  # waits for the device
        timing = self.meter.stop(step, stats.num_tokens)
        self.goodput.add("data_wait", timing.data_wait_s)
        self.goodput.add("steps", timing.step_s - timing.data_wait_s)
        self._name_slow(step, self.watch.after_step(step, timing.alone_s, timing.step_s))
        if due:
            row = train_row(
                step=step,
                time=timing.time,
                loss=loss,
                lr=lr,
                grad_norm=stats.grad_norm,
                tokens=timing.tokens,
                tokens_total=timing.tokens_total,
                tokens_per_s=timing.tokens_per_s,
                mfu=self._mfu(timing.tokens_per_s),
                memory_gib=peak_gib(self.world.device),
                data_wait_s=timing.data_wait_s,
                **{f"comm/{axis}/{key}": value for axis, line in stats.traffic.items() for key, value in asdict(line).items()},
            )
            self.sinks.write(row, timing.eta_s)
        self._count_skip(step, stats)

    def log_validation(self, step: int, metrics: dict[str, dict[str, float]]) -> dict[str, float]:
        """Writes the row of a validation after `step` (0: before the first), metrics by source; they as named there, val/<name>/loss."""
        row = validation_row(step, time.time(), metrics)
        self.sinks.write(row)
        return {key: value for key, value in row.items() if key.startswith("val/")}

    def note_save(self, saved: Saved) -> None:
        """Books a checkpoint, or one that failed."""
        self.goodput.add("checkpoint", saved.blocked_s)
        facts = {"blocked_s": round(saved.blocked_s, 3), "total_s": round(saved.total_s, 3)}
        if saved.problem:
            self.sinks.event("checkpoint failed", saved.step, **facts, reason=saved.problem)
            return
        self.sinks.event("checkpoint", saved.step, **facts, bytes=saved.num_bytes, mb_per_s=round(saved.mb_per_s, 1))
        if self.world.rank == 0:
            try:
                history.note_checkpoint(self.goodput, self.folder, saved.step)
            except OSError as error:
                logger.warning("goodput.json could not be written, the run goes on: %s", error)

    def counters(self) -> dict[str, Any]:
        """This run's part of a checkpoint's state.json."""
        return {"tokens": self.tokens_total, "counters": {"skipped_steps": self.skipped_steps, "skipped_in_row": self._skipped_in_row}}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint's state.json."""
        self.step, self.tokens_total = state["step"], state["tokens"]
        self.skipped_steps, self._skipped_in_row = (state["counters"][key] for key in ("skipped_steps", "skipped_in_row"))
        logger.info("resumed at step %d, %d tokens", self.step, self.tokens_total)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """Tells what ended the run, closes sinks and profiler and gives the folder, the signals and the garbage collector back."""
        told = error
        try:
            if error is None or isinstance(error, NumericError):  # raised on all ranks
                for close in self._at_end:
                    close()
        except TorchftError as later:
            told = error or later
        if told is not None:
            told = explain(told, self.place, self.cfg, self._sizes_now())
            samples = {"samples": list(told.samples)} if isinstance(told, NumericError) else {}
            self.sinks.event("failed", self.step + 1, kind=type(told).__name__, reason=redact_text(str(told)), **samples)
        self._close(told)
        if told is not None and told is not error:
            raise told from error

    def _close(self, error: BaseException | None) -> None:
        self.watch.close()
        self.profiler.close()
        self.sinks.close()
        self._end_log()
        if self.cfg.memory.gc_every_steps:
            gc.enable()
        code = (STOPPED if self.stopped else 0) if error is None else exit_code_of(error)
        write_marker(self.folder, code, self.step, self._stop.reason if error is None else f"{type(error).__name__}: {error}")
        self._claim.release()
        self._stop.close()

    def _sizes_now(self) -> dict[str, float]:
        parts = getattr(self, "parts", None)
        sizes = component_sizes([p for _, p in parts.named_parameters()], self.optimizer) if parts else {}
        return sizes | {"peak": peak_gib(self.world.device)}

    def _name_slow(self, step: int, found: list[dict[str, Any]]) -> None:
        for fact in found:
            self.sinks.event("slow rank", step, **fact)
            if self.world.rank == 0:
                logger.warning("rank {rank} on {host} is slow: {seconds} s {what}, the median of all ranks is {median} s".format(**fact))

    def _count_skip(self, step: int, stats: StepStats) -> None:
        if stats.skipped:
            self.skipped_steps += 1
            self.sinks.event("skipped", step, reason=stats.skipped, samples=list(stats.samples))
        if not stats.skipped or stats.overflow:  # the loss scale has a limit of its own
            self._skipped_in_row = 0
            return
        self._skipped_in_row += 1
        limit = self.cfg.train.nonfinite.max_in_row
        if self._skipped_in_row >= limit:
            raise NumericError(
                f"{limit} skipped steps in a row\n  given:    {stats.skipped} at step {step}\n  expected: fewer than "
                f"train.nonfinite.max_in_row={limit}\n  fix:      look at the data and optim.lr; the last checkpoint is from before",
                stats.samples,
            )


def run_recipe(main: Callable[[list[str]], int]) -> None:
    """Runs a recipe's main(argv) -> exit code as a program: a user's error is printed without a traceback, and the process ends
    with its exit code (docs/config.md has the table)."""
    rank, local_rank = (int(dist.environment(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    together = False
    try:
        code = main(sys.argv[1:])
        together = True
    except TorchftError as error:
        whole = redact_text(f"{type(error).__name__}: {error}")  # in full once a host: a file may be missing on one of them alone
        print(whole if rank == 0 else f"[rank {rank}] {whole if local_rank == 0 else whole.splitlines()[0]}", file=sys.stderr)
        code = exit_code_of(error)
    except (KeyboardInterrupt, Exception) as error:
        if not isinstance(error, KeyboardInterrupt):
            print(redact_text(traceback.format_exc()), end="", file=sys.stderr)
        code = exit_code_of(error)
    report_exit(rank, code)
    dist.shutdown(code, together=together)
