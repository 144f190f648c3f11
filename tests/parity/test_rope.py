"""Rotary angles against transformers' ROPE_INIT_FUNCTIONS, near and far: bug class "RoPE scaling ignored"."""

import json
import math

import pytest
import torch

from torchft.models.build import read_config, spec_from_config
from torchft.models.hf_config import HfConfig
from torchft.models.hf_rope import KINDS, read_rope
from torchft.models.layers.rope import Rope, rotate
from torchft.models.spec import RopeScaling, RopeSpec, rotary_dim

transformers = pytest.importorskip("transformers")
HEAD_DIM, LENGTH = 96, 4096
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
FACTORS = {"short_factor": [1 + i / 48 for i in range(48)], "long_factor": [1.0 + 2 * i for i in range(48)]}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 1024, **FACTORS}
SECTIONS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, original length absent": {"rope_type": "yarn", "factor": 4.0},
    "yarn, other ramp": YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, whole pairs": YARN | {"truncate": False},
    "yarn, factor on cos": YARN | {"attention_factor": 1.5},
    "longrope": LONGROPE,
    "longrope, factor on cos": LONGROPE | {"attention_factor": 1.25},
}


def theirs(section: dict, length: int, base: float) -> tuple[torch.Tensor, float]:
    """transformers' inverse frequencies for a document of this length, and its factor on cos and sin."""
    config = transformers.LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        head_dim=HEAD_DIM,
        max_position_embeddings=LENGTH,
        rope_parameters=section | {"rope_theta": base},
    )
    init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[section["rope_type"]]
    return init(config, torch.device("cpu"), seq_len=length)


def of_config(section: dict, base: float) -> RopeSpec:
    read = HfConfig({"rope_theta": base, "rope_scaling": section})
    rope = read_rope(read, LENGTH, HEAD_DIM, kinds=(*KINDS, "longrope"))
    read.finish()
    return rope


@pytest.mark.parametrize("base", [1e4, 5e5])
@pytest.mark.parametrize("last", [0, 1000, 8000, 60000])
@pytest.mark.parametrize("name", SECTIONS)
def test_angles_equal_transformers(name, last, base):
    """cos and sin of the last position of a document of that length, to the bit of fp32 angles."""
    rope = Rope(of_config(SECTIONS[name], base), HEAD_DIM)
    frequencies, factor = theirs(SECTIONS[name], last + 1, base)
    angles = torch.tensor(float(last)) * frequencies
    expected = torch.cat([angles, angles])
    cos, sin = rope.table(torch.tensor([[max(0, last - 1), last]]), torch.float32)
    assert (cos[0, 1] - expected.cos() * factor).abs().max() <= 1e-6 and (sin[0, 1] - expected.sin() * factor).abs().max() <= 1e-6


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_length_is_that_of_the_own_document(name):
    """A long document beside a short one, or in the same batch, doesn't change the short one's angles, bit for bit."""
    rope = Rope(of_config(SECTIONS[name], 1e4), HEAD_DIM)
    short, long = torch.arange(50), torch.arange(6000)
    documents = torch.cat([torch.zeros(50), torch.ones(6000)]).int()[None]
    packed = rope.table(torch.cat([short, long])[None], torch.float32, documents)
    for alone, lo, hi in ((short, 0, 50), (long, 50, 6050)):
        for table, whole in zip(rope.table(alone[None], torch.float32), packed, strict=True):
            assert torch.equal(table[0], whole[0, lo:hi])
    assert not torch.equal(packed[0][0, :50], packed[0][0, 50:100])


def test_partial_rotation():
    """A quarter that doesn't turn: the frequencies are those of the smaller dimension, and the rest of a head is left as it is."""
    spec = RopeSpec(1e4, partial=0.75)
    assert rotary_dim(spec, 16) == 12
    table, x = Rope(spec, 16).table(torch.tensor([[5]]), torch.float64), torch.randn(1, 2, 1, 16, dtype=torch.float64)
    y = rotate(x, table)
    assert torch.equal(y[..., 12:], x[..., 12:])
    plain = rotate(x[..., :12], Rope(RopeSpec(1e4), 12).table(torch.tensor([[5]]), torch.float64))
    assert torch.equal(y[..., :12], plain) and not torch.equal(plain, x[..., :12])


def test_factor_on_scores_by_the_papers():
    """YaRN: 0.1 ln s + 1; LongRoPE: sqrt(1 + ln s / ln L)."""
    yarn = Rope(RopeSpec(1e4, RopeScaling("yarn", 4.0, original_max_seq_len=1024)), 8)
    longrope = RopeScaling("longrope", 32.0, original_max_seq_len=4096, short_factors=(1.0,) * 4, long_factors=(2.0,) * 4)
    assert yarn.factor == pytest.approx(0.1 * math.log(4) + 1)
    assert Rope(RopeSpec(1e4, longrope), 8).factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


def test_phi3_reads_the_lengths_where_it_has_them(tmp_path):
    """original_max_position_embeddings beside the section; Phi-3's first name of longrope; the angles of transformers' own model."""
    shape = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    factors = {"short_factor": [1.0 + i for i in range(8)], "long_factor": [3.0 + i for i in range(8)]}
    config = shape | {"model_type": "phi3", "max_position_embeddings": 4096, "original_max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_scaling": {"type": "longrope", **factors}}))
    rope = read_config(tmp_path)[0].rope["default"]
    assert rope == spec_from_config(config | {"rope_scaling": {"type": "su", **factors}}, where="x").rope["default"]
    assert (rope.scaling.factor, rope.scaling.original_max_seq_len) == (64.0, 64)
    hf = transformers.AutoConfig.from_pretrained(tmp_path)
    for last in (30, 3000):
        frequencies, factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["longrope"](hf, torch.device("cpu"), seq_len=last + 1)
        cos, _ = Rope(rope, 16).table(torch.tensor([[last]]), torch.float32)
        assert (cos[0, 0, :8] - (last * frequencies).cos() * factor).abs().max() <= 1e-6
