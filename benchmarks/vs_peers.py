"""torchft beside other libraries: tokens per second and peak memory of fine-tuning, on the same model, data and machine.

    python benchmarks/vs_peers.py [--only ours,bare,trainer] [--modes eager,compiled,chat,lora] [--dtypes bf16,fp32] [--rounds 3] [--write]

Every run is a process of its own; the libraries take turns, round after round, so that a busy machine slows all of them. ours is
the recipe as users start it; bare is a plain PyTorch loop, the speed of light. The losses of all are compared with ours:
what trains something else has no place in the table. Environments, model and data are made on first use, in --cache.
"""

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

from peers.cases import PEERS, Prepared, prepare, start_of
from peers.measure import Case, Measured, run_case
from peers.table import HOW, hardware, sections, tokens_per_s

from torchft import __version__
from torchft.dist import environment
from torchft.errors import TorchftError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODES, DTYPES = ("eager", "compiled", "chat", "lora"), ("bf16", "fp32")
CACHE = Path(environment("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchft"
SMOLLM2 = CACHE / f"SmolLM2-135M-Instruct-{__version__}"


def main(argv: list[str] | None = None) -> int:
    """Runs, prints and, if asked to, writes; 1 if any run failed."""
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run at hand is ended as well
    try:
        prepared = prepare(args.only, args.cache, model_folder(args.model), args.steps)
    except TorchftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    cases = [Case(peer, mode, dtype) for dtype in args.dtypes for mode in args.modes for peer in args.only if mode in PEERS[peer].modes]
    done = args.cache / "measured.jsonl"
    if not args.add:
        done.unlink(missing_ok=True)
    elif not done.exists() and (RESULTS / "vs_peers.json").is_file():  # the cache is gone: what was written is all there is
        runs = json.loads((RESULTS / "vs_peers.json").read_text(encoding="utf-8"))["runs"]
        done.write_text("".join(json.dumps(run) + "\n" for run in runs), encoding="utf-8")
    failed = sum(not run_one(case, prepared, args, done) for _ in range(args.rounds) for case in cases)
    measured = [Measured.from_json(json.loads(line)) for line in done.read_text(encoding="utf-8").splitlines()] if done.exists() else []
    text = sections(measured, args.warmup)
    print(f"\n{text}")
    if args.write:
        write(text, measured, args)
    return int(failed > 0)


def run_one(case: Case, prepared: Prepared, args: argparse.Namespace, done: Path) -> bool:
    """Runs, shows and keeps one case; False, and its output shown, if it failed."""
    try:
        one = run_case(case, start_of(case, prepared, threads=args.threads), warmup=args.warmup)
        one.commit = commit()
    except RuntimeError as error:
        print(error, file=sys.stderr, flush=True)
        return False
    with done.open("a", encoding="utf-8") as file:  # at once: a call that is cut off loses only the run at hand
        file.write(json.dumps(one.to_json()) + "\n")
    print(
        f"{case.dtype} {case.mode:9} {case.peer:12} {tokens_per_s(one, args.warmup):7.1f} tokens/s  peak {one.peak_mib / 1024:.2f} GiB  "
        f"first step {one.first_step_s:.1f} s  load {one.load:.1f}",
        flush=True,
    )
    return True


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def names(known):
        def read(text: str) -> list[str]:
            given = text.split(",")
            if unknown := [name for name in given if name not in known]:
                raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected some of {', '.join(known)}")
            return given

        return read

    parser.add_argument("--only", type=names(PEERS), default=list(PEERS), help=f"who takes part: {', '.join(PEERS)} (default: all)")
    parser.add_argument("--modes", type=names(MODES), default=list(MODES), help=f"{', '.join(MODES)} (default: all)")
    parser.add_argument("--dtypes", type=names(DTYPES), default=list(DTYPES), help=f"{', '.join(DTYPES)} (default: both)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="steps of a run, warm-up included (default: 8)")
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not timed (default: 2)")
    parser.add_argument("--threads", type=int, default=2, help="threads of a run, over all its processes (default: 2)")
    parser.add_argument("--model", type=Path, help="HF folder of a llama model (default: SmolLM2-135M-Instruct of the quickstart)")
    parser.add_argument("--cache", type=Path, default=CACHE / "vs_peers", help="environments, data and runs (default: %(default)s)")
    parser.add_argument(
        "--add",
        action="store_true",
        help="keep what earlier calls measured, or what was written; with --rounds 0 only the table is made again",
    )
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/vs_peers.md and .json")
    args = parser.parse_args(argv)
    if not 1 <= args.warmup <= args.steps - 2:
        parser.error(f"--warmup {args.warmup}: expected from 1 to --steps - 2 = {args.steps - 2}")
    args.cache = args.cache.resolve()
    return args


def model_folder(given: Path | None) -> Path:
    """The model's folder; SmolLM2 is fetched and converted by the quickstart."""
    if given:
        return given.resolve()
    if not (SMOLLM2 / "config.json").is_file():
        subprocess.run([sys.executable, str(ROOT / "scripts" / "quickstart.py"), "--fetch"], check=True)
    return SMOLLM2


def commit() -> str:
    """What is checked out."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()


def write(text: str, measured: list[Measured], args: argparse.Namespace) -> None:
    """The table and all that was measured."""
    versions = {name: number for one in measured for name, number in one.versions.items()}
    facts = {**hardware(), "versions": ", ".join(f"{name} {number}" for name, number in sorted(versions.items()))}
    facts["command"] = "`python benchmarks/vs_peers.py " + f"--steps {args.steps} --warmup {args.warmup} --threads {args.threads}`"
    head = "# torchft beside other libraries\n\n" + "".join(f"- {name}: {value}\n" for name, value in facts.items())
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "vs_peers.md").write_text(f"{head}\n{HOW}\n{text}", encoding="utf-8")
    content = {"facts": facts, "runs": [one.to_json() for one in measured]}
    (RESULTS / "vs_peers.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
