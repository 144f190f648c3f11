"""Generation: the KV cache changes nothing, batches change nothing, and prompts end where they should."""

from dataclasses import replace

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tests.helpers.dist import run_dist
from tests.helpers.tiny import VOCAB, relative_error, tiny_llama
from torchft.batch import Layout
from torchft.errors import ConfigError, DataError
from torchft.generate.generate import Completion, generate
from torchft.generate.sampling import SamplingConfig
from torchft.models.decoder import Decoder, build_decoder
from torchft.models.init import init_weights
from torchft.models.layers.kv_cache import KVCache
from torchft.models.spec import LayerSpec, ModelSpec

PROMPTS = [[5], [7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8], [90, 3, 44], [11, 12, 13, 14, 15], [5, 5]]


def tiny(spec: ModelSpec | None = None, dtype: torch.dtype = torch.float64) -> Decoder:
    """A random model whose continuations are lively: none of them repeats one token."""
    spec = spec or tiny_llama(num_layers=2)
    model = build_decoder(spec, device="cpu", dtype=dtype)
    init_weights(model.named_parameters(), replace(spec, init_std=0.5), seed=3)
    return model


def windowed() -> ModelSpec:
    return replace(tiny_llama(num_layers=2), layers=(LayerSpec(window=3), LayerSpec()))


@torch.no_grad()
def whole(model: Decoder, tokens: list[int]) -> torch.Tensor:
    """Logits of one sequence in one forward without a cache: (t, v)."""
    index = torch.arange(len(tokens), dtype=torch.int32)
    documents = torch.zeros(1, len(tokens), dtype=torch.int32)
    layout = Layout(documents, documents, index, index, plain_causal=True)
    return model(torch.tensor([tokens]), layout=layout, positions=index[None])[0]


def greedy(model: Decoder, prompt: list[int], n: int) -> list[int]:
    """The plainest loop: the whole sequence again for each token."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(whole(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[20], [1] * 20, [7, 1, 1, 5, 6]])
@pytest.mark.parametrize("spec", [tiny_llama(num_layers=2), windowed()], ids=["full", "window"])
def test_cache_gives_the_same_logits(spec, chunks):
    """A sequence fed through the cache in any chunks gives the logits of one forward without it (fp64)."""
    model = tiny(spec)
    tokens = torch.randint(0, VOCAB, (1, 20), generator=torch.Generator().manual_seed(0))
    cache = KVCache(spec, 1, 20, device=torch.device("cpu"), dtype=torch.float64)
    got = []
    for size in chunks:
        index = torch.arange(cache.length + size, dtype=torch.int32)
        here = index[cache.length :]
        documents = torch.zeros(1, len(index), dtype=torch.int32)
        layout = Layout(documents[:, -size:], documents, here, index, plain_causal=False)
        got.append(model(tokens[:, cache.length : len(index)], layout=layout, positions=here[None], cache=cache))
    assert relative_error(torch.cat(got, 1)[0], whole(model, tokens[0].tolist())) < 1e-12


@pytest.mark.parametrize(
    "spec", [tiny_llama(num_layers=2), tiny_llama(tied=False, num_layers=2), windowed()], ids=["tied", "untied", "window"]
)
@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_greedy_equals_the_plain_loop(spec, batch_size):
    """Batches of ragged prompts continue as the loop that recomputes everything, one prompt at a time."""
    model = tiny(spec)
    got = generate(model, PROMPTS, cfg=SamplingConfig(max_new_tokens=12), batch_size=batch_size)
    want = [greedy(model, prompt, 12) for prompt in PROMPTS]
    assert got == [Completion(tokens, "length") for tokens in want]
    assert min(len(set(tokens)) for tokens in want) > 3, "a model that repeats itself would not show a wrong position or mask"


def test_logits_of_a_padded_row(monkeypatch):
    """What a short prompt's tokens are drawn from, beside a long one, equals its logits alone (fp64)."""
    seen = []

    def spy(logits, cfg, ids, positions):
        seen.append(logits)
        return logits.argmax(-1)

    model = tiny()
    monkeypatch.setattr("torchft.generate.generate.sample", spy)
    short = generate(model, [PROMPTS[2], PROMPTS[1]], cfg=SamplingConfig(max_new_tokens=6), pad_id=50)[1].tokens
    want = whole(model, PROMPTS[1] + short)[len(PROMPTS[1]) - 1 : -1]
    assert relative_error(torch.stack([logits[1] for logits in seen]), want) < 1e-12


def test_samples_do_not_depend_on_their_batch():
    """At temperature 1 a sample's tokens are the same alone, in any order and batch size, with other padding, by its id."""
    model, cfg = tiny(), SamplingConfig(max_new_tokens=10, temperature=1.0, top_k=40, top_p=0.95, seed=1)
    ids = [30, 10, 20, 50, 40, 0]
    together = dict(zip(ids, generate(model, PROMPTS, cfg=cfg, ids=ids, batch_size=6)))
    order = [4, 0, 3, 5, 1, 2]
    for size in (1, 2, 4):
        again = generate(model, [PROMPTS[i] for i in order], cfg=cfg, ids=[ids[i] for i in order], batch_size=size, pad_id=9)
        assert dict(zip([ids[i] for i in order], again)) == together
    twice = generate(model, [PROMPTS[1]] * 2, cfg=cfg)
    assert twice[0] != twice[1], "two ids give two continuations"
    assert generate(model, [PROMPTS[1]], cfg=replace(cfg, seed=2), ids=[10])[0] != together[10], "the seed counts"


