"""The speed of light: transformers' LlamaForCausalLM in a plain loop, nothing else. Chats are packed by first fit, without a library;
LoRA is the module below.

Logits go to fp32 before the loss, as every library here has it. Packed rows carry position ids that start again with each chat, from
which transformers makes a mask that keeps the chats apart.
"""

import torch
import torch.nn.functional as F
from lora_files import read_adapter, read_size
from report import Job, Report, read_job, read_samples
from torch import Tensor, nn
from transformers import LlamaForCausalLM


class Lora(nn.Module):
    """y = W x + factor B A x."""

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, factor: float):
        super().__init__()
        self.base, self.a, self.b, self.factor = base, nn.Parameter(a), nn.Parameter(b), factor

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.factor * F.linear(F.linear(x, self.a), self.b)


def put_lora(model: nn.Module, job: Job) -> None:
    """Freezes the model and puts the job's adapter on it."""
    rank, alpha = read_size(job)
    model.requires_grad_(False)
    for name, (a, b) in read_adapter(job).items():
        model.set_submodule(name, Lora(model.get_submodule(name), a, b, alpha / rank))


def first_fit(samples: list[dict], seq_len: int) -> list[list[dict]]:
    """Rows of samples of at most seq_len tokens."""
    rows: list[list[dict]] = []
    free: list[int] = []
    for sample in sorted(samples, key=lambda s: -len(s["input_ids"])):
        length = len(sample["input_ids"])
        fit = next((i for i, space in enumerate(free) if space >= length), None)
        if fit is None:
            fit = len(rows)
            rows.append([])
            free.append(seq_len)
        rows[fit].append(sample)
        free[fit] -= length
    return rows


def batches(job: Job):
    """(input_ids, labels, position_ids or None, tokens) of each step; a chat's first label is -100, so none predicts across chats."""
    samples = read_samples(job)
    packed = job.mode == "chat"
    rows = first_fit(samples, job.seq_len) if packed else [[sample] for sample in samples]
    for start in range(0, len(rows), job.rows):
        now = rows[start : start + job.rows]
        shape = (len(now), job.seq_len)
        ids, labels, positions = torch.full(shape, 2), torch.full(shape, -100), torch.zeros(shape, dtype=torch.int64)
        tokens = 0
        for i, row in enumerate(now):
            at = 0
            for sample in row:
                n = len(sample["input_ids"])
                ids[i, at : at + n], labels[i, at : at + n] = torch.tensor(sample["input_ids"]), torch.tensor(sample["labels"])
                positions[i, at : at + n] = torch.arange(n)
                at += n
            positions[i, at:] = torch.arange(job.seq_len - at)
            tokens += at
        yield ids, labels, positions if packed else None, tokens


def main() -> None:
    job = read_job()
    report = Report(job, "transformers")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[job.dtype]
    model = LlamaForCausalLM.from_pretrained(job.model, dtype=dtype, attn_implementation="sdpa").train()
    if job.adapter:
        put_lora(model, job)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.lr, weight_decay=0.0, fused=True)

    def loss_of(ids, labels, positions):
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits  # (b, t, v)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())

    if job.mode == "compiled":
        loss_of = torch.compile(loss_of)
    report.begin()
    for ids, labels, positions, tokens in batches(job):
        loss = loss_of(ids, labels, positions)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, job.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        report.step(loss.item(), tokens, int((labels[:, 1:] != -100).sum()))


if __name__ == "__main__":
    main()
