"""`torchft completion bash|zsh`: a script that completes verbs, and names of recipes and configs where a verb takes them.

source <(torchft completion bash)          in ~/.bashrc; zsh the same, in ~/.zshrc after compinit
"""

import argparse

from torchft.cli.main import VERBS

NAMED = "run|validate|cat|cp|diff"  # verbs that take names of recipes and configs
BASH = """_torchft() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}"
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{verbs}" -- "$word"))
    else
        case "${{COMP_WORDS[1]}}" in
            {named}) COMPREPLY=($(compgen -W "$(torchft ls --names 2>/dev/null)" -- "$word")) ;;
        esac
    fi
}}
complete -o default -F _torchft torchft
"""
ZSH = """#compdef torchft
_torchft() {{
    if (( CURRENT == 2 )); then
        compadd -- {verbs}
    else
        case "$words[2]" in
            {named}) compadd -- ${{(f)"$(torchft ls --names 2>/dev/null)"}}; _files ;;
            *) _files ;;
        esac
    fi
}}
compdef _torchft torchft
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash", "zsh"])


def run(arguments: argparse.Namespace) -> int:
    """Prints the script."""
    print({"bash": BASH, "zsh": ZSH}[arguments.shell].format(verbs=" ".join(VERBS), named=NAMED), end="")
    return 0
