"""config.json is read strictly and as data; sizes are the published ones."""

import json
import math
import sys

import pytest

from torchft.checkpoint.hf import weight_shapes
from torchft.errors import ConfigError
from torchft.models.build import read_config, spec_from_config, spec_of_size
from torchft.models.families import llama
from torchft.models.spec import RopeScaling

GOOD = {"model_type": "llama", "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
GOOD |= {"num_attention_heads": 4, "architectures": ["LlamaForCausalLM"]}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
PARAMETERS = {  # as published
    "llama1-7b": 6_738_415_616,
    "llama1-13b": 13_015_864_320,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.3-70b": 70_553_706_496,
    "yi-6b": 6_061_035_520,
    "yi-34b": 34_388_917_248,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def problem_of(config: dict) -> str:
    with pytest.raises(ConfigError) as error:
        spec_from_config(config, where="config.json")
    return str(error.value)


@pytest.mark.parametrize("size", llama.SIZES)
def test_sizes_have_the_published_number_of_parameters(size):
    """And each survives the way through config.json."""
    spec = spec_of_size("llama", size)
    assert sum(map(math.prod, weight_shapes(spec).values())) == PARAMETERS[size]
    assert llama.from_hf(llama.to_hf(spec)) == spec


def test_absent_keys_take_the_defaults_of_llama():
    """Llama 1 and 2 files name neither rope_theta nor tie_word_embeddings nor head_dim."""
    spec = spec_from_config(GOOD, where="x")
    assert (spec.rope["default"].base, spec.rope["default"].scaling, spec.tie_embeddings) == (10000.0, None, False)
    assert (spec.attention.num_kv_heads, spec.attention.head_dim, spec.max_seq_len) == (4, 16, 2048)
    assert spec_from_config(GOOD | {"max_sequence_length": 512}, where="x").max_seq_len == 512


def test_every_key_that_is_read_changes_the_spec():
    """No key is read and then forgotten."""
    changes = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 95, "num_hidden_layers": 3, "num_attention_heads": 8}
    changes |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 99, "initializer_range": 0.5, "rms_norm_eps": 0.1}
    changes |= {"tie_word_embeddings": True, "rope_theta": 5.0, "rope_scaling": LLAMA3, "attention_bias": True, "mlp_bias": True}
    changes |= {"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}
    specs = [spec_from_config(GOOD | {key: value}, where="x") for key, value in changes.items()]
    assert len(set(map(repr, [spec_from_config(GOOD, where="x"), *specs]))) == len(changes) + 1


@pytest.mark.parametrize("key", sorted(LLAMA3.keys() - {"rope_type"}))
def test_every_key_of_llama3_scaling_matters_and_is_required(key):
    """A dropped scaling key is the class of bug that nobody sees at short lengths."""
    one, other = (spec_from_config(GOOD | {"rope_scaling": LLAMA3 | {key: LLAMA3[key] * f}}, where="x") for f in (1, 2))
    assert one.rope["default"].scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192) != other.rope["default"].scaling
    without = {k: v for k, v in LLAMA3.items() if k != key}
    assert f"rope_scaling.{key}" in problem_of(GOOD | {"rope_scaling": without})


@pytest.mark.parametrize(
    "change, words",
    [
        ({"sliding_windw": 4}, "sliding_windw (config.json)"),
        ({"num_kv_heads": 2}, "num_kv_heads"),
        ({"rope_thetaa": 1e4}, "did you mean rope_theta?"),
        ({"quantization_config": {"bits": 4}}, "unquantised"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "rope_scaling.type"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 1.0}}, "rope_scaling.mscale"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, "rope_scaling.beta"),
        ({"rope_scaling": {"rope_type": "linear", "type": "llama3", "factor": 2.0}}, "must agree"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ({"rope_scaling": [1]}, "an object"),
        ({"rope_scaling": LLAMA3, "rope_parameters": LLAMA3}, "either rope_scaling or rope_parameters"),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, "rope_parameters.rope_theta=6.0"),
        ({"rope_parameters": {"rope_theta": 6.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "more than low_freq_factor"),
        ({"hidden_act": "gelu"}, "'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"num_key_value_heads": 3}, "a divisor of num_attention_heads=4"),
        ({"hidden_size": 66}, "head_dim"),
        ({"head_dim": 15}, "head_dim"),
        ({"vocab_size": "97"}, "given:    '97'"),
        ({"vocab_size": True}, "given:    True"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"architectures": ["LlamaForQuestionAnswering"]}, "architectures"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"model_type": "lama"}, "did you mean llama?"),
        ({"model_type": ["llama"]}, "one of"),
    ],
)
def test_what_can_not_be_run_is_refused_by_name(change, words):
    """Each problem names its key, what was given and what to do."""
    text = problem_of(GOOD | change)
    assert words in text and "fix:" in text and "config.json" in text


def test_all_problems_at_once():
    """Three mistakes, three problems."""
    with pytest.raises(ConfigError) as error:
        spec_from_config({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 5, "foo": 1}, where="x")
    assert [p.key for p in error.value.problems] == ["intermediate_size", "num_hidden_layers", "foo"]


def test_harmless_keys_of_real_files_are_accepted():
    """What transformers 3 to 5, SmolLM2 and Yi write beside the model."""
    more = {"_name_or_path": "x", "auto_map": {"AutoModel": "evil.Model"}, "bos_token_id": 1, "torch_dtype": "bfloat16", "dtype": "float32"}
    more |= {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {}, "use_cache": True, "pretraining_tp": 1}
    more |= {"id2label": {"0": "A"}, "return_dict": True, "is_encoder_decoder": False, "pruned_heads": {}, "rope_scaling": None}
    more |= {"_attn_implementation_internal": "hub/code", "head_dim": None, "num_key_value_heads": None, "transformers_version": "4.1"}
    assert spec_from_config(GOOD | more, where="x") == spec_from_config(GOOD, where="x")
    yi = {"model_type": "Yi", "architectures": ["YiForCausalLM"]}
    assert spec_from_config(GOOD | yi, where="x") == spec_from_config(GOOD, where="x")


def test_a_config_that_names_code_imports_nothing(tmp_path, monkeypatch):
    """`auto_map` with the file beside it: not a line of it runs."""
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    (tmp_path / "config.json").write_text(
        json.dumps(GOOD | {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}})
    )
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    read_config(tmp_path)
    assert "evil" not in sys.modules and set(sys.modules) == before


@pytest.mark.parametrize(
    "content, words",
    [
        (b"{\n  'a': 1}", "config.json:2:3"),
        (b"[1]", "a JSON object"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "nested"),
        (b" " * (2 << 20), "at most"),
        (b"", "config.json:1:1"),
    ],
)
def test_broken_files_are_told_with_their_place(tmp_path, content, words):
    """File, line and column; no traceback, no endless reading."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        read_config(tmp_path)


def test_folders_that_are_none(tmp_path):
    """A missing folder, one without config.json, a .gguf file, a size and a family with a typo."""
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    for path, words in [("smolm2", "did you mean smollm2"), ("smollm2", "config.json"), ("x.gguf", "convert_checkpoint.py")]:
        with pytest.raises(ConfigError, match=words):
            read_config(tmp_path / path)
    with pytest.raises(ConfigError, match=r"did you mean llama3.1-8b"):
        spec_of_size("llama", "llama31-8b")
    with pytest.raises(ConfigError, match="did you mean llama"):
        spec_of_size("lama", "llama3.1-8b")
