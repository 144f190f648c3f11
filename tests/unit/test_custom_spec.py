"""Models of one's own size: the numbers given, the family's architecture for the rest, its own refusals."""

import pytest

from torchft.errors import ConfigError
from torchft.models.build import FAMILIES, spec_from_config, spec_of_size
from torchft.models.custom import HF_KEYS, CustomSpec, custom_spec
from torchft.train.setup import ModelConfig

SMALL = {"hidden_size": 96, "intermediate_size": 256, "num_layers": 3, "num_heads": 4}


def test_numbers_without_a_size():
    """The given numbers; head_dim and kv heads follow from them; norm and rotary base are the family's first size's."""
    spec = custom_spec("llama", None, CustomSpec(**SMALL, vocab_size=4096, max_seq_len=512, tie_embeddings=True))
    first = next(iter(FAMILIES["llama"].SIZES.values()))
    assert (spec.hidden_size, spec.mlp.intermediate_size, spec.num_layers, spec.vocab_size, spec.max_seq_len) == (96, 256, 3, 4096, 512)
    assert (spec.attention.num_heads, spec.attention.num_kv_heads, spec.attention.head_dim) == (4, 4, 24)
    assert spec.tie_embeddings and spec.heads["lm"].size == 4096
    assert (spec.norm, spec.rope) == (first.norm, first.rope)


@pytest.mark.parametrize("family", [name for name, f in FAMILIES.items() if "hidden_size" in f.to_hf(next(iter(f.SIZES.values())))])
def test_every_family_takes_the_numbers(family):
    """Also where the family's own default is a fixed head size."""
    spec = custom_spec(family, None, CustomSpec(**SMALL))
    assert (spec.hidden_size, spec.num_layers, spec.attention.num_kv_heads, spec.attention.head_dim) == (96, 3, 4, 24)


def test_changes_of_a_size():
    """A published size with one number changed differs from it in nothing else; without changes it is the size."""
    base = spec_of_size("llama", "llama3.2-1b")
    assert custom_spec("llama", "llama3.2-1b", CustomSpec()) == base
    wide = custom_spec("llama", "llama3.2-1b", CustomSpec(hidden_size=4096))
    assert wide.attention.head_dim == 128 and wide.attention.num_kv_heads == base.attention.num_kv_heads and wide.rope == base.rope
    config = FAMILIES["llama"].to_hf(base) | {"vocab_size": 1000}
    assert custom_spec("llama", "llama3.2-1b", CustomSpec(vocab_size=1000)) == spec_from_config(config, where="")


@pytest.mark.parametrize("name", HF_KEYS)
def test_every_number_has_an_effect(name):
    """Each key of model.spec changes the spec."""
    values = {"hidden_size": 192, "num_heads": 8, "num_kv_heads": 2, "head_dim": 32, "tie_embeddings": True}
    before = custom_spec("llama", None, CustomSpec(**SMALL))
    assert custom_spec("llama", None, CustomSpec(**SMALL | {name: values.get(name, 7)})) != before


@pytest.mark.parametrize(
    ("family", "size", "numbers", "expected"),
    [
        ("llama", None, SMALL | {"num_kv_heads": 3}, "model.spec.num_kv_heads"),
        ("llama", None, SMALL | {"num_heads": 5}, "model.spec.head_dim"),
        ("llama", None, SMALL | {"num_heads": 9}, "model.spec.head_dim"),
        ("lama", None, SMALL, "did you mean llama"),
        ("llama", "llama9", {"hidden_size": 8}, "llama3-8b"),
    ],
)
def test_numbers_that_do_not_fit(family, size, numbers, expected):
    """The family's own refusal, under the key as typed; unknown families and sizes are named."""
    with pytest.raises(ConfigError, match=expected):
        custom_spec(family, size, CustomSpec(**numbers))


def test_a_number_the_family_lacks(monkeypatch):
    """A key that the family's config does not know would be ignored: an error."""
    to_hf = FAMILIES["llama"].to_hf
    monkeypatch.setattr(FAMILIES["llama"], "to_hf", lambda spec: {k: v for k, v in to_hf(spec).items() if k != "rope_theta"})
    with pytest.raises(ConfigError, match="model.spec.rope_base"):
        custom_spec("llama", None, CustomSpec(**SMALL, rope_base=1e5))


@pytest.mark.parametrize(
    ("cfg", "key"),
    [
        (ModelConfig(family="llama", init="random"), "model.size"),
        (ModelConfig(family="llama", init="random", spec=CustomSpec(hidden_size=8)), "model.size"),
        (ModelConfig(path="x", spec=CustomSpec(hidden_size=8)), "model.spec"),
        (ModelConfig(family="llama", spec=CustomSpec(**SMALL)), "model.init"),
    ],
)
def test_section_checks_itself(cfg, key):
    """Half a model, numbers beside a folder that has its own, weights that don't exist: a problem under its key."""
    assert [problem.key for problem in cfg.check()] == [key]
    assert not list(ModelConfig(family="llama", init="random", spec=CustomSpec(**SMALL)).check())
    assert [p.key for p in CustomSpec(num_layers=0, tie_embeddings=False).check()] == ["model.spec.num_layers"]
