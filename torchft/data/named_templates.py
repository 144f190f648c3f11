"""The chat templates of model families, by the name that `tokenizer.template` takes: Jinja in chat_templates/ and a row of facts each.

A row's settings become `{% set %}` lines in front of its Jinja, so the template that travels with an exported model is one text that any
library renders alike. Families that only put words around each message share turns.jinja. Sources: the templates in the models' own
tokenizer_config.json, the papers' and model cards' prompt formats; where a family's own code gives no way to train all replies of a chat
(system text moved to the last question), the text stands where the first reply saw it.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torchft.errors import DataError
from torchft.tokenizers.protocol import Tokenizer

FOLDER = Path(__file__).parent / "chat_templates"
EOS = "{eos}"  # in a setting: the tokenizer's EOS
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


@dataclass(frozen=True)
class Named:
    """A row. `jinja`: a file in chat_templates/."""

    jinja: str
    settings: dict[str, Any] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()  # that the tokenizer must have: as plain characters they would mean nothing to the model
    bos: Literal["always", "pretrained", "never"] = "pretrained"  # pretrained: in front if plain text starts with it
    thinks: bool = False  # replies may begin with <think>...</think> in their content, which the Jinja takes apart
    stops: tuple[str, ...] = ()  # that end a reply, besides those that end the plain ones


def _turns(system: tuple, user: tuple, reply: tuple, prompt: str, *, default_system: str = "", closing: str = "", **facts: Any) -> Named:
    """A family that only writes something before and after each message; `prompt` begins a reply, `closing` ends a chat."""
    settings = {"system": system, "user": user, "reply": reply, "prompt": prompt, "default_system": default_system, "closing": closing}
    return Named("turns.jinja", settings, **facts)


def _mistral(version: int, tokens: tuple[str, ...], *, tekken: bool = False) -> Named:
    return Named("mistral.jinja", {"version": version, "tekken": tekken}, tokens, bos="always")


CHATML = ("<|im_start|>", "<|im_end|>")
INST = ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
INST7 = (*INST, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
DEEPSEEK3 = ("<｜User｜>", "<｜Assistant｜>")
GLM = ("[gMASK]", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")

TEMPLATES: dict[str, Named] = {
    "chatml": Named("chatml.jinja"),
    "qwen": Named("chatml.jinja", {"default_system": QWEN, "results_from_user": True}, CHATML),
    "qwen3": Named("chatml.jinja", {"thinks": True, "results_from_user": True}, CHATML, thinks=True),
    "yi": Named("chatml.jinja", {}, CHATML),
    "smollm": Named("chatml.jinja", {}, CHATML),
    "smollm2": Named("chatml.jinja", {"default_system": SMOLLM}, CHATML),
    "internlm2": Named("internlm2.jinja", {}, (*CHATML, "<|plugin|>", "<|action_start|>", "<|action_end|>"), bos="always"),
    "llama2": Named("llama2.jinja", bos="never"),  # writes it before every question
    "llama3": Named("llama3.jinja", {}, LLAMA3, bos="always", stops=("<|eom_id|>", "<|end_of_text|>")),
    "llama3_1": Named("llama3.jinja", {"dated": True}, LLAMA3, bos="always", stops=("<|eom_id|>", "<|end_of_text|>")),
    "mistral_v1": _mistral(1, ()),
    "mistral_v2": _mistral(2, INST),
    "mistral_v3": _mistral(3, INST),
    "mistral_v3_tekken": _mistral(3, INST, tekken=True),
    "mistral_v7": _mistral(7, INST7),
    "mistral_v7_tekken": _mistral(7, INST7, tekken=True),
    "gemma": Named("gemma.jinja", {}, ("<start_of_turn>", "<end_of_turn>"), bos="always"),
    "phi3": _turns(
        ("<|system|>\n", "<|end|>\n"),
        ("<|user|>\n", "<|end|>\n"),
        ("<|assistant|>\n", "<|end|>\n"),
        "<|assistant|>\n",
        closing=EOS,
        tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "phi4": _turns(
        ("<|im_start|>system<|im_sep|>", "<|im_end|>"),
        ("<|im_start|>user<|im_sep|>", "<|im_end|>"),
        ("<|im_start|>assistant<|im_sep|>", "<|im_end|>"),
        "<|im_start|>assistant<|im_sep|>",
        tokens=("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    ),
    "deepseek": _turns(("", "\n\n"), ("User: ", "\n\n"), ("Assistant: ", EOS), "Assistant:", bos="always"),
    "deepseek3": Named("deepseek3.jinja", {}, DEEPSEEK3, bos="always"),
    "deepseek_r1": Named("deepseek3.jinja", {"thinks": True}, DEEPSEEK3, bos="always", thinks=True),
    "alpaca": _turns(
        ("", "\n\n"),
        ("### Instruction:\n", "\n\n"),
        ("### Response:\n", EOS + "\n\n"),
        "### Response:\n",
        default_system=ALPACA,
    ),
    "vicuna": _turns(("", " "), ("USER: ", " "), ("ASSISTANT: ", EOS), "ASSISTANT:", default_system=VICUNA),
    "zephyr": _turns(
        ("<|system|>\n", EOS + "\n"),
        ("<|user|>\n", EOS + "\n"),
        ("<|assistant|>\n", EOS + "\n"),
        "<|assistant|>\n",
    ),
    "baichuan2": _turns(  # EOS after past replies too, where the family's own code has none: the model learns to stop there
        ("", ""),
        ("<reserved_106>", ""),
        ("<reserved_107>", EOS),
        "<reserved_107>",
        tokens=("<reserved_106>", "<reserved_107>"),
        bos="never",
    ),
    "openchat": _turns(
        ("", "<|end_of_turn|>"),
        ("GPT4 Correct User: ", "<|end_of_turn|>"),
        ("GPT4 Correct Assistant: ", "<|end_of_turn|>"),
        "GPT4 Correct Assistant:",
        tokens=("<|end_of_turn|>",),
        bos="always",
    ),
    "chatglm3": Named(
        "glm.jinja",
        {"start": "[gMASK]sop", "lead": "\n ", "calls_are_python": True},
        (*GLM, "sop"),
        bos="never",
        stops=("<|user|>", "<|observation|>"),
    ),
    "glm4": Named(
        "glm.jinja", {"start": "[gMASK]<sop>", "lead": "\n"}, (*GLM, "<sop>"), bos="never", stops=("<|user|>", "<|observation|>")
    ),
    "gpt_oss": Named(
        "gpt_oss.jinja",
        tokens=("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"),
        bos="never",
        stops=("<|return|>", "<|call|>"),  # <|end|> ends thinking, after which the reply goes on
    ),
    "none": _turns(("", ""), ("", ""), ("", EOS), ""),
}


def source_for(name: str, tokenizer: Tokenizer) -> str:
    """The Jinja of a named template for this tokenizer. Raises DataError if the tokenizer lacks tokens that the family is made of."""
    named = TEMPLATES[name]
    settings = dict(named.settings)
    known = {**tokenizer.added_words, **tokenizer.special_tokens}
    if name == "chatml" and not set(CHATML) <= set(known):
        settings["end"] = EOS  # a base model without these tokens: EOS in place of the end, plain characters for the beginning
    bos = named.bos == "always" or (named.bos == "pretrained" and tokenizer.adds_bos and tokenizer.named_tokens["bos_token"] != CHATML[0])
    source = (FOLDER / named.jinja).read_text(encoding="utf-8")
    body = "".join(f"{{%- set {key} = {_literal(value)} %}}\n" for key, value in settings.items()) + source
    if bos:
        body = "{{- bos_token }}\n" + body
    missing = [token for token in named.tokens if token not in known]
    needs = [key for key in ("bos_token", "eos_token") if key in body and key not in tokenizer.named_tokens]
    if missing or needs:
        raise DataError(
            f"tokenizer.template: {name}\n  given:    a tokenizer without {', '.join([*missing, *needs])}\n"
            f"  expected: one of the family that {name} is for\n"
            "  fix:      set tokenizer.template: auto (the model's own), chatml or none; or name the token in tokenizer_config.json"
        )
    return body


def _literal(value: Any) -> str:
    """A setting as Jinja."""
    return json.dumps(value, ensure_ascii=False).replace(EOS, '" + eos_token + "')
