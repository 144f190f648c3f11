"""The command `torchft`: a table of verbs, one module each, imported only when called, so that `--help` needs no torch.

A verb's module has `add_arguments(parser)` and `run(arguments) -> exit code`, and nothing but the reading of its arguments: what it does
stands in the library. A verb that takes `key=value` has them in `arguments.overrides`.
"""

import argparse
import importlib
import sys

from torchft import __version__
from torchft.errors import TorchftError

# verb -> its module, one line of help
VERBS = {
    "run": ("torchft.cli.run", "check a recipe's config, then start it on one or many processes"),
    "validate": ("torchft.cli.validate", "check a config, its model and its data without starting"),
    "data": ("torchft.cli.data", "show, count or prepare the data of a config"),
    "ls": ("torchft.cli.ls", "list the recipes and configs that ship"),
    "cat": ("torchft.cli.cat", "print a recipe or a config"),
    "cp": ("torchft.cli.cp", "copy a recipe or a config, to change it"),
    "diff": ("torchft.cli.diff", "the keys in which two configs or run folders differ"),
    "report": ("torchft.cli.report", "write a run's report.html: curves, config, data, checkpoints, warnings"),
    "compare": ("torchft.cli.compare", "several runs side by side: final numbers, differing settings, curves"),
    "ckpt": ("torchft.cli.ckpt", "list, show, verify, compare, prune or keep a run's checkpoints"),
    "chaos": ("torchft.cli.chaos", "train under faults, scripted or random, and report what they cost"),
    "chat": ("torchft.cli.chat", "talk to a model in the terminal"),
    "generate": ("torchft.cli.generate", "continue the prompts of a file"),
    "convert": ("torchft.cli.convert", "write a model as a complete HF folder"),
    "merge": ("torchft.cli.merge", "add a LoRA adapter into its base model's weights, as a HF folder"),
    "export": ("torchft.cli.export", "a step of a run as a HF folder, or as GGUF with an Ollama Modelfile"),
    "download": ("torchft.cli.download", "fetch a model from the Hugging Face hub"),
    "push": ("torchft.cli.push", "publish an exported folder on the Hugging Face hub"),
    "schedule": ("torchft.cli.schedule", "draw a pipeline schedule, with the share of time its ranks wait"),
    "doctor": ("torchft.cli.doctor", "check this installation: versions, devices, clashes, disk"),
    "completion": ("torchft.cli.completion", "print completion for a shell: bash or zsh"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns the exit code (a user's error: printed without traceback)."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="torchft", description="Pretrain, fine-tune and align language models in native PyTorch.")
    parser.add_argument("--version", action="version", version=f"torchft-llm {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    called = next((word for word in argv if not word.startswith("-")), "")
    for verb, (module, text) in VERBS.items():
        verb_parser = verbs.add_parser(verb, help=text, description=text)
        if verb == called:
            importlib.import_module(module).add_arguments(verb_parser)
    arguments, rest = parser.parse_known_args(argv)
    _take_overrides(arguments, rest, verbs.choices[arguments.verb])
    try:
        return importlib.import_module(VERBS[arguments.verb][0]).run(arguments)
    except TorchftError as e:
        print(e, file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `torchft cat NAME | head`
        sys.stderr.close()
        return 0


def _take_overrides(arguments: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> None:
    """argparse does not find positional arguments on both sides of an option: `key=value` after one are in `rest`."""
    if not hasattr(arguments, "overrides"):
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return
    arguments.overrides = [*arguments.overrides, *rest]
    if wrong := [word for word in arguments.overrides if word.startswith("-") or "=" not in word]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)} (settings are written key=value)")


if __name__ == "__main__":
    raise SystemExit(main())
