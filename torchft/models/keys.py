"""Names of weights: HF's <-> ours, by one list of rules per family, read in both directions.

    import: HF name --first rule whose `hf` fits--> ours        export: our name --first Rename whose `ours` fits--> HF's

A `*` stands for the same text on both sides, star by star. Every name of the file and every name of the model is used exactly once; what is
missing, unexpected or doubled is one error with all of it (never `strict=False`).
"""

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torchft.errors import CheckpointError


@dataclass(frozen=True)
class Rename:
    """The same tensor under two names, both ways."""

    hf: str
    ours: str


@dataclass(frozen=True)
class Alias:
    """An older HF name of a tensor: read, never written."""

    hf: str
    ours: str


@dataclass(frozen=True)
class Drop:
    """A tensor some HF files hold and nobody needs."""

    hf: str
    reason: str


Rule = Rename | Alias | Drop


@dataclass(frozen=True)
class KeyMap:
    """Where each of our weights stands in the file."""

    hf_of: dict[str, str]  # our name -> HF's
    dropped: tuple[str, ...]  # HF names left out by a Drop rule
    tied_copy: str | None  # HF name of a second copy of a tied embedding, to be compared with the first
    missing: tuple[str, ...]  # our names that the file lacks


def map_from_hf(rules: Sequence[Rule], hf_names: Iterable[str], expected: Collection[str], *, where: str) -> KeyMap:
    """Finds every expected weight (our names) among the file's names. `where` names the file or folder in errors.

    Raises CheckpointError for a name of the file that is neither expected nor dropped, and for two that mean one weight.
    Missing ones are returned: only the caller knows whether a new head may be missing (see `require`).
    """
    hf_of: dict[str, str] = {}
    dropped, unexpected, doubled = [], [], []
    tied_copy = None
    for hf_name in hf_names:
        rule, ours = _import_rule(rules, hf_name)
        if isinstance(rule, Drop):
            dropped.append(hf_name)
        elif ours == "lm_head.weight" and ours not in expected and "embed_tokens.weight" in expected:
            tied_copy = hf_name
        elif ours not in expected:
            unexpected.append(hf_name)
        elif ours in hf_of:
            doubled.append(f"{hf_name} and {hf_of[ours]}")
        else:
            hf_of[ours] = hf_name
    missing = tuple(name for name in expected if name not in hf_of)
    if unexpected or doubled:
        raise CheckpointError(_report(where, rules, missing, unexpected, doubled))
    return KeyMap(hf_of, tuple(dropped), tied_copy, missing)


def require(mapping: KeyMap, rules: Sequence[Rule], *, where: str) -> None:
    """Raises CheckpointError if any weight is missing."""
    if mapping.missing:
        raise CheckpointError(_report(where, rules, mapping.missing, [], []))


def hf_name(rules: Sequence[Rule], ours: str) -> str:
    """Our name -> HF's. Raises CheckpointError if the family has no such weight."""
    for rule in rules:
        if isinstance(rule, Rename) and (found := _substitute(rule.ours, rule.hf, ours)):
            return found
    raise CheckpointError(f"{ours} has no name in HF checkpoints of this family\n  fix: export the model without it")


def _import_rule(rules: Sequence[Rule], hf_name: str) -> tuple[Rule | None, str | None]:
    for rule in rules:
        if found := _substitute(rule.hf, rule.hf if isinstance(rule, Drop) else rule.ours, hf_name):
            return rule, found
    return None, None


def _substitute(source: str, target: str, name: str) -> str | None:
    """`name` rewritten from pattern to pattern, star by star; None if it does not fit `source`."""
    match = re.fullmatch(re.escape(source).replace(r"\*", "(.+)"), name)
    if match is None:
        return None
    found = iter(match.groups())
    return re.sub(r"\*", lambda _: next(found), target)


def _report(where: str, rules: Sequence[Rule], missing: Sequence[str], unexpected: Sequence[str], doubled: Sequence[str]) -> str:
    lines = [f"{where} does not hold exactly the weights of this model"]
    missing_hf = [hf_name(rules, name) for name in missing]
    lines += _listed("missing", missing_hf) + _listed("unexpected", unexpected) + _listed("the same weight twice", doubled)
    close = {u: difflib.get_close_matches(u, missing_hf, n=1, cutoff=0.8) for u in list(unexpected)[:3]}
    lines += [f"  {name}: did the writer mean {guess[0]}?" for name, guess in close.items() if guess]
    if "lm_head.weight" in missing_hf:
        lines.append("  (without lm_head.weight the head may be tied: then config.json says tie_word_embeddings: true)")
    return "\n".join([*lines, "  fix: config.json and the weights must be of one model; take both again from their source"])


def _listed(title: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return [f"  {title} ({len(names)}): {', '.join(list(names)[:8])}{more}"]
