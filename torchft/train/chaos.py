"""Faults on purpose against a local run, and what they cost: `run_chaos` trains a config twice, undisturbed and disturbed, and compares.

    faults --armed by TORCHFT_FAULT--> attempt 1 --dies--> (damage a checkpoint) --> attempt 2 --> ... --> done --> Report

Each attempt is armed with the faults that have not fired; a log that faults write as they fire says which, and when. The faults, the steps
and the damaged bits come from the script or from the seed alone, so a report can be had again (its seconds apart).
"""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchft.checkpoint.folder import CheckpointFolder
from torchft.checkpoint.listing import differences, tensor_differences
from torchft.checkpoint.manifest import verify
from torchft.config.show import read_saved
from torchft.errors import ConfigError, Problem
from torchft.faults import LOG, VARIABLE
from torchft.metrics.rows import Row, read_rows
from torchft.train.chaos_faults import Fault, random_faults
from torchft.train.launch import Processes, command_line, launch

ENDS = ("kill", "stop", "corrupt", "nan", "fill")  # of these an attempt may die
NOTICED = {"fill": "checkpoint failed", "slow": "slow rank", "nan": "skipped"}  # events by which a run says that it has seen one
SPARE_ATTEMPTS = 2
LAST_WORDS = 40  # lines


@dataclass
class Fired:
    """What came of a fault."""

    fault: Fault
    at: float | None = None  # Unix seconds; None: it never fired
    steps_lost: int = 0
    detected_s: float | None = None  # until the run said so or ended
    recovered_s: float | None = None  # from there until a next step was done, or a next checkpoint saved
    note: str = ""


@dataclass
class Report:
    """The outcome, as docs/checkpoints.md tells it."""

    faults: list[Fired]
    attempts: list[int]  # exit codes
    wall_s: dict[str, float]  # undisturbed, disturbed
    goodput: dict[str, float | None]  # the runs' own ratio
    finished: bool = False
    equal: bool = False
    losses_equal: bool = False
    last_words: str = ""  # the end of the last attempt's log, if the run did not finish
    differing: dict[str, tuple[float, float]] = field(default_factory=dict)  # tensor -> max|b - a|, relative

    @property
    def steps_lost(self) -> int:
        return sum(one.steps_lost for one in self.faults)


def run_chaos(
    recipe: Path, argv: list[str], out: Path, *, processes: int = 1, faults: Sequence[Fault] = (), count: int = 0, seed: int = 0
) -> Report:
    """Both runs, in `out`, which must be new. argv: the recipe's --config and settings; `count` more faults are drawn from the seed."""
    if out.exists() and any(out.iterdir()):
        raise ConfigError(Problem("--out", str(out), "a new or an empty folder", "name another"))
    out.mkdir(parents=True, exist_ok=True)
    driver = _Driver(recipe, argv, out, processes, random.Random(seed))
    calm, calm_s = driver.undisturbed()
    num_steps, every_steps = _steps_of(calm)
    faults = [*faults, *random_faults(count, seed, num_steps=num_steps, every_steps=every_steps, ranks=processes)]
    wrong = [fault for fault in faults if fault.rank >= processes or not 1 <= fault.step <= num_steps]
    if wrong:
        expected = f"a step of 1 to {num_steps} and a rank below {processes}"
        raise ConfigError(Problem("--fault", wrong[0].armed, expected, "give another step or rank, or more processes (--nproc)"))
    fired = [Fired(fault) for fault in sorted(faults, key=lambda fault: fault.step)]
    start = time.monotonic()
    codes = driver.disturbed(fired)
    report = Report(fired, codes, {"undisturbed": calm_s, "disturbed": time.monotonic() - start}, {}, finished=codes[-1] == 0)
    stormy = out / "disturbed"
    _measure(stormy, fired)
    report.goodput = {run.name: _goodput(run) for run in (calm, stormy)}
    if report.finished:
        _compare(calm, stormy, report)
    else:
        report.last_words = _last_words(out / f"attempt_{len(codes)}.log")
    return report


