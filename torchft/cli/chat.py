"""`torchft chat DIR`: talk to a model; replies come as they are made (torchft/generate/chat.py). Reads lines from a pipe as well."""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", help="a HF folder, a run folder or a checkpoint")
    parser.add_argument("--system", default="", metavar="TEXT", help="the system message")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token (default 0.7)")
    parser.add_argument("--top-p", type=float, default=0.95, help="draw from the likeliest tokens of this probability (default 0.95)")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens")
    parser.add_argument("--min-p", type=float, default=0.0, help="draw from tokens this share as likely as the likeliest")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: fewer repetitions")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="longest reply (default 1024)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a reply; may be given again")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument("--template", default="auto", help="auto: the model's own; or a name, such as chatml")
    parser.add_argument("--thinking", default="mixed", choices=("mixed", "always", "never"), help="mixed: as the template has it")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 on CUDA, fp32 elsewhere")


def run(arguments: argparse.Namespace) -> int:
    """Opens the model and converses until the end of input."""
    from dataclasses import fields

    from torchft import log
    from torchft.dist import init_world
    from torchft.errors import ConfigError
    from torchft.generate.chat import HELP, Chat, converse
    from torchft.generate.model import open_model
    from torchft.generate.sampling import SamplingConfig

    log.setup()
    given = {f.name: getattr(arguments, f.name) for f in fields(SamplingConfig) if hasattr(arguments, f.name)}
    cfg = SamplingConfig(**given)
    if problems := list(cfg.check()):
        raise ConfigError(problems)
    device = init_world(arguments.device).device
    model = open_model(
        arguments.dir, device=device, precision=arguments.precision, template=arguments.template, thinking=arguments.thinking
    )
    chat = Chat(model, cfg)
    if arguments.system:
        chat.set_system(arguments.system)
    if sys.stdin.isatty():
        print(HELP)
    converse(chat, _read_line, sys.stdout)
    return 0


def _read_line() -> str | None:
    """The next line, with a prompt on a terminal; None at the end of input."""
    try:
        return input("> ") if sys.stdin.isatty() else (sys.stdin.readline() or None)
    except EOFError:
        return None
    except KeyboardInterrupt:  # Ctrl-C between replies clears the line
        print()
        return ""
