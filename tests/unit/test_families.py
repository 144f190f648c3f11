"""Every family's config.json is read strictly; sizes are the published ones; what HF stores joined is found, and only that."""

import math

import pytest
import torch

from tests.helpers.families import config_of, tiny_spec
from torchft.checkpoint.fused import join, joined_bytes, part_of
from torchft.checkpoint.hf import weight_shapes
from torchft.checkpoint.tensor_files import LazyTensor
from torchft.errors import ConfigError
from torchft.metrics.flops import matmul_parameters
from torchft.models.build import FAMILIES, spec_from_config
from torchft.models.decoder import build_decoder
from torchft.models.init import init_weights
from torchft.models.keys import Stored, hf_name, map_from_hf, stored_as

PARAMETERS = {  # as published; of gemma3 from 4b on the text part
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
    "gemma3-12b": 11_766_034_176,
    "gemma3-27b": 27_009_346_304,
    "phi3-mini-4k": 3_821_079_552,
    "phi3-medium-4k": 13_960_238_080,
    "phi4-14b": 14_659_507_200,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}
SIZES = [(family, size) for family, module in FAMILIES.items() if family != "llama" for size in module.SIZES]


@pytest.mark.parametrize("family, size", SIZES)
def test_sizes_have_the_published_number_of_parameters(family, size):
    """And each survives the way through config.json and has one HF name for every weight."""
    module, spec = FAMILIES[family], FAMILIES[family].SIZES[size]
    shapes = weight_shapes(spec)
    assert sum(map(math.prod, shapes.values())) == PARAMETERS[size]
    assert module.from_hf(module.to_hf(spec)) == spec
    keys = map_from_hf(module.KEYS, dict.fromkeys(hf_name(module.KEYS, name) for name in shapes), shapes, where=size)
    assert keys.stored == {name: stored_as(module.KEYS, name) for name in shapes} and not keys.missing and not keys.dropped


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "qwen3"])
def test_flops_count_the_matrices_of_the_model(name):
    """Every matrix but the embeddings, and the head once more where it is tied."""
    spec = tiny_spec(name)
    matrices = sum(math.prod(s) for key, s in weight_shapes(spec).items() if len(s) == 2 and not key.startswith("embed"))
    tied = spec.vocab_size * spec.hidden_size if spec.tie_embeddings else 0
    assert matmul_parameters(spec) == matrices + tied


def problem_of(name: str, change: dict) -> str:
    with pytest.raises(ConfigError) as error:
        spec_from_config(config_of(name) | change, where="config.json")
    return str(error.value)


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("mistral", {"slidng_window": 4}, "did you mean sliding_window"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"layer_types": ["full_attention"]}, "a list of 4"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "use_sliding_window"),
        ("qwen2", {"num_experts": 8}, "num_experts"),
        ("qwen3", {"num_key_value_heads": 3}, "a divisor of num_attention_heads=4"),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_quick": 1}}, "rope_scaling.beta_quick"),
        ("gemma", {"hidden_act": "relu"}, "hidden_act"),
        ("gemma", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"vision_config": {}}, "vision_config"),
        ("gemma3", {"rope_parameters": {"global": {"rope_theta": 1.0}}, "rope_scaling": None}, "rope_parameters.global"),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling.type"),
        ("phi3 longrope partial", {"partial_rotary_factor": 0.5}, "a list of 4 numbers"),
        ("phi3 longrope partial", {"partial_rotary_factor": 0.7}, "even number"),
        ("phi3 longrope partial", {"original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        ("phi3", {"attention_bias": True}, "attention_bias"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"activation_function": "relu"}, "activation_function"),
        ("gpt2", {"n_head": 5}, "a divisor of n_embd=64"),
        ("gpt2", {"hidden_size": 5}, "hidden_size"),
    ],
)
def test_what_can_not_be_run_is_refused_by_name(name, change, words):
    """A part that is not built here is an error that names its key."""
    text = problem_of(name, change)
    assert words in text and "fix:" in text and "config.json" in text