class _Driver:
    """Starts the attempts."""

    def __init__(self, recipe: Path, argv: list[str], out: Path, processes: int, draw: random.Random):
        self.recipe, self.argv, self.out, self.processes, self.draw = recipe, argv, out, processes, draw
        self.log = out / "faults.log"

    def undisturbed(self) -> tuple[Path, float]:
        """Its folder and seconds. Raises ConfigError if not even that works."""
        run, start = self.out / "undisturbed", time.monotonic()
        if self._start(run, self.out / "undisturbed.log"):
            given = _last_words(self.out / "undisturbed.log")
            raise ConfigError(
                f"the undisturbed run fails already\n  given:    {given}\n  expected: exit code 0\n  fix:      run it by itself"
            )
        return run, time.monotonic() - start

    def disturbed(self, fired: list[Fired]) -> list[int]:
        """Attempts until one ends well or dies of no fault of ours; their exit codes."""
        run, codes = self.out / "disturbed", []
        for attempt in range(1, len(fired) + SPARE_ATTEMPTS + 1):
            waiting = [one for one in fired if one.at is None]
            arms = ",".join(dict.fromkeys(one.fault.armed for one in waiting))
            known = len(self._lines())
            code = self._start(run, self.out / f"attempt_{attempt}.log", **{VARIABLE: arms, LOG: str(self.log)})
            codes.append(code)
            ended = time.time()
            now = self._note(fired, self._lines()[known:])
            if code == 0:
                break
            deadly = [one for one in now if one.fault.kind in ENDS]
            if not deadly:
                break
            self._after_death(run, deadly[-1], ended)
        return codes

    def _start(self, run: Path, output: Path, **environment: str) -> int:
        mine = [f"output_dir={run}", "export.hf=false", "metrics.every_steps=1", "metrics.ranks_every_steps=1"]
        mine += ["checkpoint.resume=auto", "checkpoint.save_at_end=true"]
        command = command_line(self.recipe, [*self.argv, *mine], Processes(self.processes))
        return launch(command, self.processes, output=output, **environment)

    def _lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def _note(self, fired: list[Fired], lines: list[str]) -> list[Fired]:
        """Books when the faults of these lines fired."""
        found = []
        for line in lines:
            at, _, text = line.partition(" ")
            one = next((one for one in fired if one.at is None and one.fault.armed == text), None)
            if one:
                one.at = float(at)
                found.append(one)
        return found

    def _after_death(self, run: Path, one: Fired, ended: float) -> None:
        """What the attempt lost, and the damage if that was to come."""
        rows = [row for row in read_rows(run / "metrics.jsonl") if "loss" in row]
        folder = CheckpointFolder(run / "checkpoints")
        if one.fault.kind == "corrupt":
            one.note = self._damage(folder)
        good = [path for path in folder.list_steps() if not verify(path)]
        resumes_at = int(good[0].name.split("_")[1]) if good else 0
        one.steps_lost = max(0, (rows[-1]["step"] if rows else 0) - resumes_at)
        one.detected_s = round(ended - (one.at or ended), 2)

    def _damage(self, folder: CheckpointFolder) -> str:
        """Flips a bit of the newest checkpoint, or cuts a byte."""
        steps = folder.list_steps()
        if len(steps) < 2:
            return "no damage done: fewer than two checkpoints"
        path = self.draw.choice(sorted(path for path in steps[0].rglob("*") if path.is_file()))
        content = bytearray(path.read_bytes())
        if self.draw.random() < 0.25:
            path.write_bytes(content[:-1])
            return f"a byte cut from {path}"
        at = self.draw.randrange(len(content))
        content[at] ^= 1 << self.draw.randrange(8)
        path.write_bytes(content)
        return f"a bit flipped in {path}"


def _steps_of(run: Path) -> tuple[int, int]:
    """Steps of the run, and between its checkpoints. Raises ConfigError if it saves at its end alone."""
    rows = [row for row in read_rows(run / "metrics.jsonl") if "loss" in row]
    every = int((read_saved(run / "config.yaml").get("checkpoint") or {}).get("every_steps", 500))
    if not 0 < every < rows[-1]["step"]:
        fix = "set it so that the run saves several times; chaos has little to say otherwise"
        raise ConfigError(Problem("checkpoint.every_steps", str(every), f"less than the run's {rows[-1]['step']} steps, and not 0", fix))
    return rows[-1]["step"], every


