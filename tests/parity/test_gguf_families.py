"""GGUF in: transformers' own random models, written with llama.cpp's package and its names, read here and by transformers."""

from pathlib import Path

import pytest
import torch

from tests.helpers.gguf_files import pairs
from tests.helpers.tiny import relative_error
from torchft.batch import Layout
from torchft.checkpoint.gguf import GgufFile
from torchft.checkpoint.hf import copy_weights
from torchft.models.decoder import build_decoder

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")
T = 40

BASE = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
BASE |= {
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 9, "tie_word_embeddings": True}
FAMILIES = {  # GGUF's architecture: transformers' config, model and numbers; what transformers does not read from GGUF is its default
    "llama": ("LlamaConfig", "LlamaForCausalLM", BASE | {"head_dim": 32}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", BASE),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", BASE | {"head_dim": 128, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", BASE | GEMMA),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", BASE | GEMMA | {"num_hidden_layers": 7}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", BASE | {"pad_token_id": 0}),
}


def random_model(name: str):
    """Biases and norms away from 0 and 1, each its own: two norms taken for each other show."""
    config, model, changes = FAMILIES[name]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**changes))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return made.eval()


def write(path: Path, name: str, model) -> None:
    """As llama.cpp's converter: its names of tensors, pairs of rows in llama's q and k, 1 + weight in Gemma's norms."""
    config = model.config
    writer = gguf.GGUFWriter(path, name)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = {"context_length": config.max_position_embeddings, "embedding_length": config.hidden_size, "vocab_size": config.vocab_size}
    numbers |= {"block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size}
    numbers |= {"attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads}
    numbers |= {"attention.key_length": head_dim, "attention.value_length": head_dim, "rope.dimension_count": head_dim}
    if name.startswith("gemma"):
        numbers["attention.sliding_window"] = config.sliding_window
    for key, number in numbers.items():
        writer.add_uint32(f"{name}.{key}", number)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_float32(f"{name}.rope.freq_base", rope["rope_theta"])
    writer.add_float32(f"{name}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_pad_token_id(0)
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for key, parameter in model.named_parameters():
        stem, kind = key.rsplit(".", 1)
        value = parameter.detach()
        if name == "llama" and stem.endswith(("q_proj", "k_proj")):
            value = pairs(value, config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads)
        if name.startswith("gemma") and stem.endswith("norm"):
            value = value + 1
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_logits(tmp_path, name):
    """Logits from the file equal those of the model it was made of, and of transformers(gguf_file=), to 1e-5."""
    original = random_model(name)
    write(tmp_path / "m.gguf", name, original)
    file = GgufFile(tmp_path / "m.gguf")
    model = build_decoder(file.spec, device="cpu")
    copy_weights(model.named_parameters(), file.weights().tensors)
    tokens, index = torch.randint(0, 96, (2, T)), torch.arange(T, dtype=torch.int32)
    documents = torch.zeros(2, T, dtype=torch.int32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    with torch.no_grad():
        got = model(tokens, layout=Layout(documents, documents, index, index, plain_causal=True), positions=index.expand(2, T))
        for other in (original, theirs.eval()):
            assert relative_error(got, other(tokens).logits) <= 1e-5
