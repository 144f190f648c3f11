"""The decoder: documents of a pack can't see each other, stages compose, positions stay exact in bf16."""

import torch

from tests.helpers.tiny import packed_batch, relative_error, tiny_llama
from torchft.batch import Across, Layout
from torchft.losses.cross_entropy import CrossEntropy
from torchft.models.decoder import Decoder, build_decoder
from torchft.models.init import init_weights
from torchft.models.layers.rope import Rope
from torchft.models.spec import RopeScaling, RopeSpec


def tiny_model(dtype=torch.float64, **options) -> Decoder:
    spec = tiny_llama(**options)
    model = build_decoder(spec, device="cpu", dtype=dtype)
    init_weights(model.named_parameters(), spec, seed=1)
    return model


def plain_layout(t: int) -> Layout:
    documents, index = torch.zeros(1, t, dtype=torch.int32), torch.arange(t, dtype=torch.int32)
    return Layout(documents, documents, index, index, plain_causal=True)


def test_other_documents_do_not_change_a_bit():
    """Document 2 of a pack has bit-equal logits when document 1's tokens change."""
    model = tiny_model(torch.float32)
    batch = packed_batch(5)
    changed = batch.tokens.clone()
    changed[batch.documents == 0] = (changed[batch.documents == 0] + 7) % 96
    before = model(batch.tokens, layout=batch.layout(), positions=batch.positions)
    after = model(changed, layout=batch.layout(), positions=batch.positions)
    assert torch.equal(before[batch.documents > 0], after[batch.documents > 0])
    assert not torch.equal(before[batch.documents == 0], after[batch.documents == 0])


def test_packed_equals_separate():
    """Each document of a pack has the logits it has alone, and the packed loss is the sum of the separate ones."""
    model, loss, batch = tiny_model(), CrossEntropy(), packed_batch(5)
    packed = model(batch.tokens, layout=batch.layout(), positions=batch.positions)
    total = torch.zeros(())
    for row in range(2):
        for document in range(int(batch.documents[row].max()) + 1):
            here = batch.documents[row] == document
            tokens, length = batch.tokens[row][None, here], int(here.sum())
            alone = model(tokens, layout=plain_layout(length), positions=torch.arange(length)[None])
            assert relative_error(packed[row][here], alone[0]) < 1e-12
            logp = alone[0].log_softmax(-1).gather(1, batch.labels[row][here][:, None]).squeeze(1)
            total = total - (logp * batch.weights[row][here]).sum()
    out = model(
        batch.tokens,
        layout=batch.layout(),
        positions=batch.positions,
        reduce=lambda hidden, heads: loss(hidden, heads, batch, Across()).total,
    )
    assert relative_error(out[0], total) < 1e-12


def test_plain_causal_is_the_mask_of_one_padded_document():
    """collate's plain_causal rows (one document, then padding) have the logits of the dense mask, with less work."""
    model, batch = tiny_model(), packed_batch(5)
    documents, index = torch.zeros_like(batch.documents), torch.arange(32, dtype=torch.int32)
    positions = index.expand(2, 32)
    fast, dense = (
        model(batch.tokens, layout=Layout(documents, documents, index, index, flag), positions=positions) for flag in (True, False)
    )
    assert relative_error(fast, dense) < 1e-12


def test_window_hides_what_lies_further_back():
    """With a window of 4 a token's logits do not depend on tokens 4 or more places before it (one layer)."""
    layout = plain_layout(12)
    mask = layout.dense(4)[0, 0]
    assert mask.sum(-1).tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 4, 4, 4, 4]
    assert mask[11].nonzero().flatten().tolist() == [8, 9, 10, 11]


def test_stages_compose_to_the_whole():
    """Two built stages, one after the other, give the whole model's logits; names are global and disjoint but for the tied embedding."""
    whole, batch = tiny_model(), packed_batch(2)
    spec = whole.spec
    first, second = build_decoder(spec, range(0, 3), last=False, device="cpu"), build_decoder(spec, range(3, 4), first=False, device="cpu")
    for stage in (first, second):
        stage.to(torch.float64).load_state_dict({k: v for k, v in whole.state_dict().items() if k in stage.state_dict()})
    hidden = first(batch.tokens, layout=batch.layout(), positions=batch.positions)
    got = second(hidden, layout=batch.layout(), positions=batch.positions)
    assert torch.equal(got, whole(batch.tokens, layout=batch.layout(), positions=batch.positions))
    assert set(first.state_dict()) & set(second.state_dict()) == {"embed_tokens.weight"}
    assert set(first.state_dict()) | set(second.state_dict()) == set(whole.state_dict())


def test_tied_head_has_no_parameter_and_both_gradients():
    """The embedding's gradient is the sum of its two uses: as a table and as a head."""
    tied, batch = tiny_model(), packed_batch(3)
    untied = tiny_model(tied=False)
    untied.load_state_dict({**tied.state_dict(), "lm_head.weight": tied.embed_tokens.weight.detach()})
    for model in (tied, untied):
        model(batch.tokens, layout=batch.layout(), positions=batch.positions).logsumexp(-1).sum().backward()
    assert not any("lm_head" in name for name in tied.state_dict())
    want = untied.embed_tokens.weight.grad + untied.lm_head.weight.grad
    assert relative_error(tied.embed_tokens.weight.grad, want) < 1e-12


def test_rope_angles_are_exact_in_a_bf16_model():
    """Positions 256 and 257, which bf16 can't tell apart, get different tables, equal to fp64 angles within 1e-2 at 60,000."""
    rope = Rope(RopeSpec(base=500000.0), head_dim=64)
    positions = torch.tensor([[256, 257, 60000]], dtype=torch.int32)
    cos, _ = rope.table(positions, torch.bfloat16)
    assert not torch.equal(cos[0, 0], cos[0, 1])
    frequencies = 1.0 / 500000.0 ** (torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    want = (60000 * torch.cat((frequencies, frequencies))).cos()
    assert (cos[0, 2].double() - want).abs().max() < 1e-2


def test_llama3_scaling_keeps_short_waves_and_slows_long_ones():
    """Wavelengths below 8192 / 4 are kept, above 8192 / 1 slowed by exactly 8, and in between monotonously blended."""
    plain = Rope(RopeSpec(base=500000.0), 128).frequencies
    scaling = RopeScaling("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
    scaled = Rope(RopeSpec(base=500000.0, scaling=scaling), 128).frequencies
    waves = 2 * torch.pi / plain
    assert torch.equal(scaled[waves < 2048], plain[waves < 2048])
    assert torch.equal(scaled[waves > 8192], plain[waves > 8192] / 8)
    ratio = (plain / scaled)[(waves >= 2048) & (waves <= 8192)]
    assert (ratio.diff() > 0).all() and ratio.min() >= 1 and ratio.max() <= 8


def test_init_does_not_depend_on_dtype_or_stage():
    """fp32 and fp64 models, and a stage alone, start from the same numbers; a matrix larger than one block is drawn in blocks."""
    whole, narrow = tiny_model(), tiny_model(torch.float32)
    for name, p in narrow.named_parameters():
        assert torch.equal(p.double(), dict(whole.named_parameters())[name])
    stage = build_decoder(whole.spec, range(2, 4), first=False, device="cpu", dtype=torch.float64)
    init_weights(stage.named_parameters(), whole.spec, seed=1)
    assert torch.equal(stage.layers["3"].mlp.up_proj.weight, whole.layers["3"].mlp.up_proj.weight)
    std = whole.embed_tokens.weight.std().item()
    assert 0.08 < std < 0.12 and (whole.norm.weight == 1).all()
