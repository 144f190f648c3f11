"""What every library trains on: chats made of the quickstart's sentences, once as messages (for torchft) and once as token ids.

    full rows   one chat of exactly 512 tokens a row: no padding, the same rows in the same order for all (modes eager, compiled)
    chats       1 to 7 turns, 50 to 512 tokens, prompts masked: each library packs or pads them in its own way (mode chat)

The ids are torchft's own rendering, so that no two libraries can disagree about the template; labels stand under their own ids, -100 is
not trained, as transformers wants them.

    adapter     LoRA on all linear layers of the blocks, its B not zero, so that the first loss shows its factor and its layers (mode lora)
"""

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from torchft.checkpoint.adapters import save_adapter
from torchft.data.templates import Template, build_template
from torchft.data.types import Message
from torchft.dist import keyed_generator
from torchft.models.build import read_config
from torchft.models.decoder import build_decoder
from torchft.peft.lora import LoraConfig, apply_lora, init_lora
from torchft.tokenizers.load import load_tokenizer

SEQ_LEN = 512
TURNS = (1, 1, 2, 2, 3, 4, 5, 6, 7)  # drawn from, for mode chat: short chats are more common
B_STD = 0.1
Chat = list[dict[str, str]]


def write_full_rows(folder: Path, model: Path, source: Path, count: int) -> None:
    """`count` chats of exactly SEQ_LEN tokens."""
    template, turns, rng = _template(model), _turns(source), random.Random(0)
    sentences = [user["content"] for user, _ in turns]
    _write(folder, template, [_full_row(template, rng.sample(sentences, 60)) for _ in range(count)])


def write_chats(folder: Path, model: Path, source: Path, count: int) -> None:
    """`count` chats of several turns, each of at most SEQ_LEN tokens."""
    template, turns, rng = _template(model), _turns(source), random.Random(0)
    chats: list[Chat] = []
    while len(chats) < count:
        drawn = rng.sample(turns, rng.choice(TURNS))
        chat = [{"role": "system", "content": "JSON"}, *(message for turn in drawn for message in turn)]
        if len(_encode(template, chat)["input_ids"]) <= SEQ_LEN:
            chats.append(chat)
    _write(folder, template, chats)


def write_adapter(folder: Path, model: Path, cfg: LoraConfig) -> None:
    """PEFT's files of an adapter over `model`, the same at each call."""
    spec, _ = read_config(model)
    decoder = build_decoder(spec, device="meta")
    apply_lora([decoder], cfg)
    adapter = {name: torch.empty(p.shape) for name, p in decoder.named_parameters() if p.requires_grad}
    init_lora(adapter.items(), seed=0)
    for name, b in adapter.items():
        if name.endswith(".lora_b"):
            b.normal_(0.0, B_STD, generator=keyed_generator("vs_peers", name))
    shutil.rmtree(folder, ignore_errors=True)
    save_adapter(folder, spec, adapter.items(), cfg, base={"path": str(model), "sha256": ""})


def read_rows(folder: Path) -> list[dict[str, list[int]]]:
    """The token ids and labels that were written to `folder`."""
    return [json.loads(line) for line in (folder / "tokens.jsonl").read_text(encoding="utf-8").splitlines()]


def _full_row(template: Template, sentences: Sequence[str]) -> Chat:
    """As many sentences as fit, then one-token words up to SEQ_LEN."""

    def chat(count: int, fill: int) -> Chat:
        reply = " ".join(sentences[:count]) + " a" * fill
        return [
            {"role": "system", "content": "JSON"},
            {"role": "user", "content": "List requests."},
            {"role": "assistant", "content": reply},
        ]

    def length(count: int, fill: int = 0) -> int:
        return len(_encode(template, chat(count, fill))["input_ids"])

    count = max(n for n in range(1, len(sentences)) if length(n) <= SEQ_LEN)
    row = chat(count, SEQ_LEN - length(count))
    assert len(_encode(template, row)["input_ids"]) == SEQ_LEN, "a filling word is more than one token"
    return row


def _template(model: Path) -> Template:
    return build_template("auto", load_tokenizer(model))


def _turns(source: Path) -> list[Chat]:
    """(user, assistant) of each chat of a file."""
    return [json.loads(line)["messages"][1:] for line in source.read_text(encoding="utf-8").splitlines()]


def _encode(template: Template, chat: Chat) -> dict[str, Any]:
    encoded = template.encode(tuple(Message(m["role"], m["content"]) for m in chat), where="benchmark")
    labels = [token if weight > 0 else -100 for token, weight in zip(encoded.ids.tolist(), encoded.weights.tolist())]
    return {"input_ids": encoded.ids.tolist(), "labels": [-100, *labels[1:]]}


def _write(folder: Path, template: Template, chats: Sequence[Chat]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in (("chats.jsonl", [{"messages": chat} for chat in chats]), ("tokens.jsonl", [_encode(template, c) for c in chats])):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
