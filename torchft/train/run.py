"""A run: its processes and mesh, its folder, what it says, and how it stops. `with Run(cfg) as run:` holds a recipe's body.

    output_dir/{config.yaml, run.json, lock, metrics.jsonl, events.jsonl, summary.json, report.html, logs/, plots/, checkpoints/, export/}

The loop stands in the recipe; `steps` counts and times it and ends it early, on all ranks at the same step, when any rank was asked
to stop (SIGTERM, Ctrl-C).
"""

import gc
import hashlib
import json
import math
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from torchft import __version__, dist, log
from torchft.checkpoint.hf import weight_shapes
from torchft.config.changes import changed_from_defaults
from torchft.config.show import config_dict, save_config
from torchft.errors import ConfigError, NumericError, TorchftError
from torchft.faults import fire
from torchft.metrics.flops import flops_per_token, mfu, peak_tflops
from torchft.metrics.memory import peak_gib
from torchft.metrics.meters import StepMeter
from torchft.metrics.profile import Profiler
from torchft.metrics.rows import train_row, validation_row, write_whole
from torchft.metrics.sinks import Sinks, build_sinks
from torchft.models.spec import ModelSpec
from torchft.parallel.mesh import build_mesh, resolve_degrees
from torchft.parallel.parts import Parts
from torchft.train.lock import Lock
from torchft.train.step import StepStats

logger = log.get_logger(__name__)


@dataclass
class DebugConfig:
    deterministic: bool = False  # only algorithms that give the same bits every time (CUDA); slower, and an error where there is none
    ledger: bool = False  # log each axis's collectives, bytes and seconds (rank 0's); waits for each of them, so steps are slower


