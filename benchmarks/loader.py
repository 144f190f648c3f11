"""The data path in numbers: tokenising against the bare tokenizer, filling rows, reading the cache, memory over a large file.

    python benchmarks/loader.py --tokenizer FOLDER [--rows 20000] [--trl PYTHON] [--memory-gib 1] [--only NAME ...]

text       plain text -> cache, as a share of tokenizers' encode_batch over the same texts        to reach: 80%
builtin    chats, the chatml template -> cache, as a share of encode_batch over the renderings            50%
jinja      the same chats through the tokenizer's own Jinja template; --trl: also TRL's preparation, by that Python     2x TRL
fill       tokens / (rows x length) of packed rows, on lengths drawn from several distributions           0.99
reading    cached tokens -> batches, tokens a second in one thread                                         1M
memory     peak memory of building the cache of a jsonl file, and of one a quarter as large                flat

Each speed is the median of --repeats. FOLDER has tokenizer.json and tokenizer_config.json. Run it on a quiet machine.
"""

import argparse
import json
import logging
import multiprocessing
import os
import re
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from torchft.data.cache import CacheKey, Counts, TokenCache
from torchft.data.loader import DataConfig, Loader
from torchft.data.sources import SourceConfig
from torchft.data.templates import build_template
from torchft.data.text import TextConfig, TextDataConfig
from torchft.data.types import Message
from torchft.dist import World
from torchft.tokenizers.load import load_tokenizer
from torchft.train.data import Text, build_source

WORLD = World(0, 1, 0, 1, torch.device("cpu"))
WORDS = "the a of river green table Monday counts answers 12 apples quickly because under light seven paper returns why city".split()
TRL = """
import json, sys, time
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer
folder, rows = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=len(tokenizer))
model = LlamaForCausalLM(LlamaConfig(**sizes))
data = Dataset.from_list([json.loads(line) for line in open(rows)])
args = SFTConfig(output_dir="trl_out", max_length=2048, report_to=[], use_cpu=True, bf16=False)
start = time.perf_counter()
trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
seconds = time.perf_counter() - start
print("RESULT", sum(len(row) for row in trainer.train_dataset["input_ids"]) / seconds)
"""


def make_rows(path: Path, rows: int, *, chats: bool, seed: int = 0) -> None:
    """Chats of one to four turns, or documents of 20 to 400 words."""
    rng = np.random.default_rng(seed)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(low, high)).tolist())

    with open(path, "w", encoding="utf-8") as file:
        for _ in range(rows):
            if chats:
                turns = [{"role": role, "content": words(5, 80)} for _ in range(rng.integers(1, 4)) for role in ("user", "assistant")]
                record: dict = {"messages": [{"role": "system", "content": "You are kind."}, *turns]}
            else:
                record = {"text": words(20, 400)}
            file.write(json.dumps(record) + "\n")


def bare_run(folder: Path, texts: list[str]) -> Callable[[], int]:
    """The bare tokenizer, on all its threads."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda: sum(len(e.ids) for e in tokenizer.encode_batch(texts, add_special_tokens=False))


def our_run(source: SourceConfig | TextConfig, text: Text) -> Callable[[], int]:
    """Records on disk -> cache on disk."""

    def run() -> int:
        with tempfile.TemporaryDirectory() as folder:
            cfg = TextDataConfig(cache=folder) if text.template is None else DataConfig(cache=folder, seq_len=4096)
            return build_source(source, text, cfg, WORLD).counts.tokens

    return run


def compare(name: str, bare: Callable[[], int], ours: Callable[[], int], repeats: int) -> float:
    """Prints the bare tokenizer's speed and ours, medians; ours. They take turns, so that a noisy moment meets both."""
    rates: dict[Callable[[], int], list[float]] = {bare: [], ours: []}
    for run in (bare, ours) * repeats:
        start = time.perf_counter()
        tokens = run()
        rates[run].append(tokens / (time.perf_counter() - start))
    first, second = map(statistics.median, rates.values())
    print(f"{name}: bare tokenizer {first:,.0f} tokens/s, cache {second:,.0f} tokens/s, {second / first:.0%}")
    return second


def measure_text(args: argparse.Namespace, folder: Path) -> None:
    path = folder / "text.jsonl"
    make_rows(path, args.rows, chats=False)
    texts = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
    ours = our_run(TextConfig(path=str(path)), Text(load_tokenizer(args.tokenizer), None))
    compare("text", bare_run(args.tokenizer, texts), ours, args.repeats)


