"""Another number of tokens than the model was made with, and rows added so that a layout can divide the vocabulary.

    rows      0 .. size of the file | new tokens, up to `size` | padding, up to a multiple of `multiple_of`
    values    read                  | mean of the file's rows (+ noise)             | logits -inf: no loss, never sampled

Padding exists in training only: a folder that is exported, and a checkpoint opened again, end with the last token.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torchft.errors import ConfigError, Problem
from torchft.models.spec import ModelSpec


@dataclass
class VocabConfig:
    size: int | None = None  # tokens the model has: more than its file has rows gives new ones; null: as many as the file
    multiple_of: int = 1  # the rows are padded to a multiple of this, which gives even parts under parallel.tp; padding is never predicted
    noise: float = 0.0  # new rows are the mean of the file's, plus normal noise of so many standard deviations

    def check(self) -> Iterator[Problem]:
        for key in ("size", "multiple_of"):
            value = getattr(self, key)
            if value is not None and value < 1:
                yield Problem(f"model.vocab.{key}", str(value), "at least 1", "use a positive number")
        if not 0 <= self.noise < float("inf"):
            yield Problem("model.vocab.noise", str(self.noise), "0 or more", "use 0 for the mean itself, or e.g. 0.1")


def resize_spec(spec: ModelSpec, cfg: VocabConfig) -> ModelSpec:
    """The spec of the model in training. Raises ConfigError for fewer tokens than it has."""
    size = spec.vocab_size if cfg.size is None else cfg.size
    if size < spec.vocab_size:
        fix = "leave model.vocab.size out; tokens that no text uses do no harm"
        raise ConfigError(Problem("model.vocab.size", str(size), f"at least the {spec.vocab_size} rows of the model", fix))
    rows = -(-size // cfg.multiple_of) * cfg.multiple_of
    return _with_rows(spec, rows, rows - size)


def without_padding(spec: ModelSpec) -> ModelSpec:
    """The spec of the same model in an exported folder."""
    return _with_rows(spec, spec.num_tokens, 0)


def _with_rows(spec: ModelSpec, rows: int, padding: int) -> ModelSpec:
    heads = {name: replace(head, size=rows) if name == "lm" else head for name, head in spec.heads.items()}
    return replace(spec, vocab_size=rows, padding_rows=padding, heads=heads)
