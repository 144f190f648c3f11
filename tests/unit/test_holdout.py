"""Held-out samples: the right number, chosen by the files alone, never trained on."""

import numpy as np
import pytest

from tests.helpers.caches import make_cache
from torchft.data.holdout import held_out_names, hold_out
from torchft.data.loader import DataConfig, Loader, evaluation_steps
from torchft.data.sources import SourceConfig
from torchft.errors import ConfigError

LENGTHS = [2 + (7 * i) % 11 for i in range(50)]


@pytest.mark.parametrize(("size", "count"), [(0.1, 5), (0.001, 1), (7, 7), (1, 1)])
def test_both_parts_are_the_whole(size, count):
    """A share or a number; every sample in one of the two, in the files' order, with its own tokens; counts are theirs."""
    rest, held = hold_out(make_cache(LENGTHS), size)
    assert (len(rest), len(held)) == (50 - count, count)
    assert sorted([*rest.indices, *held.indices]) == list(range(50)) and all((np.diff(part.indices) > 0).all() for part in (rest, held))
    for part in (rest, held):
        assert part.lengths(np.arange(len(part))).tolist() == [LENGTHS[i] for i in part.indices]
        assert [part.unit(k)[0].ids[0] for k in range(len(part))] == [1000 * i for i in part.indices]
        assert part.piece(0, 0, 2).ids[0] == 1000 * part.indices[0]
        assert (part.counts.kept, part.counts.tokens) == (len(part), sum(LENGTHS[i] for i in part.indices))
        assert part.counts.trained == sum(n - max(1, n // 3) for n in (LENGTHS[i] for i in part.indices))


def test_choice_depends_on_the_files_alone():
    """Another tokenizer, template or length holds out the same records; other files others; hashes tell the parts apart."""
    rest, held = hold_out(make_cache(LENGTHS), 8)
    _, again = hold_out(make_cache(LENGTHS, tokenizer="other", seq_len=99), 8)
    _, other = hold_out(make_cache(LENGTHS, source="other"), 8)
    assert held.indices.tolist() == again.indices.tolist() != other.indices.tolist()
    assert len({rest.hash, held.hash, make_cache(LENGTHS).hash}) == 3


def test_training_never_sees_what_is_held_out():
    """An epoch of the rest and a pass over the held out part: together each sample once."""
    rest, held = hold_out(make_cache(LENGTHS), 0.2)
    loader = Loader([rest], seq_len=16, micro_batch_size=1, global_batch_size=1)
    trained = [n.index for _ in range(loader.steps_per_epoch(0)) for b in loader.next_step() for n in b.ids]
    seen = [n.index for step in evaluation_steps([held], seq_len=16, micro_batch_size=1) for b in step for n in b.ids]
    assert sorted(trained) == sorted(rest.indices) and sorted(seen) == sorted(held.indices)
    assert not set(trained) & set(seen)


def test_all_held_out_is_an_error():
    """Nothing left to train on: the message has the number of samples."""
    with pytest.raises(ConfigError, match="fewer than the 50 samples"):
        hold_out(make_cache(LENGTHS), 50)


def test_names():
    """`split` for one source, numbered for several, none without data.validation_size."""
    one, two = [SourceConfig(path="a")], [SourceConfig(path="a"), SourceConfig(path="b")]
    names = [held_out_names(DataConfig(train=train, validation_size=size)) for train, size in [(one, 0.1), (two, 3), (two, 0)]]
    assert names == [["split"], ["split_0", "split_1"], []]
