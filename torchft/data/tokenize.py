"""Record -> Encoded; and a sample for the eye, its trained tokens marked.

record --formats--> Sample --masks, template--> Encoded          a preference pair is two of them, a document needs no template
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from torchft.data.formats import Read, only_chat, read_record
from torchft.data.mapping import SAME, Mapping
from torchft.data.masks import EVERY_REPLY, MaskConfig, apply_masks
from torchft.data.templates import Template
from torchft.data.text import encode_document
from torchft.data.types import Document, Encoded, Labelled, Pair, Sample
from torchft.tokenizers.protocol import Tokenizer

GREEN, PLAIN = "\033[32m", "\033[0m"


def encode_record(
    record: dict, where: str, *, template: Template, format: str = "auto", mapping: Mapping = SAME, masks: MaskConfig = EVERY_REPLY
) -> Encoded | None:
    """A record's chat, or its text, as tokens; None if the text is empty. Raises DataError naming `where`, also of preference data."""
    read = read_record(record, where, format, mapping)
    if isinstance(read, Document):
        return _encode_text(read, template)
    return _encode(only_chat(read, record, where), template, masks)


def encode_records(
    rows: Sequence[tuple[dict, str]],
    *,
    template: Template,
    format: str = "auto",
    mapping: Mapping = SAME,
    masks: MaskConfig = EVERY_REPLY,
) -> list[Encoded | None]:
    """`encode_record` of each (record, where), faster. Raises DataError for any."""
    out: list[Encoded | None] = [None] * len(rows)
    chats: dict[int, Sample] = {}
    for i, (record, where) in enumerate(rows):
        read = read_record(record, where, format, mapping)
        if isinstance(read, Document):
            out[i] = _encode_text(read, template)
        else:
            sample = only_chat(read, record, where)
            chats[i] = Sample(apply_masks(sample.messages, masks, sample.where), sample.where, sample.tools)
    for i, encoded in zip(chats, template.encode_batch(list(chats.values())), strict=True):
        out[i] = encoded
    return out


def encode_all(
    record: dict, where: str, *, template: Template, format: str = "auto", mapping: Mapping = SAME, masks: MaskConfig = EVERY_REPLY
) -> dict[str, Encoded]:
    """All that a record holds, by what it is: `chosen` and `rejected`; `good` or `bad`; else `chat` or `text`. An empty text is nothing."""
    parts = _parts(read_record(record, where, format, mapping))
    made = {kind: _encode_part(part, template, masks) for kind, part in parts.items()}
    return {kind: encoded for kind, encoded in made.items() if encoded is not None}


def all_roles(
    record: dict, where: str, *, template: Template, format: str = "auto", mapping: Mapping = SAME, masks: MaskConfig = EVERY_REPLY
) -> dict[str, list[str] | None]:
    """Who wrote each token of what `encode_all` gives: a role, or `template`; None: of a text, all of it a document."""
    parts = _parts(read_record(record, where, format, mapping))
    return {kind: None if isinstance(part, Document) else _roles(part, template, masks) for kind, part in parts.items()}


def describe(encoded: Encoded, tokenizer: Tokenizer, *, color: bool = True) -> str:
    """A sample as text, «trained tokens» between marks and in green, special tokens written out."""
    trained = encoded.weights > 0
    edges = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), len(trained)]
    out, shown = "", ""
    for start, end in pairwise(edges):
        whole = tokenizer.decode(encoded.ids[:end].tolist(), skip_special=False)  # from the beginning: spaces depend on what is before
        text, shown = whole[len(shown) :], whole
        if start < end and trained[start]:
            text = f"{GREEN}«{text}»{PLAIN}" if color else f"«{text}»"
        out += text
    return out


def _parts(read: Read) -> dict[str, Sample | Document]:
    """What is tokenised of a record, by what it is."""
    if isinstance(read, Document):
        return {"text": read}
    if isinstance(read, Pair):
        return {"chosen": read.chosen, "rejected": read.rejected}
    if isinstance(read, Labelled):
        return {"good" if read.good else "bad": read.sample}
    return {"chat": read}


def _encode_part(part: Sample | Document, template: Template, masks: MaskConfig) -> Encoded | None:
    return _encode_text(part, template) if isinstance(part, Document) else _encode(part, template, masks)


def _roles(sample: Sample, template: Template, masks: MaskConfig) -> list[str]:
    return template.roles(apply_masks(sample.messages, masks, sample.where), sample.tools)


def _encode_text(document: Document, template: Template) -> Encoded | None:
    return encode_document({"text": document.text}, document.where, text_key="text", tokenizer=template.tokenizer)


def _encode(sample: Sample, template: Template, masks: MaskConfig) -> Encoded:
    return template.encode(apply_masks(sample.messages, masks, sample.where), tools=sample.tools, where=sample.where)
