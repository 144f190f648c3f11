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

import hashlib
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from datetime import date
from itertools import pairwise

import numpy as np

from torchft.data.sandbox import ChatTemplate
from torchft.data.spans import Located, Locator, Turn, as_dicts
from torchft.data.types import Encoded, Message
from torchft.errors import DataError
from torchft.tokenizers.protocol import Part, Pieces, Tokenizer

VERSION = 1  # of the rules above; part of the digest
TODAY = date(2024, 7, 26)  # what templates are told: the tokens of a run must not depend on the day it is started
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMES = ("auto", "chatml")


def build_template(name: str, tokenizer: Tokenizer, *, today: date = TODAY) -> "Template":
    """`auto`: the tokenizer's own template; `chatml`: ours. Raises DataError if there is none, or none that compiles."""
    if name == "auto":
        if tokenizer.chat_template is None:
            raise DataError(
                "tokenizer.template: auto\n  given:    a tokenizer without a chat template (a base model)\n  expected: one with its own\n"
                "  fix:      set tokenizer.template: chatml, or take the tokenizer of the instruct model"
            )
        source = tokenizer.chat_template
    elif name == "chatml":
        source = _chatml(tokenizer)
    else:
        raise DataError(f"tokenizer.template: given {name!r}, expected one of {', '.join(NAMES)}")
    return Template(name, source, tokenizer, today=today)


class Template:
    """A chat template with its tokenizer. `source` is its Jinja, to travel with an exported model; equal `digest`, equal ids."""

    def __init__(self, name: str, source: str, tokenizer: Tokenizer, *, today: date = TODAY):
        self.name, self.source = name, source
        facts = [VERSION, source, tokenizer.digest, tokenizer.named_tokens, str(today)]
        self.digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self._tokenizer = self.tokenizer = tokenizer
        self._jinja = ChatTemplate(source, today=today, variables=tokenizer.named_tokens)
        self._locator = Locator(self._jinja, source, frozenset(tokenizer.special_tokens))
        # Added words the template itself writes (`<tool_response>`): not to be made from a user's text either.
        reserved = {w: i for w, i in tokenizer.added_words.items() if w.strip() and len(w) > 1 and w in source}
        self._special = _any_of(tokenizer.special_tokens)
        self._reserved = _any_of(reserved)
        self.stop_ids = tokenizer.stop_ids | self._ends_of_turn()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of a chat. Raises DataError with the template's message if it refuses the chat."""
        return self._jinja.render(as_dicts(messages), add_generation_prompt=add_generation_prompt)

    def encode(self, messages: Sequence[Message], *, where: str, tools: Sequence[dict] = ()) -> Encoded:
        """A whole chat for training. Raises DataError, naming `where`."""
        if tools or any(message.tool_calls for message in messages):
            raise DataError(f"{where}: has tools, which this version can't render")
        try:
            pieces, weights = self._encode(messages, add_generation_prompt=False)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        return Encoded(pieces.ids, weights)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids after which the model writes its reply. The training ids of a chat that goes on with a reply begin with them."""
        pieces, _ = self._encode(messages, add_generation_prompt=True)
        return pieces.ids.tolist()

    def roles(self, messages: Sequence[Message], *, tools: Sequence[dict] = ()) -> list[str]:
        """Who wrote each token that `encode` gives: the role of a message, or `template`."""
        pieces, _ = self._encode(messages, add_generation_prompt=False)
        stretches = self._locator.locate(messages, frozenset(), add_generation_prompt=False).stretches
        at = np.searchsorted([stretch.start for stretch in stretches], pieces.starts, side="right") - 1
        owners = (stretches[i].message for i in at.tolist())
        return ["template" if owner is None else messages[owner].role for owner in owners]

    def _encode(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> tuple[Pieces, np.ndarray]:
        """Tokens and weights (n,) float32."""
        trained = frozenset(i for i, m in enumerate(messages) if (m.role == "assistant" if m.train is None else m.train))
        strict = frozenset() if add_generation_prompt else trained
        located = self._locator.locate(messages, strict, add_generation_prompt=add_generation_prompt)
        tokens = self._template_tokens(located)
        spans = {turn.message: _span(turn, tokens) for turn in located.turns}
        cuts = {at for span in spans.values() for at in span} | self._reserved_cuts(located, messages)
        pieces = self._tokenizer.encode_parts(_parts(located.text, tokens, cuts))
        weights = np.zeros(len(pieces.ids), np.float32)
        for start, end in (spans[i] for i in strict):
            weights[(pieces.starts >= start) & (pieces.starts < end)] = 1
        last = len(messages) - 1
        if add_generation_prompt or last not in spans or messages[last].role != "assistant" or _is_ended(spans[last], tokens):
            return pieces, weights
        pieces = self._ended_by_eos(pieces, spans[last][1])
        return pieces, np.append(weights[: len(pieces.ids) - 1], np.float32(last in trained))

    def _template_tokens(self, located: Located) -> list[tuple[int, int, int]]:
        """(start, end, id) of the special tokens in the template's own text, in order."""
        ids = self._tokenizer.special_tokens
        own = (stretch for stretch in located.stretches if stretch.message is None)
        return [(s.start + m.start(), s.start + m.end(), ids[m[0]]) for s in own for m in self._special.finditer(s.text)]

    def _reserved_cuts(self, located: Located, messages: Sequence[Message]) -> set[int]:
        """Places inside what looks like the template's own words in a user's text: after the first character of each."""
        others = (s for s in located.stretches if s.message is not None and messages[s.message].role != "assistant")
        return {s.start + m.start() + 1 for s in others for m in self._reserved.finditer(s.text)}

    def _ended_by_eos(self, pieces: Pieces, end: int) -> Pieces:
        """The pieces up to `end`, then EOS; text of the template after the reply would keep the model from learning to stop there."""
        eos = self._tokenizer.eos_id
        if eos is None:
            raise DataError(
                "neither the chat template nor the tokenizer has a token that ends a reply: set eos_token in tokenizer_config.json"
            )
        keep = pieces.ends <= end
        at = np.array([end])
        return Pieces(
            *(np.append(field[keep], last) for field, last in ((pieces.ids, np.int32(eos)), (pieces.starts, at), (pieces.ends, at)))
        )

    def _ends_of_turn(self) -> frozenset[int]:
        """The special tokens that end a reply, last or not, found on small chats; none if the template refuses those."""
        user, reply = Message("user", "a"), Message("assistant", "b")
        found = set()
        for chat in ([user, reply], [user, reply, user]):
            try:
                pieces, weights = self._encode(chat, add_generation_prompt=False)
            except DataError:  # a template with demands of its own: the tokenizer's stop ids have to do, as at other tools
                continue
            found.add(int(pieces.ids[weights > 0][-1]))
        return frozenset(found & set(self._tokenizer.special_tokens.values()))


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


def _chatml(tokenizer: Tokenizer) -> str:
    """Our template for this tokenizer: BOS in front if the model was pretrained so; EOS for an end of turn it has no token for."""
    source = CHATML
    if not {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.special_tokens):
        if tokenizer.eos_id is None:
            raise DataError("tokenizer.template: chatml needs <|im_end|> or an EOS token: set eos_token in tokenizer_config.json")
        source = source.replace("<|im_end|>", "{{ eos_token }}")
    if tokenizer.adds_bos and tokenizer.named_tokens["bos_token"] != "<|im_start|>":
        source = "{{ bos_token }}" + source
    return source
