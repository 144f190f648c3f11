"""Names of weights: one list of rules read in both directions, each name used exactly once."""

import pytest

from torchft.checkpoint.hf import weight_shapes
from torchft.errors import CheckpointError
from torchft.models.families import llama
from torchft.models.keys import Alias, Drop, Rename, hf_name, map_from_hf, require

RULES = (
    Drop("model.layers.*.inv_freq", "a buffer"),
    Alias("model.layers.*.ln1.weight", "layers.*.norm.weight"),
    Rename("model.layers.*", "layers.*"),
    Rename("blk.*.q.*", "h.*.query.*"),
    Rename("lm_head.weight", "lm_head.weight"),
    Rename("model.embed_tokens.weight", "embed_tokens.weight"),
)


@pytest.mark.parametrize("size", ["llama2-7b", "smollm2-135m"])
def test_every_weight_has_one_hf_name_and_comes_back(size):
    """Export then import is the identity on all names, untied and tied, and no two weights share a HF name."""
    names = list(weight_shapes(llama.SIZES[size]))
    theirs = [hf_name(llama.KEYS, name) for name in names]
    keys = map_from_hf(llama.KEYS, theirs, names, where=size)
    assert len(set(theirs)) == len(names) and keys.hf_of == dict(zip(names, theirs, strict=True)) and not keys.missing


def test_stars_are_carried_over_in_order():
    """Two stars: each stands for its own text."""
    assert hf_name(RULES, "h.12.query.bias") == "blk.12.q.bias"
    assert map_from_hf(RULES, ["blk.12.q.bias"], ["h.12.query.bias"], where="x").hf_of == {"h.12.query.bias": "blk.12.q.bias"}


def test_a_dot_is_a_dot():
    """Rules are names, not regular expressions."""
    with pytest.raises(CheckpointError, match=r"unexpected.*modelXlayersX0"):
        map_from_hf(RULES, ["modelXlayersX0"], [], where="x")


def test_missing_unexpected_and_doubled_are_all_named_at_once():
    """One error lists everything, with a guess for a misspelt name."""
    given = ["model.layers.0.norm.weight", "model.layers.0.ln1.weight", "model.layers.0.upp.weight", "stranger"]
    with pytest.raises(CheckpointError) as error:
        map_from_hf(RULES, given, ["layers.0.norm.weight", "layers.0.up.weight", "lm_head.weight"], where="folder")
    text = str(error.value)
    assert text.startswith("folder ") and "missing (2): model.layers.0.up.weight, lm_head.weight" in text
    assert "unexpected (2): model.layers.0.upp.weight, stranger" in text and "did the writer mean model.layers.0.up.weight" in text
    assert "twice (1): model.layers.0.ln1.weight and model.layers.0.norm.weight" in text and "tie_word_embeddings" in text


def test_missing_alone_is_reported_and_can_be_required():
    """A caller that adds a new head accepts missing names; everyone else requires none."""
    keys = map_from_hf(RULES, [], ["layers.0.norm.weight"], where="folder")
    assert keys.missing == ("layers.0.norm.weight",)
    with pytest.raises(CheckpointError, match=r"missing \(1\): model.layers.0.norm.weight"):
        require(keys, RULES, where="folder")


def test_drops_and_aliases():
    """Known leftovers are dropped and told; an older name is read."""
    keys = map_from_hf(RULES, ["model.layers.3.inv_freq", "model.layers.3.ln1.weight"], ["layers.3.norm.weight"], where="x")
    assert keys.dropped == ("model.layers.3.inv_freq",) and keys.hf_of == {"layers.3.norm.weight": "model.layers.3.ln1.weight"}
    assert hf_name(RULES, "layers.3.norm.weight") == "model.layers.3.norm.weight"


def test_a_second_copy_of_a_tied_head_is_told_apart():
    """lm_head.weight in a tied model is neither dropped nor loaded here: its value must be compared."""
    keys = map_from_hf(RULES, ["lm_head.weight", "model.embed_tokens.weight"], ["embed_tokens.weight"], where="x")
    assert keys.tied_copy == "lm_head.weight" and "lm_head.weight" not in keys.hf_of.values()


def test_a_weight_without_hf_name_is_refused():
    """No silent omission on export."""
    with pytest.raises(CheckpointError, match="lora_a has no name"):
        hf_name(RULES, "lora_a")