CHANGES = {  # keys beyond the common ones, with another value
    "mistral": {"sliding_window": 10, "head_dim": 32, "rope_theta": 5.0},
    "qwen2 window": {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 3},
    "qwen3": {"attention_bias": True, "head_dim": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "gemma": {"attention_bias": True, "head_dim": 16, "tie_word_embeddings": False},
    "gemma2": {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": 9.0,
        "query_pre_attn_scalar": 5,
        "sliding_window": 8,
        "layer_types": ["full_attention"] * 4,
    },
    "gemma3": {
        "sliding_window_pattern": 2,
        "rope_theta": 5.0,
        "rope_local_base_freq": 6.0,
        "rope_scaling": None,
        "sliding_window": 8,
        "query_pre_attn_scalar": 5,
        "final_logit_softcapping": 9.0,
    },
    "phi3 longrope partial": {"original_max_position_embeddings": 16, "rope_theta": 5.0, "sliding_window": 8},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 8, "n_positions": 64, "n_inner": 8, "layer_norm_epsilon": 0.1, "vocab_size": 95},
}
COMMON = {"vocab_size": 95, "hidden_size": 128, "intermediate_size": 95, "num_hidden_layers": 3, "num_attention_heads": 8}
COMMON |= {"num_key_value_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.5, "rms_norm_eps": 0.1}


@pytest.mark.parametrize("name", CHANGES)
def test_every_key_that_is_read_changes_the_spec(name):
    """No key is read and then forgotten."""
    config = config_of(name)
    changes = CHANGES[name] | (COMMON if "hidden_size" in config else {})
    if "long_factor" in str(config):
        changes = {key: value for key, value in changes.items() if key not in ("hidden_size", "num_attention_heads")}  # other factors then
    specs = [spec_from_config(config | {key: value}, where="x") for key, value in changes.items()]
    assert len(set(map(repr, [spec_from_config(config, where="x"), *specs]))) == len(changes) + 1


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "qwen3"])
def test_norms_begin_as_the_identity(name):
    """A weight of 0 where the norm multiplies by 1 + weight, else 1; biases 0."""
    spec = tiny_spec(name)
    model = build_decoder(spec, device="cpu")
    init_weights(model.named_parameters(), spec, 0)
    vectors = {key: p for key, p in model.named_parameters() if p.ndim == 1}
    for key, p in vectors.items():
        assert (p == (0.0 if spec.norm.unit_offset or key.endswith(".bias") else 1.0)).all(), key


def test_score_and_value_heads_have_hf_names():
    """A reward model's and a critic's head, in every family that exports."""
    for family in ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "llama", "gpt2"):
        assert [hf_name(FAMILIES[family].KEYS, f"{name}.weight") for name in ("score", "value")] == ["score.weight", "value.weight"]


def lazy(x: torch.Tensor) -> LazyTensor:
    return LazyTensor(tuple(x.shape), x.dtype, lambda part: x[part or ...])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ndim", [1, 2])
def test_parts_of_a_joined_tensor(transposed, ndim):
    """Whole and by slices, each part is its own rows; joining them again gives the tensor, its bytes as planned."""
    shapes = {"q": (6, 5)[:ndim], "k": (2, 5)[:ndim], "v": (4, 5)[:ndim]}
    ours = {name: torch.randn(shape) for name, shape in shapes.items()}
    whole = torch.cat(list(ours.values()))
    whole = whole.t().contiguous() if transposed and ndim == 2 else whole
    stored = Stored("qkv", ("q", "k", "v"), transposed)
    for name, x in ours.items():
        part = part_of(lazy(whole), stored, name, shapes)
        assert part.shape == tuple(x.shape) and torch.equal(part.read(()), x) and torch.equal(part.read((slice(1, 2),)), x[1:2])
        assert ndim == 1 or torch.equal(part.read((slice(0, 2), slice(1, 4))), x[:2, 1:4])
    back = dict(join([stored] * 3, list(ours), list(ours.values())))
    assert back.keys() == {"qkv"} and torch.equal(back["qkv"], whole)
    assert joined_bytes([stored] * 3, list(shapes.values()), [torch.float32] * 3) == {"qkv": whole.nbytes}


def test_a_joined_tensor_of_another_size_shows_its_shape():
    """So that the check of shapes reports it, and nobody reads a wrong slice."""
    part = part_of(lazy(torch.zeros(13, 5)), Stored("qkv", ("q", "k")), "k", {"q": (6, 5), "k": (2, 5)})
    assert part.shape == (13, 5)


def test_joined_tensors_come_as_they_are_complete():
    """Members of two tensors mixed, as q.weight, q.bias, k.weight, k.bias come: the order is that of the plan."""
    weight, bias = Stored("c.weight", ("q.weight", "k.weight")), Stored("c.bias", ("q.bias", "k.bias"))
    stored, names = [weight, bias, weight, bias], ["q.weight", "q.bias", "k.weight", "k.bias"]
    tensors = [torch.ones(2, 3), torch.ones(2), torch.ones(1, 3), torch.ones(1)]
    plan = joined_bytes(stored, [tuple(x.shape) for x in tensors], [x.dtype for x in tensors])
    assert plan == {"c.weight": 36, "c.bias": 12}
    assert [(name, tuple(x.shape)) for name, x in join(stored, names, tensors)] == [("c.weight", (3, 3)), ("c.bias", (3,))]


def test_first_gpt2_files_are_read():
    """Names without `transformer.`, and the causal mask as a buffer."""
    spec = tiny_spec("gpt2")
    shapes, rules = weight_shapes(spec), FAMILIES["gpt2"].KEYS
    theirs = dict.fromkeys(hf_name(rules, name).removeprefix("transformer.") for name in shapes)
    keys = map_from_hf(rules, [*theirs, "h.0.attn.bias", "lm_head.weight"], shapes, where="x")
    assert keys.dropped == ("h.0.attn.bias",) and not keys.missing and keys.tied_copy == "lm_head.weight"
    at = keys.stored["layers.0.self_attn.k_proj.weight"]
    assert (at.name, at.members[1], at.transposed) == ("h.0.attn.c_attn.weight", "layers.0.self_attn.k_proj.weight", True)
