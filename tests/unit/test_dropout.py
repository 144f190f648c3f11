"""LoRA's dropout: how much falls out, what it depends on, who gets it; and what else `apply_lora` refuses."""

from dataclasses import replace

import pytest
import torch

from tests.helpers.caches import make_encoded
from tests.helpers.tiny import packed_batch, tiny_llama
from torchft.batch import Batch, NoiseKey, SampleId
from torchft.data.collate import collate
from torchft.errors import ConfigError
from torchft.models.decoder import build_decoder
from torchft.peft.dropout import dropped, keyed_layers, token_keys
from torchft.peft.lora import LoraConfig, apply_lora
from torchft.quant.swap import QuantConfig, apply_quant

P, SALT = 0.3, 12345


def batch(rows: list[list[int]], t: int = 300) -> Batch:
    """Rows of samples by index; sample i has i + 2 tokens."""
    samples = [[make_encoded(i + 2) for i in row] for row in rows]
    made = collate(samples, [[SampleId("s", 0, i) for i in row] for row in rows], t=t, pad_id=0)
    return replace(made, noise=NoiseKey(0.0, 7, 3))


def holes(made: Batch, layer: str = "0", salt: int = SALT, width: int = 400) -> torch.Tensor:
    """(b, t, width): True where a number fell out."""
    return dropped(torch.ones(*made.tokens.shape, width), token_keys(made, [layer])[layer], salt, P) == 0


def test_share_and_scale() -> None:
    """P of the numbers fall out, of each token and each input alike, and the rest is divided by 1 - P; the expectation stays."""
    made = batch([[298]])
    x = dropped(torch.ones(1, 300, 400), token_keys(made, ["0"])["0"], SALT, P)
    assert set(x.unique().tolist()) == {0.0, torch.tensor(1 / (1 - P)).item()}
    gone = (x == 0).double()
    assert abs(gone.mean() - P) < 4 * (P * (1 - P) / gone.numel()) ** 0.5
    for dim in (1, 2):  # 300 and 400 shares, each of a mean's spread
        spread = gone.mean(dim).std() / (P * (1 - P) / gone.shape[dim]) ** 0.5
        assert 0.85 < spread < 1.15


def test_unlike_for_layers_modules_steps_and_neighbours() -> None:
    """Holes of two layers, modules, steps, seeds, tokens or inputs have no more in common than chance."""
    made = batch([[298]])
    here = holes(made)
    others = [
        holes(made, "1"),
        holes(made, salt=SALT + 1),
        holes(replace(made, noise=NoiseKey(0.0, 7, 4))),
        holes(replace(made, noise=NoiseKey(0.0, 8, 3))),
    ]
    others += [here.roll(n, dim) for n in (1, 2, 16) for dim in (1, 2)]
    for other in others:
        both = (here & other).double().mean()
        assert abs(both - P**2) < 5 * (P**2 / here.numel()) ** 0.5


def test_depends_on_the_sample_and_the_place_alone() -> None:
    """A sample has the same holes in any pack, row, micro-batch and row length, and a rank that holds some inputs has their holes."""
    together, alone = holes(batch([[4, 1], [2]], t=12)), holes(batch([[1]], t=5))
    assert torch.equal(together[0, 6:9], alone[0, :3])
    assert not torch.equal(together[1, :3], alone[0, :3])
    assert torch.equal(holes(batch([[2], [4, 1]], t=12))[1], together[0])
    assert torch.equal(holes(batch([[1]], t=5), width=100), alone[..., :100])


def test_who_gets_it() -> None:
    """Blocks with an adapter, in training and with a key; a training batch without one is an error, not a step without dropout."""
    model = build_decoder(tiny_llama(), device="cpu")
    apply_lora([model], LoraConfig(dropout=0.5, layers=[1, 2]))
    assert keyed_layers([model]) == ["1", "2"]
    with pytest.raises(AssertionError, match="noise"):
        token_keys(packed_batch(1), ["1"])


def test_a_quantised_layer_has_no_whole_copy() -> None:
    """modules_to_save of a packed layer is refused with the key that leaves it unpacked."""
    model = build_decoder(tiny_llama())
    apply_quant([model], QuantConfig(format="int8"))
    with pytest.raises(ConfigError, match=r"quant.exclude=\[layers.0.mlp.up_proj\]"):
        apply_lora([model], LoraConfig(targets=["q_proj"], modules_to_save=["layers.0.mlp.up_proj"]))
