"""The adapter that every library trains in mode lora, read from PEFT's files. This file runs in the environments of all libraries."""

import json
from pathlib import Path

import torch
from report import Job
from safetensors.torch import load_file
from torch import Tensor

PREFIX = "base_model.model."


def read_adapter(job: Job) -> dict[str, tuple[Tensor, Tensor]]:
    """HF's name of each module -> A (r, in) and B (out, r), in the dtype of the job."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[job.dtype]
    tensors = {key: value.to(dtype) for key, value in load_file(Path(job.adapter) / "adapter_model.safetensors").items()}
    modules = dict.fromkeys(key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors)
    return {name: tuple(tensors[f"{PREFIX}{name}.lora_{half}.weight"] for half in "AB") for name in modules}


def read_size(job: Job) -> tuple[int, float]:
    """Rank and alpha."""
    config = json.loads((Path(job.adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    return config["r"], config["lora_alpha"]
