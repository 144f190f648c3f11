"""Record -> Encoded; and a sample for the eye, its trained tokens marked.

record --formats--> Sample --masks, template--> Encoded          a preference pair is two of them, a document needs no template
"""

from itertools import pairwise

import numpy as np

from torchft.data.formats import only_chat, read_record
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


def encode_all(
    record: dict, where: str, *, template: Template, format: str = "auto", mapping: Mapping = SAME, masks: MaskConfig = EVERY_REPLY
) -> dict[str, Encoded]:
    """All that a record holds, by what it is: `chosen` and `rejected`; `good` or `bad`; else `chat` or `text`. An empty text is nothing."""
    read = read_record(record, where, format, mapping)
    if isinstance(read, Document):
        text = _encode_text(read, template)
        return {} if text is None else {"text": text}
    if isinstance(read, Pair):
        return {"chosen": _encode(read.chosen, template, masks), "rejected": _encode(read.rejected, template, masks)}
    if isinstance(read, Labelled):
        return {"good" if read.good else "bad": _encode(read.sample, template, masks)}
    return {"chat": _encode(read, template, masks)}


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


def _encode_text(document: Document, template: Template) -> Encoded | None:
    return encode_document({"text": document.text}, document.where, text_key="text", tokenizer=template.tokenizer)


def _encode(sample: Sample, template: Template, masks: MaskConfig) -> Encoded:
    return template.encode(apply_masks(sample.messages, masks, sample.where), tools=sample.tools, where=sample.where)
