"""Options of generation: chunked prefill, several samples, stop texts, penalties, streaming; windows with ragged prompts."""

from dataclasses import replace

import pytest
import torch

from tests.helpers.tiny import relative_error, tiny_llama
from tests.helpers.tokenizers import make_hf_tokenizer
from tests.unit.test_generate import PROMPTS, greedy, tiny, windowed
from torchft.errors import ConfigError
from torchft.generate.generate import generate, stream
from torchft.generate.sampling import SamplingConfig
from torchft.models.spec import HeadSpec
from torchft.tokenizers.load import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_hf_tokenizer(tmp_path_factory.mktemp("tok")))


@pytest.fixture(scope="module")
def talker(tokenizer):
    """A random model over the tokenizer's vocabulary."""
    size = tokenizer.vocab_size
    return tiny(replace(tiny_llama(num_layers=2), vocab_size=size, heads={"lm": HeadSpec(size)}))


@pytest.mark.parametrize("spec", [tiny_llama(num_layers=2), windowed()], ids=["full", "window"])
@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_chunked_prefill_gives_the_same_logits(spec, chunk, monkeypatch):
    """First logits of ragged prompts fed in chunks equal those fed at once (fp64), and so do the continuations."""
    seen = []

    def spy(logits, cfg, ids, positions):
        seen.append(logits)
        return logits.argmax(-1)

    monkeypatch.setattr("torchft.generate.generate.sample", spy)
    model, cfg = tiny(spec), SamplingConfig(max_new_tokens=5)
    want = generate(model, PROMPTS, cfg=cfg)
    whole, seen = seen[0], []
    assert generate(model, PROMPTS, cfg=replace(cfg, prefill_chunk=chunk)) == want
    assert relative_error(seen[0], whole) < 1e-12


def test_windows_take_ragged_batches_at_once(monkeypatch):
    """A model with sliding windows takes all lengths in one batch (the continuations are held in test_generate)."""
    sizes = []

    def spy(logits, cfg, ids, positions):
        sizes.append(len(logits))
        return logits.argmax(-1)

    monkeypatch.setattr("torchft.generate.generate.sample", spy)
    model = tiny(windowed())
    got = generate(model, PROMPTS, cfg=SamplingConfig(max_new_tokens=3), batch_size=6)
    assert sizes == [6, 6, 6] and [c.tokens for c in got] == [greedy(model, p, 3) for p in PROMPTS]


def test_samples_of_a_prompt():
    """n samples a prompt stand side by side, differ, begin with the single one, and do not depend on the batch size."""
    model, cfg = tiny(), SamplingConfig(max_new_tokens=8, temperature=1.0, seed=2)
    single = generate(model, PROMPTS, cfg=cfg)
    cfg = replace(cfg, num_samples=3)
    together = generate(model, PROMPTS, cfg=cfg, batch_size=18)
    assert together[::3] == single
    assert all(len({tuple(c.tokens) for c in together[3 * i : 3 * i + 3]}) == 3 for i in range(6))
    for size in (1, 2, 4):
        assert generate(model, PROMPTS, cfg=cfg, batch_size=size) == together
    assert generate(model, PROMPTS[2:3], cfg=cfg, ids=[2]) == together[6:9]


def test_stop_text_across_tokens(talker, tokenizer):
    """A stop text that begins and ends inside tokens ends the sample; its text stands before it, and other rows go on unchanged."""
    prompts = [tokenizer.encode(text) for text in ("The red boat", "Nobody asks", "12 apples")]
    cfg = SamplingConfig(max_new_tokens=24)
    free = generate(talker, prompts, cfg=cfg, tokenizer=tokenizer)
    text, others = free[0].text, free[1].text + free[2].text
    ends = {len(tokenizer.decode(free[0].tokens[:n])) for n in range(1, 24)}
    stops = [(i, text[i : i + 3]) for i in range(3, len(text) - 3) if {i + 1, i + 2} & ends and i not in ends]  # inside, over an edge
    cut, stop = next((i, stop) for i, stop in stops if stop not in others and text.find(stop) == i)
    got = generate(talker, prompts, cfg=replace(cfg, stop=[stop]), tokenizer=tokenizer, batch_size=3)
    assert (got[0].text, got[0].finish) == (text[:cut], "stop")
    assert len(got[0].tokens) < 24 and got[1:] == free[1:]


def test_stop_ids_of_the_config():
    """sampling.stop_ids end a sample as stop_ids do; an id outside the vocabulary is an error."""
    model = tiny()
    free = greedy(model, PROMPTS[0], 8)
    got = generate(model, PROMPTS[:1], cfg=SamplingConfig(max_new_tokens=8, stop_ids=[free[4]]))
    assert got[0].tokens == free[: free.index(free[4])] and got[0].finish == "stop"
    with pytest.raises(ConfigError, match="sampling.stop_ids"):
        generate(model, PROMPTS[:1], cfg=SamplingConfig(stop_ids=[10**6]))


def test_penalties_equal_transformers(tmp_path):
    """Greedy ids with a repetition penalty equal `generate` of transformers, ragged prompts in one batch."""
    transformers = pytest.importorskip("transformers")
    from torchft.checkpoint.hf import load_hf
    from torchft.models.build import read_config
    from torchft.models.decoder import build_decoder

    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, initializer_range=0.2, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    spec, _ = read_config(tmp_path)
    model = build_decoder(spec, device="cpu")
    load_hf(tmp_path, spec, model.named_parameters())
    got = generate(model, PROMPTS, cfg=SamplingConfig(max_new_tokens=16, repetition_penalty=1.4))
    plain = generate(model, PROMPTS, cfg=SamplingConfig(max_new_tokens=16))
    for prompt, completion in zip(PROMPTS, got):
        x = torch.tensor([prompt])
        want = theirs.generate(x, attention_mask=torch.ones_like(x), do_sample=False, max_new_tokens=16, repetition_penalty=1.4)
        assert completion.tokens == want[0, len(prompt) :].tolist()
    assert got != plain, "the penalty changed nothing, so it was not tested"


@pytest.mark.parametrize("number", [0, 2])
def test_stream_equals_generate(talker, tokenizer, number):
    """Streamed pieces joined are the text of the same sample from `generate`, stop text included; the model is left as it was."""
    prompt = tokenizer.encode("A teacher")
    cfg = SamplingConfig(max_new_tokens=20, temperature=1.0, num_samples=3)
    want = generate(talker, [prompt], cfg=cfg, ids=[5], tokenizer=tokenizer)[number]
    talker.train()
    pieces = list(stream(talker, prompt, cfg=cfg, tokenizer=tokenizer, id=5, number=number))
    assert "".join(pieces) == want.text and len(pieces) > 5 and talker.training
    stop = want.text[4:7]
    cut = "".join(stream(talker, prompt, cfg=replace(cfg, stop=[stop]), tokenizer=tokenizer, id=5, number=number))
    assert cut == want.text[: want.text.find(stop)]
    started = stream(talker, prompt, cfg=cfg, tokenizer=tokenizer)
    next(started)
    assert torch.is_grad_enabled()
    started.close()
    assert talker.training