STOPPED = 75  # exit code: asked to stop, and saved
EXIT_CODES = "TORCHFT_EXIT_CODES"  # environment: the file for exit codes of a process that `torchft run` started


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
        self.started = time.monotonic()
        self.step, self.tokens_total, self.skipped_steps, self._skipped_in_row = 0, 0, 0, 0
        self.sinks, self.meter = Sinks({}), StepMeter(0)
        self.profiler = Profiler(cfg.metrics.profile, self.folder / "profile", self.world.rank, self.world.device)
        self._stop_asked, self.stopped, self.ended_early = False, False, False
        self._handlers: dict[int, Any] = {}
        self._lock: Lock | None = None
        self._claim_folder()
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        self._end_log = log.add_file(self.folder / "logs" / f"rank_{self.world.rank}.log", self.world.rank)

    def begin(self, spec: ModelSpec, parts: Parts, *, num_steps: int, seq_len: int) -> None:
        """Opens the sinks, once the number of steps and the step to go on from are known."""
        self.parts = parts
        self.meter = StepMeter(num_steps, tokens_total=self.tokens_total)
        self.sinks = build_sinks(self.cfg.metrics, self.folder, num_steps=num_steps, resumed_step=self.step)
        peak = self.cfg.metrics.peak_tflops or peak_tflops(self.world.device)
        flops = flops_per_token(spec, seq_len)
        self._mfu: Callable[[float], float | None] = lambda rate: mfu(rate, flops, self.world.size, peak)
        model = {"family": spec.family, "layers": spec.num_layers, "hidden_size": spec.hidden_size, "vocab_size": spec.vocab_size}
        model |= {"parameters": sum(math.prod(shape) for shape in weight_shapes(spec).values()), "seq_len": seq_len}
        self.record(model=model, num_steps=num_steps, resumed_step=self.step)
        left = f"steps {self.step + 1} to {num_steps}" if self.step < num_steps else f"all {num_steps} steps are done"
        logger.info("%s on %s, %s", left, self.mesh.describe(), self.world.device.type)

    def record(self, **facts: Any) -> None:
        """Adds to run.json what a reader of this run should know, as JSON values. A full disk is a warning only."""
        if self.world.rank != 0:
            return
        self._facts |= facts
        try:
            write_whole(self.folder / "run.json", json.dumps(self._facts, indent=2, default=str) + "\n")
        except OSError as error:
            logger.warning("run.json could not be written, the run goes on: %s", error)

    def steps(self, last: int) -> Iterator[int]:
        """The numbers of the steps still to make, each timed until `log`; ends early, `stopped`, on all ranks together.

        From here to the run's end SIGTERM and Ctrl-C are held until the work at hand is saved; before, they end the process at once.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._ask_to_stop)
        gc_every = self.cfg.memory.gc_every_steps
        if gc_every:
            gc.disable()  # a collection on one rank in the middle of a step keeps all others waiting
        while self.step < last and not self.stopped and not self.ended_early:
            self.meter.start()
            fire("step", step=self.step + 1)
            self.profiler.before(self.step + 1)
            yield self.step + 1
            self.step += 1
            self.profiler.after(self.step)
            if gc_every and self.step % gc_every == 0:
                gc.collect()
            self.stopped = bool(dist.agree(self._stop_asked))
        if self.stopped:
            self.sinks.event("stopped", self.step, reason="signal")

    def end_early(self, step: int, reason: str) -> None:
        """Lets `steps` end after `step`; the run then finishes as after its last step. On all ranks alike."""
        self.ended_early = True
        self.sinks.event("ended early", step, reason=reason)
        logger.info("ending early after step %d: %s", step, reason)

    def log(self, step: int, stats: StepStats, lr: float) -> None:
        """Counts the step and, when due, writes its row. Raises NumericError after too many skipped steps in a row."""
        self.tokens_total += stats.num_tokens
        due = step % self.cfg.metrics.every_steps == 0
        loss = self.parts.reduce_metrics(stats.metrics)["loss"] if due else 0.0  # waits for the device
        timing = self.meter.stop(step, stats.num_tokens)
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
        """Closes sinks and profiler and gives the folder, the signals and the garbage collector back, whatever happened."""
        if isinstance(error, TorchftError):
            self.sinks.event("failed", self.step + 1, reason=str(error))
        self.profiler.close()
        self.sinks.close()
        self._end_log()
        if self.cfg.memory.gc_every_steps:
            gc.enable()
        if self._lock:
            self._lock.release()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _count_skip(self, step: int, stats: StepStats) -> None:
        if stats.skipped:
            self.skipped_steps += 1
            self.sinks.event("skipped", step, reason=stats.skipped)
        if not stats.skipped or stats.overflow:  # the loss scale has a limit of its own
            self._skipped_in_row = 0
            return
        self._skipped_in_row += 1
        limit = self.cfg.train.nonfinite.max_in_row
        if self._skipped_in_row >= limit:
            raise NumericError(
                f"{limit} skipped steps in a row\n  given:    {stats.skipped} at step {step}\n  expected: fewer than "
                f"train.nonfinite.max_in_row={limit}\n  fix:      look at the data and optim.lr; the last checkpoint is from before"
            )

    def _claim_folder(self) -> None:
        """Rank 0 locks the folder and writes what the run is; all ranks learn whether that went well."""
        problem = None
        if self.world.rank == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock = Lock(self.folder / "lock")
                save_config(self.cfg, self.folder / "config.yaml")
                facts = {"versions": {"torchft": __version__, "torch": torch.__version__, "python": sys.version.split()[0]}}
                facts |= {"mesh": self.mesh.degrees, "device": self.world.device.type, "command": sys.argv, "started": time.time()}
                facts |= {"hardware": _hardware(self.world.device), "host": platform.node(), "changed": changed_from_defaults(self.cfg)}
                write_whole(self.folder / "run.json", json.dumps(facts, indent=2, default=str) + "\n")
                self._facts = facts
            except (OSError, TorchftError) as error:
                problem = (
                    str(error)
                    if isinstance(error, TorchftError)
                    else f"{error}\n  expected: a folder to write in\n  fix:      set output_dir to another"
                )
        problem = dist.broadcast_object(problem)
        if problem:
            if self._lock:
                self._lock.release()
            raise ConfigError(f"output_dir={self.cfg.output_dir} can't be used\n  given:    {problem}")

    def _ask_to_stop(self, number: int, frame: object) -> None:
        if self._stop_asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._stop_asked = True
        logger.warning("%s: stopping as soon as this step is saved", signal.Signals(number).name)


def _hardware(device: torch.device) -> str:
    """The kind of device a run is on, in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads a process, {platform.system()}"


def run_recipe(main: Callable[[list[str]], int]) -> None:
    """Runs a recipe's main(argv) -> exit code as a program: a user's error is printed without a traceback, and the process ends
    with its exit code (docs/config.md has the table)."""
    rank, local_rank = (int(dist.environment(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    together = False
    try:
        code = main(sys.argv[1:])
        together = True
    except TorchftError as error:
        whole = f"{type(error).__name__}: {error}"  # in full once a host: a file may be missing on one of them alone
        print(whole if rank == 0 else f"[rank {rank}] {whole if local_rank == 0 else whole.splitlines()[0]}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    _report_exit(rank, code)
    dist.shutdown(code, together=together)


def _report_exit(rank: int, code: int) -> None:
    """Tells `torchft run`, if it started this process: torchrun passes no worker's code on (train/launch.py)."""
    path = dist.environment(EXIT_CODES)
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{rank} {code}\n")