def test_a_sample_goes_on_as_it_began():
    """A sample's prompt with its first tokens, continued under its id, gives the rest of its tokens."""
    model, cfg = tiny(), SamplingConfig(max_new_tokens=10, temperature=1.0)
    whole_run = generate(model, [PROMPTS[1]], cfg=cfg)[0].tokens
    rest = generate(model, [PROMPTS[1] + whole_run[:4]], cfg=replace(cfg, max_new_tokens=6))[0].tokens
    assert rest == whole_run[4:]


def test_stop_tokens():
    """A row ends before its stop token and the others go on as if nothing had been; the reasons are told apart."""
    model, cfg = tiny(), SamplingConfig(max_new_tokens=12)
    free = [greedy(model, prompt, 12) for prompt in PROMPTS]
    stop = {free[0][2], free[1][0], free[2][5], free[3][11]}
    got = generate(model, PROMPTS, cfg=cfg, stop_ids=stop, batch_size=6)
    for tokens, completion in zip(free, got):
        cut = next((i for i, token in enumerate(tokens) if token in stop), None)
        assert completion == Completion(tokens[:cut], "length" if cut is None else "stop")
    assert got[1].tokens == [] and {c.finish for c in got} == {"stop", "length"}


def test_the_model_s_length_ends_a_sample():
    """Prompt and new tokens never exceed max_seq_len; a shorter prompt in the batch goes on."""
    spec = replace(tiny_llama(num_layers=2), max_seq_len=10)
    model = tiny(spec)
    got = generate(model, [PROMPTS[2], PROMPTS[0]], cfg=SamplingConfig(max_new_tokens=50))
    assert [(len(c.tokens), c.finish) for c in got] == [(2, "length"), (9, "length")]
    assert got[1].tokens == greedy(model, PROMPTS[0], 9)


def test_the_model_is_left_as_it_was():
    """Eval mode inside and each module's own mode afterwards, also after an error; no gradient is recorded."""
    model = tiny()
    model.train()
    model.layers["1"].eval()
    before = {name: module.training for name, module in model.named_modules()}
    seen = []
    hook = model.norm.register_forward_hook(lambda module, inputs, out: seen.append((module.training, out.requires_grad)))
    generate(model, PROMPTS, cfg=SamplingConfig(max_new_tokens=2))
    hook.remove()
    assert set(seen) == {(False, False)}
    assert {name: module.training for name, module in model.named_modules()} == before
    failing = model.norm.register_forward_hook(lambda module, inputs, out: out * float("nan"))
    with pytest.raises(Exception, match="NaN"):
        generate(model, PROMPTS, cfg=SamplingConfig(max_new_tokens=2))
    failing.remove()
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.parametrize(
    "prompt, message",
    [([], "no token"), ([1] * 128, "max_seq_len=128"), ([3, VOCAB], f"token {VOCAB}"), ([-1], "token -1")],
)
def test_impossible_prompts(prompt, message):
    """The error names the prompt and says what is wrong with it, before anything is computed."""
    with pytest.raises(DataError, match=message) as error:
        generate(tiny(), [[1], prompt], cfg=SamplingConfig())
    assert "prompt 1" in str(error.value)


def test_impossible_settings_and_no_prompts():
    """All problems of a SamplingConfig come at once; no prompts give no completions."""
    with pytest.raises(ConfigError) as error:
        generate(tiny(), [[1]], cfg=SamplingConfig(max_new_tokens=0, top_p=2.0))
    assert {problem.key for problem in error.value.problems} == {"sampling.max_new_tokens", "sampling.top_p"}
    assert generate(tiny(), [], cfg=SamplingConfig()) == []


def test_bf16_model():
    """A bf16 model generates with a bf16 cache."""
    got = generate(tiny(dtype=torch.bfloat16), PROMPTS, cfg=SamplingConfig(max_new_tokens=4))
    assert [len(c.tokens) for c in got] == [4] * 6


def _sharded() -> list[Completion]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = tiny(dtype=torch.float32)
    for block in model.layers.values():
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return generate(model, PROMPTS, cfg=SamplingConfig(max_new_tokens=6), dtype=torch.bfloat16)


def test_sharded_mixed_precision_model():
    """fp32 weights sharded over two ranks and computed in bf16 generate what the bf16 model generates, on both ranks."""
    want = generate(tiny(dtype=torch.float32).to(torch.bfloat16), PROMPTS, cfg=SamplingConfig(max_new_tokens=6))
    assert run_dist(_sharded, 2) == [want, want]


def test_equals_transformers(tmp_path):
    """Greedy ids of a random tiny llama equal `generate` of transformers, ragged prompts in one batch and with a stop token."""
    transformers = pytest.importorskip("transformers")
    from torchft.checkpoint.hf import load_hf
    from torchft.models.build import read_config

    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    spec, _ = read_config(tmp_path)
    model = build_decoder(spec, device="cpu", dtype=torch.float32)
    load_hf(tmp_path, spec, model.named_parameters())
    got = generate(model, PROMPTS, cfg=SamplingConfig(max_new_tokens=16))
    for prompt, completion in zip(PROMPTS, got):
        x = torch.tensor([prompt])
        want = theirs.generate(x, attention_mask=torch.ones_like(x), do_sample=False, max_new_tokens=16)[0, len(prompt) :]
        assert completion.tokens == want.tolist()