def measure_chats(args: argparse.Namespace, folder: Path, name: str) -> None:
    path, tokenizer = folder / "chats.jsonl", load_tokenizer(args.tokenizer)
    make_rows(path, args.rows, chats=True)
    template = build_template("chatml" if name == "builtin" else "auto", tokenizer)
    chats = [json.loads(line)["messages"] for line in path.open(encoding="utf-8")]
    texts = [template.render([Message(m["role"], m["content"]) for m in chat]) for chat in chats]
    ours = compare(name, bare_run(args.tokenizer, texts), our_run(SourceConfig(path=str(path)), Text(tokenizer, template)), args.repeats)
    if args.trl and name == "jinja":
        command = [str(args.trl), "-c", TRL, str(args.tokenizer.resolve()), str(path)]
        out = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
        trl = float(out.split("RESULT")[1])
        print(f"jinja: TRL {trl:,.0f} tokens/s, ours / TRL {ours / trl:.1f}")


def cache_of(lengths: np.ndarray) -> TokenCache:
    """Samples of these lengths, in memory."""
    n, total = len(lengths), int(lengths.sum())
    key = CacheKey("s", "f", "t", "p", 0, "none")
    ids, weights = np.arange(total, dtype=np.int32), np.ones(total, np.uint8)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return TokenCache("drawn", "h", key, Counts(n, n, tokens=total), ids, weights, offsets, np.arange(n))


def drawn_lengths(rng: np.random.Generator) -> dict[str, np.ndarray]:
    drawn = {"lognormal": rng.lognormal(5.5, 1, 40960), "zipf": rng.zipf(1.3, 40960) * 20, "geometric": rng.geometric(1 / 300, 40960)}
    return {name: np.clip(x.astype(np.int64), 2, 2048) for name, x in drawn.items()}


def measure_reading(args: argparse.Namespace) -> None:
    """One thread, no prefetching: fill and speed."""
    for name, lengths in drawn_lengths(np.random.default_rng(0)).items():
        loader = Loader([cache_of(lengths)], seq_len=2048, micro_batch_size=4, global_batch_size=16)
        start, tokens, size = time.perf_counter(), 0, 0
        for _ in range(loader.steps_per_epoch(0) - 1):
            for batch in loader.next_step():
                tokens, size = tokens + batch.num_tokens, size + batch.tokens.numel()
        seconds = time.perf_counter() - start
        print(f"fill, reading: {name} lengths, {tokens / size:.4f} full, {tokens / seconds:,.0f} tokens/s, planning included")


def measure_memory(args: argparse.Namespace, folder: Path) -> None:
    """Each size in a process of its own."""
    context = multiprocessing.get_context("spawn")
    for gib in (args.memory_gib / 4, args.memory_gib):
        path = folder / f"{gib}.jsonl"
        make_rows(path, 2000, chats=False)
        block, size = path.read_bytes(), 0
        with open(path, "wb") as file:
            while size < gib * 2**30:
                size += file.write(block)
        with context.Pool(1) as pool:
            before, after, tokens = pool.apply(_peak, (args.tokenizer, path, folder / f"cache{gib}"))
        path.unlink()
        print(f"memory: {size / 2**30:.2f} GiB of jsonl, {tokens:,} tokens: peak {after:.2f} GiB, {before:.2f} GiB before")


def _peak(tokenizer: Path, path: Path, cache: Path) -> tuple[float, float, int]:
    """Peak memory before and after building, in GiB."""
    text = Text(load_tokenizer(tokenizer), None)
    before = _high_water()
    made = build_source(TextConfig(path=str(path)), text, TextDataConfig(cache=str(cache)), WORLD)
    return before, _high_water(), made.counts.tokens


def _high_water() -> float:
    """This program's peak memory in GiB: on Linux from /proc, since getrusage counts what the parent had before exec."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 2**20  # type: ignore[index]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trl", type=Path, help="a Python that has TRL")
    parser.add_argument("--memory-gib", type=float, default=1.0)
    names = ["text", "builtin", "jinja", "reading", "memory"]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    logging.getLogger("torchft").setLevel(logging.ERROR)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {args.rows} rows, {args.tokenizer.name}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        measures: dict[str, Callable[[], None]] = {
            "text": lambda: measure_text(args, folder),
            "builtin": lambda: measure_chats(args, folder, "builtin"),
            "jinja": lambda: measure_chats(args, folder, "jinja"),
            "reading": lambda: measure_reading(args),
            "memory": lambda: measure_memory(args, folder),
        }
        for name in args.only:
            measures[name]()


if __name__ == "__main__":
    main()
