"""torchtune's single-device recipes of full fine-tuning and of LoRA; chats packed by its PackedDataset.

A recipe is taken from the installed package and configured as its YAML would be. The model is its Llama 3.2 builder: with
scale_factor 1 the rope of that family is the plain one. Saving at the end of the epoch is left out.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
import torchtune
from lora_files import read_adapter, read_size
from omegaconf import OmegaConf
from report import Job, Report, read_job, read_samples
from torchtune.datasets import PackedDataset
from torchtune.models.convert_weights import _FROM_HF, get_mapped_key, hf_to_tune
from torchtune.training.metric_logging import MetricLoggerInterface


class Tokenizer:
    """All that the recipe asks of a tokenizer here: the data has ids already."""

    pad_id = 2


class Rows(MetricLoggerInterface):
    """The recipe's metrics, as the benchmark's rows. Ends the process after the last step: nothing after it is measured."""

    def __init__(self, job: dict, counts: list):
        self.report, self.counts = Report(Job(**job), "torchtune", "torchao"), list(counts)

    def log_config(self, config) -> None:
        """Called when the recipe is set up."""

    def log(self, name: str, data, step: int) -> None:
        """Not called by the recipe."""

    def log_dict(self, payload, step: int) -> None:
        self.report.step(float(payload["loss"]), *self.counts[step - 1])
        if step == len(self.counts):
            sys.exit(0)

    def close(self) -> None:
        """Nothing is open."""


def read_data(tokenizer, job: dict, packed: bool) -> list | PackedDataset:
    """Rows as torchtune lays them out; packs are filled up to whole steps with rows that are not trained."""
    given = Job(**job)
    rows = [{"tokens": s["input_ids"], "labels": s["labels"]} for s in read_samples(given)]
    if not packed:
        return rows
    dataset = PackedDataset(rows, max_seq_len=given.seq_len, padding_idx=tokenizer.pad_id)
    blank = {key: value.clone() for key, value in dataset.packs[-1].items()}
    blank["labels"].fill_(-100)
    blank["tokens"].fill_(tokenizer.pad_id)
    dataset.packs += [blank] * (-len(dataset.packs) % given.rows)
    return dataset


def count_steps(job: Job, packed: bool) -> list[tuple[int, int]]:
    """(real tokens, trained tokens) of each step."""
    counts = []
    for row in read_data(Tokenizer(), vars(job), packed):
        tokens, labels = list(map(int, row["tokens"])), list(map(int, row["labels"]))
        real = len(tokens)
        while real and (tokens[real - 1], labels[real - 1]) == (Tokenizer.pad_id, -100):  # a pack's end
            real -= 1
        counts.append((real, sum(label != -100 for label in labels)))
    return [tuple(map(sum, zip(*counts[start : start + job.rows]))) for start in range(0, len(counts), job.rows)]


def constant(optimizer, num_training_steps: int, last_epoch: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule that the LoRA recipe asks for: none."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0, last_epoch)


def load_adapter(job: Job, model: torch.nn.Module) -> None:
    """The job's adapter in torchtune's order: the outputs of q and k are permuted, as their weights are."""
    sizes, held = config_of(job)["model"], model.state_dict()
    heads = {"num_heads": sizes["num_heads"], "num_kv_heads": sizes["num_kv_heads"], "head_dim": sizes["embed_dim"] // sizes["num_heads"]}
    with torch.no_grad():
        for name, (a, b) in read_adapter(job).items():
            place = get_mapped_key(f"{name}.weight", _FROM_HF).removesuffix(".weight")
            held[f"{place}.lora_a.weight"].copy_(a)
            held[f"{place}.lora_b.weight"].copy_(*hf_to_tune({f"{name}.weight": b}, dim=b.shape[1], **heads).values())


def lora_options(job: Job) -> dict:
    """The model's settings in mode lora."""
    rank, alpha = read_size(job)
    return {
        "_component_": "torchtune.models.llama3_2.lora_llama3_2",
        "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
        "apply_lora_to_mlp": True,
        "lora_rank": rank,
        "lora_alpha": alpha,
    }


def config_of(job: Job) -> dict:
    """The recipe's configuration."""
    llama = json.loads((Path(job.model) / "config.json").read_text(encoding="utf-8"))
    packed = job.mode == "chat"
    return {
        "output_dir": job.scratch,
        "device": "cpu",
        "dtype": job.dtype,
        "seed": 0,
        "epochs": 1,
        "max_steps_per_epoch": None,
        "batch_size": job.rows,
        "shuffle": False,
        "gradient_accumulation_steps": 1,
        "optimizer_in_bwd": False,
        "clip_grad_norm": job.max_norm,
        "compile": job.mode == "compiled",
        "resume_from_checkpoint": False,
        "enable_activation_checkpointing": False,
        "enable_activation_offloading": False,
        "metric_logger": {"_component_": "run_torchtune.Rows", "job": vars(job), "counts": count_steps(job, packed)},
        "tokenizer": {"_component_": "run_torchtune.Tokenizer"},
        "dataset": {"_component_": "run_torchtune.read_data", "job": vars(job), "packed": packed},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": job.lr, "weight_decay": 0.0, "fused": True},
        "lr_scheduler": {"_component_": "run_torchtune.constant"} if job.adapter else None,
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": job.model,
            "checkpoint_files": ["model.safetensors"],
            "output_dir": job.scratch,
            "model_type": "LLAMA3_2",
        },
        "model": {
            "_component_": "torchtune.models.llama3_2.llama3_2",
            "vocab_size": llama["vocab_size"],
            "num_layers": llama["num_hidden_layers"],
            "num_heads": llama["num_attention_heads"],
            "num_kv_heads": llama["num_key_value_heads"],
            "embed_dim": llama["hidden_size"],
            "intermediate_dim": llama["intermediate_size"],
            "max_seq_len": llama["max_position_embeddings"],
            "norm_eps": llama["rms_norm_eps"],
            "rope_base": int(llama["rope_theta"]),
            "scale_factor": 1,
            **(lora_options(job) if job.adapter else {}),
        },
    }


def main() -> None:
    job = read_job()
    name, recipe_class = ("lora", "LoRAFinetuneRecipeSingleDevice") if job.adapter else ("full", "FullFinetuneRecipeSingleDevice")
    path = Path(torchtune.__file__).parents[1] / "recipes" / f"{name}_finetune_single_device.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cfg = OmegaConf.create(config_of(job))
    recipe = getattr(module, recipe_class)(cfg=cfg)
    recipe.setup(cfg=cfg)
    if job.adapter:
        load_adapter(job, recipe._model)
    recipe._metric_logger.report.begin()
    recipe.train()


if __name__ == "__main__":
    main()
