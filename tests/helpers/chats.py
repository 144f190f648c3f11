"""Chats that show what a template does with each kind of message, and a stand-in tokenizer for each named template."""

from pathlib import Path

from tests.helpers.tokenizers import make_hf_tokenizer
from torchft.data.named_templates import TEMPLATES
from torchft.data.types import Message, ToolCall

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The "weather" of a city.',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Which."}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now", "description": "The time.", "parameters": {"type": "object", "properties": {}}}}
EOS = {"gpt_oss": "<|return|>", "llama3": "<|eot_id|>", "llama3_1": "<|eot_id|>", "gemma": "<end_of_turn>"}


def chat(*turns: str) -> tuple[Message, ...]:
    """ "u: Hi" and so on."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return tuple(Message(roles[turn[0]], turn[3:]) for turn in turns)


def call(name: str, id: str = "abcdefghi", **arguments) -> Message:
    return Message("assistant", "", tool_calls=(ToolCall(name, arguments, id),))


def result(name: str, content: str) -> Message:
    return Message("tool", content, name=name, tool_call_id="abcdefghi")


CHATS: dict[str, tuple[tuple[Message, ...], tuple[dict, ...]]] = {  # messages and tools
    "turns": (chat("s: Be kind.", "u: Who sails?", "a: The red boat.", "u: naïve 日本?", "a: é😀"), ()),
    "edges": (chat("u:  x\n", "a: ", "u: y", "a: \tone \n", "a: two"), ()),
    "thinking": (
        (
            Message("user", "Hi"),
            Message("assistant", "Hello.", reasoning="hm"),
            Message("user", "So?"),
            Message("assistant", "Yes.", reasoning="well,\nyes"),
        ),
        (),
    ),
    "call": (
        (
            *chat("s: Be kind.", "u: Weather?"),
            call("weather", city='Bonn "am"\nRhein', days=2),
            result("weather", '{"t": 3}'),
            Message("assistant", "3."),
        ),
        (WEATHER, NOW),
    ),
    "calls": (
        (
            *chat("u: Time?"),
            call("now"),
            result("now", "12"),
            call("now", zone=3),
            result("now", "15"),
            Message("assistant", "12 and 15."),
        ),
        (),
    ),
}


def stand_in(name: str, folder: Path, *, template: str | None = None) -> Path:
    """A folder with a small tokenizer that has the special tokens of a named template's family."""
    tokens = [t for t in TEMPLATES[name].tokens if t not in ("<|im_start|>", "<|im_end|>")]
    eos = EOS.get(name, "<|im_end|>" if "<|im_end|>" in TEMPLATES[name].tokens else "</s>")
    return make_hf_tokenizer(folder, template=template, special=(*tokens, "</s>", "<s>"), bos_token="<s>", eos_token=eos)
