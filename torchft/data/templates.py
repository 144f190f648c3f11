"""Chat -> token ids and the weight each is trained with; the same code makes the prompts of inference.

    messages --render--> text, who wrote what (spans.py) --cut at special tokens of the template and at replies--> parts
             --tokenizer--> ids, each with its characters --> weights

Rules. Only the template's text can hold special tokens. A reply is trained from where the model would begin to write (after the text that
`add_generation_prompt` ends with) through the first special token after it, its end of turn. Where the template gives the last reply no
such token, EOS follows it, trained, in place of what the template writes there.
BOS is where the template puts it, never added. Text between special tokens is tokenised whole, as HF does it, except that a boundary is
forced at both ends of a reply: no token holds prompt and reply together, since at inference the prompt is tokenised alone. So the ids of
a prompt begin the ids of the training sample that goes on from it.
"""

import difflib
import hashlib
import json
import re
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from itertools import pairwise
from typing import Literal

import numpy as np

from torchft.data.named_templates import TEMPLATES, Named, source_for
from torchft.data.outlines import TOOLS, Tools, fold_thinking, split_thinking
from torchft.data.sandbox import ChatTemplate
from torchft.data.spans import CACHED, Located, Locator, Turn
from torchft.data.types import Encoded, Message, Sample
from torchft.errors import DataError
from torchft.tokenizers.hf import HfTokenizer
from torchft.tokenizers.protocol import Part, Pieces, Tokenizer

VERSION = 2  # of the rules above; part of the digest
TODAY = date(2024, 7, 26)  # what templates are told: the tokens of a run must not depend on the day it is started
READS_THINKING = re.compile(r"(\.|\[')(reasoning_content|thinking)\b")

Thinking = Literal["mixed", "always", "never"]


def build_template(name: str, tokenizer: Tokenizer, *, thinking: Thinking = "mixed", today: date = TODAY) -> "Template":
    """`auto`: the tokenizer's own template; else one of TEMPLATES. Raises DataError if there is none, or none that compiles.

    thinking: `mixed`, replies with thinking and without, as the template writes them; `always`, every reply thinks (the template decides
    how it is shown); `never`, thinking is left out and the prompt says so.
    """
    if name == "auto":
        if tokenizer.chat_template is None:
            raise DataError(
                "tokenizer.template: auto\n  given:    a tokenizer without a chat template (a base model)\n  expected: one with its own\n"
                "  fix:      set tokenizer.template: chatml, or take the tokenizer of the instruct model"
            )
        return Template(name, _told(tokenizer.chat_template, thinking), tokenizer, thinking=thinking, today=today)
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise DataError(f"tokenizer.template: given {name!r}, expected one of auto, {', '.join(TEMPLATES)}{hint}")
    source = _told(source_for(name, tokenizer), thinking)
    return Template(name, source, tokenizer, named=TEMPLATES[name], thinking=thinking, today=today)


