"""A model that learns a task through the data layer and the step, and then does it: what a silent shift or mask would spoil.

    prompt [a]  reply [a + 1, a + 2, a + 3, EOS]        packed, EOS is also the pad id

Losses fall with labels shifted twice as well (it then learns to skip a token); what the trained model says does not come out right.
"""

import numpy as np
import pytest
import torch

from tests.helpers.tiny import tiny_llama
from torchft.batch import SampleId
from torchft.data.collate import collate
from torchft.data.types import Encoded
from torchft.generate.generate import Completion, generate
from torchft.generate.sampling import SamplingConfig
from torchft.losses.cross_entropy import CrossEntropy
from torchft.models.init import init_weights
from torchft.parallel.apply import parallelize
from torchft.parallel.mesh import ParallelConfig, build_mesh, resolve_degrees
from torchft.parallel.pp import build_stages
from torchft.train.step import NonFinite, train_step

EOS = 2  # and the pad id
STARTS = range(10, 40)


def sample(a: int) -> Encoded:
    ids = [a, a + 1, a + 2, a + 3, EOS]
    return Encoded(np.array(ids, np.int32), np.array([0, 1, 1, 1, 1], np.float32))


@pytest.mark.parametrize("per_row", [1, 3])
def test_trained_replies_come_out_and_end(per_row):
    """One or three samples a row: after some steps the loss is near 0, greedy replies are the trained ones and end by themselves."""
    spec, cfg = tiny_llama(num_layers=2), ParallelConfig()
    mesh = build_mesh(resolve_degrees(cfg, 1), torch.device("cpu"))
    parts = parallelize(build_stages(spec, mesh, torch.float32), mesh, cfg)
    init_weights(parts.named_parameters(), spec, 0)
    optimizer = torch.optim.AdamW([p for _, p in parts.named_parameters()], lr=1e-2, weight_decay=0.0)
    rng = np.random.default_rng(0)
    for _ in range(60):
        order = rng.permutation(STARTS)
        rows = [[sample(a) for a in order[i : i + per_row]] for i in range(0, len(order), per_row)]
        batch = collate(rows, [[SampleId("a", 0, 0)] * len(row) for row in rows], t=5 * per_row + 2, pad_id=EOS)
        stats = train_step(parts, [batch], CrossEntropy(), optimizer, max_norm=1.0, nonfinite=NonFinite())
    assert parts.reduce_metrics(stats.metrics)["loss"] < 0.05
    replies = generate(parts.modules[0], [[a] for a in STARTS], cfg=SamplingConfig(max_new_tokens=8), stop_ids=[EOS], pad_id=EOS)
    assert replies == [Completion([a + 1, a + 2, a + 3], "stop") for a in STARTS]
