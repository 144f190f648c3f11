"""The command `torchft`: a table of verbs, one module each, imported only when called, so that `--help` needs no torch.

Training is not a verb: recipes are started with torchrun (README). A verb's module has `add_arguments(parser)` and
`run(arguments) -> exit code`.
"""

import argparse
import importlib
import sys

from torchft import __version__
from torchft.errors import TorchftError

# verb -> its module, one line of help
VERBS = {
    "doctor": ("torchft.cli.doctor", "check this installation: versions, devices, clashes, disk"),
    "compare": ("torchft.cli.compare", "several runs side by side: final numbers, differing settings, curves"),
    "export": ("torchft.cli.export", "a step of a run as a HF folder, or as GGUF with an Ollama Modelfile"),
    "report": ("torchft.cli.report", "write a run's report.html: curves, config, data, checkpoints, warnings"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns the exit code (a user's error: printed without traceback)."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="torchft", description="Pretrain, fine-tune and align language models in native PyTorch.")
    parser.add_argument("--version", action="version", version=f"torchft-llm {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, (module, text) in VERBS.items():
        verb_parser = verbs.add_parser(verb, help=text, description=text)
        if verb in argv:
            importlib.import_module(module).add_arguments(verb_parser)
    arguments = parser.parse_args(argv)
    try:
        return importlib.import_module(VERBS[arguments.verb][0]).run(arguments)
    except TorchftError as e:
        print(e, file=sys.stderr)
        return e.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