class Template:
    """A chat template with its tokenizer. `source` is its Jinja, to travel with an exported model; equal `digest`, equal ids.

    named: what is known of a template of this library; None: `source` is anybody's.
    """

    def __init__(
        self,
        name: str,
        source: str,
        tokenizer: Tokenizer,
        *,
        named: Named | None = None,
        thinking: Thinking = "mixed",
        today: date = TODAY,
    ):
        self.name, self.source = name, source
        facts = [VERSION, source, thinking, tokenizer.digest, tokenizer.named_tokens, str(today)]
        self.digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self._tokenizer = self.tokenizer = tokenizer
        self._thinking, self._splits = thinking, named is not None and named.thinks
        self._reads_thinking, self._reads_tools = READS_THINKING.search(source) is not None, "tools" in source
        # Added words the template itself writes (`<tool_response>`): not to be made from a user's text either.
        reserved = {w: i for w, i in tokenizer.added_words.items() if w.strip() and len(w) > 1 and w in source}
        self._special = _any_of(tokenizer.special_tokens)
        self._reserved = _any_of(reserved) if reserved else None
        jinja = ChatTemplate(source, today=today, variables=tokenizer.named_tokens)
        marks = _any_of([*tokenizer.special_tokens, *reserved])
        self._locator = Locator(jinja, source, frozenset(tokenizer.special_tokens), marks, verified=named is None)
        self._tokens_of: dict[str, list[tuple[int, int, int]]] = {}
        self._one_at_a_time = threading.Lock()  # rendering counts its steps and keeps skeletons; only tokenising is worth several threads
        known = {**tokenizer.added_words, **tokenizer.special_tokens}
        stops = {known[t] for t in (named.stops if named else ()) if t in known}
        self.stop_ids = tokenizer.stop_ids | stops | self._ends_of_turn()

    def render(self, messages: Sequence[Message], tools: Tools = (), *, add_generation_prompt: bool = False) -> str:
        """The text of a chat. Raises DataError with the template's message if it refuses the chat."""
        self._check_tools(tools)
        return self._locator.render(self._prepared(messages), tools, add_generation_prompt=add_generation_prompt)

    def encode(self, messages: Sequence[Message], *, where: str, tools: Tools = ()) -> Encoded:
        """A whole chat for training. Raises DataError, naming `where`."""
        return self.encode_batch([Sample(tuple(messages), where, tuple(tools))])[0]

    def encode_batch(self, samples: Sequence[Sample]) -> list[Encoded]:
        """Whole chats for training, faster than one by one. Raises DataError, naming the first that can't be encoded."""
        plans, wheres = [], [sample.where for sample in samples]
        with self._one_at_a_time:  # once for all: threads that take turns at each chat would mostly wait for each other
            for sample in samples:
                with _naming(sample.where):
                    plans.append(self._make_plan(sample.messages, sample.tools, add_generation_prompt=False))
        if len(plans) > 1 and isinstance(self._tokenizer, HfTokenizer):
            tokenized = self._tokenizer.encode_many([plan.parts for plan in plans], wheres)
            return [self._encoded(plan, pieces) for plan, pieces in zip(plans, tokenized, strict=True)]
        encoded = []
        for plan, where in zip(plans, wheres, strict=True):
            with _naming(where):
                encoded.append(self._encoded(plan, self._tokenizer.encode_parts(plan.parts)))
        return encoded

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """Ids after which the model writes its reply. The training ids of a chat that goes on with a reply begin with them."""
        plan = self._plan(messages, tools, add_generation_prompt=True)
        return self._tokenizer.encode_parts(plan.parts).ids.tolist()

    def roles(self, messages: Sequence[Message], tools: Tools = ()) -> list[str]:
        """Who wrote each token that `encode` gives: the role of a message, or `template` (tool descriptions too)."""
        plan = self._plan(messages, tools, add_generation_prompt=False)
        pieces = self._tokenizer.encode_parts(plan.parts)
        stretches = self._locator.locate(self._prepared(messages), tools, frozenset(), add_generation_prompt=False).stretches
        at = np.searchsorted([stretch.start for stretch in stretches], pieces.starts, side="right") - 1
        names = {None: "template", TOOLS: "template"} | {i: message.role for i, message in enumerate(messages)}
        roles = [names[stretches[i].message] for i in at.tolist()]
        if plan.open_end is None:
            return roles
        return [*(role for role, end in zip(roles, pieces.ends, strict=True) if end <= plan.open_end), "template"]  # EOS, added behind

    def _plan(self, messages: Sequence[Message], tools: Tools, *, add_generation_prompt: bool) -> "_Plan":
        with self._one_at_a_time:
            return self._make_plan(messages, tools, add_generation_prompt=add_generation_prompt)

    def _make_plan(self, messages: Sequence[Message], tools: Tools, *, add_generation_prompt: bool) -> "_Plan":
        self._check_tools(tools)
        messages = self._prepared(messages)
        chosen = frozenset(i for i, m in enumerate(messages) if m.is_trained and m.weight > 0)
        strict = frozenset() if add_generation_prompt else chosen
        located = self._locator.locate(messages, tools, strict, add_generation_prompt=add_generation_prompt)
        tokens = self._template_tokens(located)
        spans = {turn.message: _span(turn, tokens) for turn in located.turns}
        cuts = {at for span in spans.values() for at in span} | self._reserved_cuts(located, messages)
        last = len(messages) - 1
        is_open = last in spans and messages[last].role == "assistant" and not _is_ended(spans[last], tokens)
        return _Plan(
            _parts(located.text, tokens, cuts),
            [(*spans[i], messages[i].weight) for i in strict],
            spans[last][1] if is_open else None,
            messages[last].weight if last in chosen else 0.0,
        )

    def _encoded(self, plan: "_Plan", pieces: Pieces) -> Encoded:
        weights = np.zeros(len(pieces.ids), np.float32)
        for start, end, weight in plan.trained:
            first, last = np.searchsorted(pieces.starts, (start, end))
            weights[first:last] = weight
        if plan.open_end is None:
            return Encoded(pieces.ids, weights)
        if self._tokenizer.eos_id is None:
            raise DataError(
                "neither the chat template nor the tokenizer has a token that ends a reply: set eos_token in tokenizer_config.json"
            )
        keep = pieces.ends <= plan.open_end  # text of the template after the reply would keep the model from learning to stop there
        return Encoded(np.append(pieces.ids[keep], np.int32(self._tokenizer.eos_id)), np.append(weights[keep], np.float32(plan.end_weight)))

    def _prepared(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages with their thinking where the template takes it from, or without."""
        if self._thinking == "never":
            return [replace(split_thinking(m), reasoning=None) for m in messages]
        if not self._reads_thinking:
            return [fold_thinking(m) for m in messages]
        return [split_thinking(m) for m in messages] if self._splits else messages

    def _check_tools(self, tools: Tools) -> None:
        if tools and not self._reads_tools:
            raise DataError(
                f"the chat has tools, which the chat template ({self.name}) does not show: take a template that has tools "
                "(docs/data.md lists them), or describe them in the system message and remove them"
            )

    def _template_tokens(self, located: Located) -> list[tuple[int, int, int]]:
        """(start, end, id) of the special tokens in the template's own text, in order."""
        own = (stretch for stretch in located.stretches if stretch.message is None)
        return [(s.start + start, s.start + end, i) for s in own for start, end, i in self._tokens_in(s.text)]

    def _tokens_in(self, text: str) -> list[tuple[int, int, int]]:
        """(start, end, id) of the special tokens in a text of the template, which writes few different ones."""
        if text not in self._tokens_of:
            if len(self._tokens_of) >= CACHED:
                self._tokens_of.clear()
            ids = self._tokenizer.special_tokens
            self._tokens_of[text] = [(*m.span(), ids[m[0]]) for m in self._special.finditer(text)]
        return self._tokens_of[text]

    def _reserved_cuts(self, located: Located, messages: Sequence[Message]) -> set[int]:
        """Places inside what looks like the template's own words in a user's text: after the first character of each."""
        if self._reserved is None:
            return set()
        replies = {i for i, m in enumerate(messages) if m.role == "assistant"}
        others = (s for s in located.stretches if s.message is not None and s.message not in replies)
        return {s.start + m.start() + 1 for s in others for m in self._reserved.finditer(s.text)}

    def _ends_of_turn(self) -> frozenset[int]:
        """The special tokens that end replies, found on small chats: the template's own after the last reply (gpt-oss writes another after
        past ones); where it has none there, the one after past replies. None if the template refuses those chats."""
        chat, found = [Message("user", "a"), Message("assistant", "b"), Message("user", "a")], set()
        text_of = {i: text for text, i in self._tokenizer.special_tokens.items()}
        for length in (2, 3):
            try:
                encoded = self.encode(chat[:length], where="a small chat")
                rendering = self.render(chat[:length])
            except DataError:  # a template with demands of its own: the tokenizer's stop ids have to do, as at other tools
                continue
            last = int(encoded.ids[encoded.weights > 0][-1])
            found |= {last} & set(text_of)
            if text_of.get(last, "\0") in rendering:
                break
        return frozenset(found)


@dataclass(frozen=True)
class _Plan:
    """A chat ready for the tokenizer; places in characters of the parts joined."""

    parts: list[Part]
    trained: list[tuple[int, int, float]]  # start, end, weight; parts begin and end there
    open_end: int | None  # where the last reply ends without an end-of-turn token: EOS follows
    end_weight: float  # of that EOS


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Says in which record an error is."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _span(turn: Turn, tokens: Sequence[tuple[int, int, int]]) -> tuple[int, int]:
    """A turn through its end-of-turn token: the first special token between its content and the next message."""
    ends = (end for start, end, _ in tokens if turn.end <= start < turn.limit)
    return turn.start, next(ends, turn.end)


def _is_ended(span: tuple[int, int], tokens: Sequence[tuple[int, int, int]]) -> bool:
    """Whether the span holds an end-of-turn token."""
    return any(end == span[1] for _, end, _ in tokens)


def _parts(text: str, tokens: Sequence[tuple[int, int, int]], cuts: set[int]) -> list[Part]:
    """The text as special tokens and stretches of text, with a boundary at every cut."""
    parts: list[Part] = []
    ordered, at = sorted(cuts), 0
    for start, end, token in [*tokens, (len(text), len(text), None)]:
        inner = ordered[bisect_right(ordered, at) : bisect_left(ordered, start)]
        parts += [text[a:b] for a, b in pairwise([at, *inner, start])]
        if token is not None:
            parts.append(token)
        at = end
    return parts


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """The longest of these words wherever it stands; nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)")


def _told(source: str, thinking: Thinking) -> str:
    """The template, told whether the model is to think."""
    if thinking == "mixed":
        return source
    if "enable_thinking" in source or "every_turn" in source:
        value = "true" if thinking == "always" else "false"
        return f"{{%- set enable_thinking = {value} %}}\n{{%- set every_turn = true %}}\n{source}"
    if thinking == "always":
        raise DataError(
            "tokenizer.thinking: always\n  given:    a chat template that does not read enable_thinking\n"
            "  expected: one that does, such as qwen3 or deepseek_r1\n"
            "  fix:      set tokenizer.thinking: mixed, or another tokenizer.template"
        )
    return source
