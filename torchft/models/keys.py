"""Names of weights: HF's <-> ours, by one list of rules per family, read in both directions.

    import: HF name --first rule whose `hf` fits--> ours        export: our name --first Rename or Split whose `ours` fits--> HF's

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
    """The same tensor under two names, both ways. transposed: HF stores matrices as (in, out) (GPT-2's Conv1D)."""

    hf: str
    ours: str
    transposed: bool = False


@dataclass(frozen=True)
class Split:
    """One tensor of HF's is several of ours, joined along the rows in this order (Phi-3's qkv_proj): split on import, joined on export."""

    hf: str
    ours: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Alias:
    """An older HF name of a tensor: read, never written. `of`: the rule it stands for, with the present name."""

    hf: str
    of: str | Rename | Split  # a plain string: our name


@dataclass(frozen=True)
class Drop:
    """A tensor some HF files hold and nobody needs."""

    hf: str
    reason: str


Rule = Rename | Split | Alias | Drop

HEADS = (Rename("score.weight", "score.weight"), Rename("score.bias", "score.bias"))  # of reward models
HEADS += (Rename("value.weight", "value.weight"), Rename("value.bias", "value.bias"))  # of PPO's critic


@dataclass(frozen=True)
class Stored:
    """How a weight of ours stands in HF's files: joined along the rows with others (`members`, itself among them), or transposed."""

    name: str
    members: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True)
class KeyMap:
    """Where each of our weights stands in the file."""

    stored: dict[str, Stored]  # by our name
    dropped: tuple[str, ...]  # HF names left out by a Drop rule
    tied_copy: str | None  # HF name of a second copy of a tied embedding, to be compared with the first
    missing: tuple[str, ...]  # our names that the file lacks

    @property
    def hf_of(self) -> dict[str, str]:
        """Our name -> HF's."""
        return {ours: stored.name for ours, stored in self.stored.items()}


def map_from_hf(rules: Sequence[Rule], hf_names: Iterable[str], expected: Collection[str], *, where: str) -> KeyMap:
    """Finds every expected weight (our names) among the file's names. `where` names the file or folder in errors.

    Raises CheckpointError for a name of the file that is neither expected nor dropped, and for two that mean one weight.
    Missing ones are returned: only the caller knows whether a new head may be missing (see `require`).
    """
    found: dict[str, Stored] = {}
    dropped, unexpected, doubled = [], [], []
    tied_copy = None
    for hf_name in hf_names:
        rule, stored = _import_rule(rules, hf_name)
        members = () if stored is None else stored.members
        if isinstance(rule, Drop):
            dropped.append(hf_name)
        elif members == ("lm_head.weight",) and "lm_head.weight" not in expected and "embed_tokens.weight" in expected:
            tied_copy = hf_name
        elif not members or any(ours not in expected for ours in members):
            unexpected.append(hf_name)
        elif any(ours in found for ours in members):
            doubled.append(f"{hf_name} and {next(found[ours].name for ours in members if ours in found)}")
        else:
            found |= dict.fromkeys(members, stored)
    missing = tuple(name for name in expected if name not in found)
    if unexpected or doubled:
        raise CheckpointError(_report(where, rules, missing, unexpected, doubled))
    return KeyMap(found, tuple(dropped), tied_copy, missing)


def require(mapping: KeyMap, rules: Sequence[Rule], *, where: str) -> None:
    """Raises CheckpointError if any weight is missing."""
    if mapping.missing:
        raise CheckpointError(_report(where, rules, mapping.missing, [], []))


def hf_name(rules: Sequence[Rule], ours: str) -> str:
    """Our name -> HF's. Raises CheckpointError if the family has no such weight."""
    return stored_as(rules, ours).name


def stored_as(rules: Sequence[Rule], ours: str) -> Stored:
    """Where a weight of ours stands in files that are written. Raises CheckpointError if the family has no such weight."""
    for rule in rules:
        for pattern in _ours(rule) if isinstance(rule, Rename | Split) else ():
            if name := _substitute(pattern, rule.hf, ours):
                return _stored(rule, name)
    raise CheckpointError(f"{ours} has no name in HF checkpoints of this family\n  fix: export the model without it")


def _import_rule(rules: Sequence[Rule], hf_name: str) -> tuple[Rule | None, Stored | None]:
    for rule in rules:
        if _substitute(rule.hf, rule.hf, hf_name):
            return rule, None if isinstance(rule, Drop) else _stored(rule, hf_name)
    return None, None


def _stored(rule: Rename | Split | Alias, hf_name: str) -> Stored:
    """The rule applied to one name of HF's."""
    members = tuple(_substitute(rule.hf, pattern, hf_name) for pattern in _ours(rule))
    return Stored(hf_name, members, getattr(_plain(rule), "transposed", False))


def _ours(rule: Rename | Split | Alias) -> tuple[str, ...]:
    """Our patterns that the rule speaks of."""
    rule = _plain(rule)
    ours = rule if isinstance(rule, str) else rule.ours
    return (ours,) if isinstance(ours, str) else ours


def _plain(rule: Rename | Split | Alias) -> str | Rename | Split:
    return rule.of if isinstance(rule, Alias) else rule


def _substitute(source: str, target: str, name: str) -> str | None:
    """`name` rewritten from pattern to pattern, star by star; None if it does not fit `source`."""
    match = re.fullmatch(re.escape(source).replace(r"\*", "(.+)"), name)
    if match is None:
        return None
    found = iter(match.groups())
    return re.sub(r"\*", lambda _: next(found), target)


def _report(where: str, rules: Sequence[Rule], missing: Sequence[str], unexpected: Sequence[str], doubled: Sequence[str]) -> str:
    lines = [f"{where} does not hold exactly the weights of this model"]
    missing_hf = list(dict.fromkeys(hf_name(rules, name) for name in missing))
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
