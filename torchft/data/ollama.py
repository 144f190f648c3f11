"""An Ollama Modelfile for an exported GGUF: `modelfile(name, template)`, only if Ollama's prompt would be ours, character by character.

    Jinja chat template --probe chats--> chatml | llama3 | gemma, with or without a default system message --> TEMPLATE, Go's text/template

Ollama renders prompts with Go templates, so the model's Jinja can't travel. What is written here was compared on probe chats with what
the Jinja gives; any difference is a DataError. Contents are taken as they are: a Jinja that trims white space around them shows no
difference on the probes. Where Gemma's refuses a system message, Ollama's puts it before the user's text, as later Gemmas do.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torchft.data.templates import Template
from torchft.data.types import Message
from torchft.errors import DataError
from torchft.tokenizers.protocol import Tokenizer


@dataclass(frozen=True)
class Shape:
    """A family of templates: header with the role, content, end of turn; the prompt ends with the assistant's header.

    reply: the assistant's name in the header. folds: a system message has no turn but stands at the beginning of the next one (Gemma).
    """

    before: str
    after: str
    end: str  # of a turn: what Ollama stops at
    newline: str  # between turns
    reply: str = "assistant"
    folds: bool = False

    def header(self, role: str) -> str:
        return self.before + (self.reply if role == "assistant" else role) + self.after

    def prompt(self, messages: Sequence[Message]) -> str:
        turns, lead = "", ""
        for m in messages:
            if self.folds and m.role == "system":
                lead = m.content + "\n\n"
                continue
            turns, lead = f"{turns}{self.header(m.role)}{lead}{m.content}{self.end}{self.newline}", ""
        return turns + self.header("assistant")

    def go(self, start: str) -> str:
        """The same in Go's text/template."""
        role = "{{ .Role }}" if self.reply == "assistant" else GO_ROLE.replace("REPLY", self.reply)
        turn = f"{self.before}{role}{self.after}{GO_LEAD if self.folds else ''}{{{{ .Content }}}}{self.end}{self.newline}"
        if self.folds:
            start, turn = GO_NO_LEAD + start, GO_FOLD.replace("TURN", turn)
        return f"{start}{{{{ range .Messages }}}}{turn}{{{{ end }}}}{self.header('assistant')}"


GO_ROLE = '{{ if eq .Role "assistant" }}REPLY{{ else }}{{ .Role }}{{ end }}'
GO_NO_LEAD = '{{ $lead := "" }}'
GO_LEAD = '{{ if $lead }}{{ $lead }}\n\n{{ $lead = "" }}{{ end }}'
GO_FOLD = '{{ if eq .Role "system" }}{{ $lead = .Content }}{{ else }}TURN{{ end }}'
SHAPES = {
    "chatml": Shape("<|im_start|>", "\n", "<|im_end|>", "\n"),
    "llama3": Shape("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", ""),
    "gemma": Shape("<start_of_turn>", "\n", "<end_of_turn>", "\n", reply="model", folds=True),
}
USER, REPLY, SYSTEM = Message("user", "Question {{ x }}?"), Message("assistant", "Answer."), Message("system", "Be brief.")
PROBES = ([USER], [USER, REPLY, USER], [SYSTEM, USER], [SYSTEM, USER, REPLY, USER])


def modelfile(gguf_name: str, template: Template, tokenizer: Tokenizer) -> str:
    """The Modelfile's text. Raises DataError if no Go template is known that gives the same prompts."""
    shape, start, system = _match(template, tokenizer)
    lines = [f"FROM ./{gguf_name}", f'TEMPLATE """{shape.go(start)}"""']
    lines += [f'SYSTEM """{system}"""'] if system else []
    return "\n".join([*lines, f'PARAMETER stop "{shape.end}"', ""])


def _match(template: Template, tokenizer: Tokenizer) -> tuple[Shape, str, str]:
    """The shape, what stands before the first turn, and the default system message ("": none)."""
    bos = tokenizer.named_tokens.get("bos_token", "")
    prompts = {i: prompt for i, chat in enumerate(PROBES) if (prompt := _render(template, chat)) is not None}
    if 0 not in prompts or 1 not in prompts:
        raise _refusal(template, "it refuses a plain chat")
    for shape in SHAPES.values():
        start = bos if bos and prompts[1].startswith(bos) and not shape.before.startswith(bos) else ""
        rest = {i: prompt.removeprefix(start) for i, prompt in prompts.items()}
        system = _default_system(shape, rest[0])
        chats = [[Message("system", system), *chat] if system and chat[0].role != "system" else chat for chat in PROBES]
        if any(rest[i] != shape.prompt(chats[i]) for i in rest) or '"""' in system:
            continue
        if len(rest) < len(PROBES) and not shape.folds:
            raise _refusal(template, "it refuses a system message, which Ollama may send")
        if tokenizer.adds_bos and not start:
            raise _refusal(template, "the tokenizer puts BOS before every text, but the template has none: llama.cpp would add one")
        return shape, "" if tokenizer.adds_bos else start, system
    raise _refusal(template, "its prompts are none of " + ", ".join(SHAPES))


def _render(template: Template, chat: Sequence[Message]) -> str | None:
    """The prompt; None if the template refuses the chat, as Gemma 2's does with a system message."""
    try:
        return template.render(chat, add_generation_prompt=True)
    except DataError:
        return None


def _default_system(shape: Shape, prompt: str) -> str:
    """What the template says as system where the chat says nothing."""
    lead = prompt.removesuffix(shape.prompt([USER]))
    found = re.fullmatch(f"{re.escape(shape.header('system'))}(.*){re.escape(shape.end + shape.newline)}", lead, re.DOTALL)
    return found[1] if found else ""


def _refusal(template: Template, why: str) -> DataError:
    fix = "use the GGUF with a tool that renders the Jinja template in it (llama.cpp --jinja), or write a TEMPLATE by hand"
    return DataError(f"no Ollama Modelfile for the chat template {template.name!r}\n  given:    {why}\n  fix:      {fix}")