def _measure(run: Path, fired: list[Fired]) -> None:
    """Fills in when each fault was noticed and when the run was past it."""
    rows = [row for row in read_rows(run / "metrics.jsonl") if "loss" in row]
    events = read_rows(run / "events.jsonl")
    for one in fired:
        if one.at is None:
            one.note = "never fired: the run did not come by"
            continue
        of_rank = [event for event in events if event.get("rank", one.fault.rank) == one.fault.rank]
        said = _first(of_rank, one.at, NOTICED.get(one.fault.kind, ""))
        if said is not None and one.detected_s is None:
            one.detected_s = round(said - one.at, 2)
        seen = one.at + (one.detected_s or 0.0)
        past = _first(events, seen, "checkpoint") if one.fault.kind == "fill" else next((r["time"] for r in rows if r["time"] > seen), None)
        one.recovered_s = None if past is None else round(past - seen, 2)
        if one.note.startswith("a b"):
            logs = "".join(path.read_text(errors="replace") for path in (run / "logs").glob("rank_*.log"))
            one.note += ", named" if one.note.rpartition(" ")[2] in logs else ", NOT NAMED"


def _last_words(log: Path) -> str:
    """What the recipe printed last; of torchrun's own account, if it got as far as starting a process, nothing."""
    lines = log.read_text(errors="replace").splitlines()
    at = next((i for i, line in enumerate(lines) if "failed (exitcode:" in line), len(lines))
    return "\n".join(lines[:at][-LAST_WORDS:] or lines[-LAST_WORDS:])


def _first(events: Sequence[Row], after: float, name: str) -> float | None:
    return next((event["time"] for event in events if event["event"] == name and event["time"] >= after), None)


def _goodput(run: Path) -> float | None:
    path = run / "summary.json"
    return (json.loads(path.read_text()).get("goodput") or {}).get("ratio") if path.is_file() else None


def _compare(calm: Path, stormy: Path, report: Report) -> None:
    """Is the end the same, to the bit: every file of model/ and optimizer/, and every step's loss."""
    ends = [CheckpointFolder(run / "checkpoints").list_steps()[0] for run in (calm, stormy)]
    changed = [key for key in differences(*ends) if key.startswith(("files.model/", "files.optimizer/", "step"))]
    losses = [[(row["step"], row["loss"]) for row in read_rows(run / "metrics.jsonl") if "loss" in row] for run in (calm, stormy)]
    report.losses_equal = losses[0] == losses[1]
    report.equal = not changed and report.losses_equal
    report.differing = tensor_differences(*ends) if changed else {}


def as_dict(report: Report) -> dict[str, Any]:
    """As JSON values."""
    rows = [{**vars(one), "fault": one.fault.armed, "kind": one.fault.kind} for one in report.faults]
    return {**vars(report), "faults": rows, "steps_lost": report.steps_lost}


def as_text(report: Report) -> str:
    """A row a fault, then the outcome."""
    table = [("fault", "step", "rank", "steps lost", "detected", "recovered", "")]
    for one in report.faults:
        f = one.fault
        seconds = ["-" if s is None else f"{s:.1f} s" for s in (one.detected_s, one.recovered_s)]
        table.append((f.kind + (f" ({f.point})" if f.point else ""), str(f.step), str(f.rank), str(one.steps_lost), *seconds, one.note))
    widths = [max(len(row[i]) for row in table) for i in range(6)]
    lines = ["  ".join([*(f"{cell:<{width}}" for cell, width in zip(row[:6], widths)), row[6]]) for row in table]
    calm, stormy = report.wall_s["undisturbed"], report.wall_s["disturbed"]
    ratios = ", ".join(f"{name} {'-' if ratio is None else f'{ratio:.1%}'}" for name, ratio in report.goodput.items())
    lines += [f"attempts    {len(report.attempts)}, exit codes {', '.join(map(str, report.attempts))}"]
    lines += [f"time        {calm:.1f} s undisturbed, {stormy:.1f} s disturbed; {report.steps_lost} steps made again"]
    lines += [f"goodput     {ratios} of the time in steps that count"]
    if not report.finished:
        lines += ["outcome     NOT RECOVERED: the last attempt died of none of these faults:", report.last_words]
    elif report.equal:
        lines += ["outcome     equal to the undisturbed run: every bit of model and optimizer, every loss"]
    else:
        worst = next(iter(report.differing.items()), None)
        what = f"{worst[0]} by {worst[1][1]:.1e} of its size" if worst else "the losses"
        lines += [f"outcome     NOT EQUAL to the undisturbed run: {len(report.differing)} tensors differ, most {what}"]
    return "\n".join(line.rstrip() for line in lines)
