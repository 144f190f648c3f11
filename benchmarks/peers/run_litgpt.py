"""litgpt's full fine-tuning and its LoRA; chats padded to the longest of a step, as it always does. It has no compiled mode and no packing.

It neither clips gradients nor keeps the learning rate constant: an optimizer of ours, given through its own option, does both, so that
all train the same thing. Its log goes through a logger of Fabric.
"""

import sys
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.loggers import Logger
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule, get_sft_collate_fn
from litgpt.finetune import full, lora
from litgpt.prompts import Default
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from lora_files import read_adapter, read_size
from report import Job, Report, count_tokens, read_job, read_samples
from torch.utils.data import DataLoader

NAME = "SmolLM2-135M-Instruct"


class ClippedAdamW(torch.optim.AdamW):
    """AdamW at a constant learning rate, over clipped gradients."""

    def __init__(self, params, lr: float, max_norm: float):
        super().__init__([p for p in params if p.requires_grad], lr=lr, weight_decay=0.0, fused=True)
        self.constant, self.max_norm = lr, max_norm

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = self.constant
            torch.nn.utils.clip_grad_norm_(group["params"], self.max_norm)
        return super().step(closure)


class Rows(Logger):
    """One row a step. Ends the process after the last: nothing after it is measured."""

    def __init__(self, report: Report, data: "Chats"):
        self.report, self.data = report, data

    @property
    def name(self) -> str:
        return "rows"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        """Not needed."""

    def log_metrics(self, metrics, step=None) -> None:
        if "loss" not in metrics:  # its throughput monitor's
            return
        self.report.step(metrics["loss"], *self.data.counts[metrics["step"] - 1])
        if metrics["step"] == len(self.data.train_dataloader()):
            sys.exit(0)


class Chats(DataModule):
    """The samples, in their order, in litgpt's own collation."""

    def __init__(self, job: Job, report: Report):
        super().__init__()
        self.job, self.report, self.counts = job, report, []
        self.prompt_style = Default()
        self.samples = []
        for sample in read_samples(job):
            n = torch.tensor(len(sample["input_ids"]))
            tensors = {key: torch.tensor(sample[key]) for key in ("input_ids", "labels")}
            self.samples.append({**tensors, "token_counts": {"raw": n, "raw_plus_prompt_template": n}})
        self._collate = get_sft_collate_fn(max_seq_length=job.seq_len, ignore_index=-100)

    def connect(self, tokenizer=None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        """The ids are there already."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.samples, batch_size=self.job.rows, collate_fn=self._count)

    def val_dataloader(self) -> DataLoader:
        """litgpt checks its settings on two batches before it starts."""
        return DataLoader(self.samples[: self.job.rows], batch_size=self.job.rows, collate_fn=self._collate)

    def _count(self, samples: list[dict]) -> dict:
        """The batch; its tokens are noted, and the first one starts the clock."""
        if not self.counts:
            self.report.begin()
        batch = self._collate(samples)
        real = sum(len(sample["input_ids"]) for sample in samples)
        self.counts.append((real, count_tokens(batch["input_ids"], batch["labels"])[1]))
        return batch


def convert(job: Job) -> Path:
    """litgpt's own form of the model, in the scratch folder."""
    folder = Path(job.scratch) / "model"
    folder.mkdir(parents=True)
    for file in Path(job.model).iterdir():
        (folder / file.name).symlink_to(file)
    convert_hf_checkpoint(checkpoint_dir=folder, model_name=NAME)
    return folder


def put_lora(job: Job, folder: Path) -> dict:
    """Adds the job's adapter to litgpt's file of the model; the settings of its config that make the model fit."""
    adapter, file = read_adapter(job), folder / "lit_model.pth"
    weights = torch.load(file)
    for layer in range(1 + max(int(name.split(".")[2]) for name in adapter)):
        ours, its = f"model.layers.{layer}.", f"transformer.h.{layer}."
        parts = {"attn.qkv": [f"self_attn.{x}_proj" for x in "qkv"], "attn.proj": ["self_attn.o_proj"]}
        parts |= {"mlp.fc_1": ["mlp.gate_proj"], "mlp.fc_2": ["mlp.up_proj"], "mlp.proj": ["mlp.down_proj"]}
        for name, members in parts.items():
            pairs = zip(*(adapter[ours + member] for member in members))
            weights[f"{its}{name}.lora_A"], weights[f"{its}{name}.lora_B"] = map(torch.cat, pairs)
    torch.save(weights, file)
    rank, alpha = read_size(job)
    layers = {f"lora_{name}": name != "head" for name in ("query", "key", "value", "projection", "mlp", "head")}
    return {"lora_r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, **layers}


def main() -> None:
    job = read_job()
    report = Report(job, "litgpt", "lightning")
    folder = convert(job)
    data = Chats(job, report)
    precision = {"bf16": "bf16-true", "fp32": "32-true"}[job.dtype]
    fabric = L.Fabric(accelerator="cpu", devices=1, precision=precision, loggers=Rows(report, data))
    train = TrainArgs(
        save_interval=None,
        log_interval=1,
        global_batch_size=job.rows,
        micro_batch_size=job.rows,
        lr_warmup_steps=1,
        epochs=1,
        max_seq_length=job.seq_len,
    )
    optimizer = {"class_path": "run_litgpt.ClippedAdamW", "init_args": {"lr": job.lr, "max_norm": job.max_norm}}
    evaluation = EvalArgs(interval=10**9, max_new_tokens=1, max_iters=1, final_validation=False)
    out = Path(job.scratch) / "out"
    if job.adapter:
        config = lora.Config.from_file(folder / "model_config.yaml", **put_lora(job, folder))
        fabric.launch(lora.main, 1, 0, config, data, folder, out, train, evaluation, optimizer)
    else:
        config = Config.from_file(folder / "model_config.yaml")
        fabric.launch(full.main, 1, False, 0, config, data, folder, out, train, evaluation, optimizer)


if __name__ == "__main__":
    main()
