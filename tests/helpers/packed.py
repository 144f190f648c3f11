"""A tiny HF folder packed as GPTQ or AWQ write it, with the dense weights that the published formula gives."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.helpers.models import make_model

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ's packer: nibble i of a word holds column AWQ_ORDER[i]


def pack_columns(x: torch.Tensor, order: list[int]) -> torch.Tensor:
    """(rows, out) of 0..15 -> (rows, out / 8) int32; nibble i holds number order[i] of its eight."""
    words = torch.zeros(x.shape[0], x.shape[1] // 8, dtype=torch.int64)
    for i, column in enumerate(order):
        words |= x[:, column::8].to(torch.int64) << (4 * i)
    return (words - ((words >> 31) << 32)).to(torch.int32)


def packed_model(folder: Path, method: str, *, group_size: int = 16, act_order: bool = False, version: str = "") -> dict[str, torch.Tensor]:
    """Writes the folder; {HF name of a weight: what it stands for, fp32}. group_size -1: all of a row.
    version: gptq_v2 stores zero points as they are."""
    make_model(folder)
    g = torch.Generator().manual_seed(len(method))
    tensors, dense = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        out, width = tensors.pop(name).shape
        size = width if group_size == -1 else group_size
        groups, base = width // size, name.removesuffix(".weight")
        q, z = torch.randint(0, 16, (width, out), generator=g), torch.randint(0, 16, (groups, out), generator=g)
        s = (torch.rand(groups, out, generator=g) * 0.1).half()
        index = torch.arange(width) // size
        index = index[torch.randperm(width, generator=g)] if act_order else index
        dense[name] = (s[index].float() * (q - z[index]).float()).t().contiguous()
        if method == "awq":
            tensors[f"{base}.qweight"], tensors[f"{base}.qzeros"] = pack_columns(q, AWQ_ORDER), pack_columns(z, AWQ_ORDER)
        else:
            stored = z if version else (z - 1) % 16
            tensors[f"{base}.qweight"] = pack_columns(q.t().contiguous(), list(range(8))).t().contiguous()
            tensors[f"{base}.qzeros"] = pack_columns(stored, list(range(8)))
            tensors[f"{base}.g_idx"] = index.to(torch.int32)
        tensors[f"{base}.scales"] = s
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    section = {"quant_method": method, "bits": 4, "group_size": group_size}
    section |= {"checkpoint_format": version} if version else {}
    section |= {"desc_act": act_order, "sym": False} if method == "gptq" else {"version": "gemm", "zero_point": True}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    return dense
