"""SmolLM2-135M-Instruct, converted from its GGUF file, against transformers reading the same file. Skips where the file isn't cached."""

from pathlib import Path

import pytest
import torch

from tests.parity.test_llama import run
from torchft.checkpoint.hf import load_hf
from torchft.cli.main import main
from torchft.models.build import read_config, spec_of_size
from torchft.models.decoder import build_decoder

transformers = pytest.importorskip("transformers")

GGUF = Path.home() / ".cache" / "torchft" / "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = ["What is the capital of France?", "Write a haiku about the sea.", "Count from 12 to 15."]
TEXTS = [
    "The capital of France is Paris.",
    "I have 1234 apples, 3.14 pies & 2024's",
    "def f(x):\n    return x**2  # \u00fc \u4f60\u597d \U0001f642",
]
TEXTS += ["  two  spaces\n\n\nand\ttabs  ", "don't I'll WE'RE\r\n \r\n x", "<|im_start|>user\nhi<|im_end|>\n"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not GGUF.is_file(), reason=f"{GGUF} is not there: real weights are not checked")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The converted folder, in fp32."""
    path = tmp_path_factory.mktemp("smollm2") / "hf"
    assert main(["convert", str(GGUF), str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def reference():
    """transformers' own reading of the GGUF file: model and tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(GGUF.parent, gguf_file=GGUF.name)


def test_the_spec_is_the_published_one(folder):
    """But for the init, which a GGUF file does not hold."""
    spec, config = read_config(folder)
    published = spec_of_size("llama", "smollm2-135m")
    assert {**vars(spec), "init_std": None} == {**vars(published), "init_std": None}
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)


def test_tokenizer_ids_and_template(folder, reference):
    """Ids equal transformers' conversion, which forgets SmolLM2's split of single digits: only spaces before a digit may differ."""
    mine, theirs = transformers.AutoTokenizer.from_pretrained(folder), reference[1]
    assert [mine.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    assert [mine.decode(mine.encode(text)) for text in TEXTS] == TEXTS
    messages = [{"role": "user", "content": "hi"}]
    texts = [tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for tokenizer in (mine, theirs)]
    assert texts[0] == texts[1] and texts[0].startswith("<|im_start|>system\n")
    assert mine.tokenize("  12") == ["\u0120\u0120", "1", "2"]
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    assert [getattr(mine, name) for name in names] == [getattr(theirs, name) for name in names]


@torch.no_grad()
def test_logits_and_greedy_ids(folder, reference):
    """max |difference of logits| <= 2e-4, 16 greedy tokens equal on three prompts; transformers opens the folder with equal logits."""
    theirs, tokenizer = reference
    spec, _ = read_config(folder)
    mine = build_decoder(spec, device="cpu")
    load_hf(folder, spec, mine.named_parameters())
    exported = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
        whole = theirs.generate(ids, do_sample=False, max_new_tokens=16)
        expected, got = theirs(whole).logits, run(mine, whole)
        assert (got - expected).abs().max() <= 2e-4 and (exported(whole).logits - got).abs().max() <= 2e-4
        first, last = ids.shape[1] - 1, whole.shape[1] - 1
        gaps = expected[0, first:last].topk(2).values.diff().abs()[:, 0]
        same = got[0, first:last].argmax(-1) == whole[0, first + 1 :]
        assert bool((same | (gaps < 1e-4)).all())
