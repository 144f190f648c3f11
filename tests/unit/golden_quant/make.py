"""Writes bitsandbytes.safetensors: weights and what bitsandbytes (0.50.2, its CPU kernels, one thread) makes of them.

Run with a Python that has torch, safetensors and bitsandbytes; the library's tests read the file and don't need bitsandbytes.
"""

from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file

CASES = {  # name -> (out, in, block size, dtype, double)
    "bf16": (96, 512, 64, torch.bfloat16, True),
    "fp32": (37, 576, 64, torch.float32, True),
    "fp16_32": (48, 256, 32, torch.float16, True),
    "single_128": (24, 384, 128, torch.float32, False),
}


def weights(out: int, width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Rows of very different sizes, a block of zeros, an outlier, a row of one value."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(out, width, generator=g) * torch.logspace(-3, 0.5, out)[torch.randperm(out, generator=g)].unsqueeze(1)
    w[0, : width // 4] = 0
    w[1, 3] = 60.0
    w[2] = -0.125
    return w.to(dtype)


def main() -> None:
    torch.set_num_threads(1)
    tensors = {}
    for seed, (name, (out, width, block, dtype, double)) in enumerate(CASES.items()):
        w = weights(out, width, dtype, seed)
        codes, state = bnb.quantize_4bit(w, blocksize=block, compress_statistics=double, quant_type="nf4")
        tensors |= {f"{name}.weight": w, f"{name}.codes": codes.view(out, -1), f"{name}.absmax": state.absmax.view(out, -1)}
        if double:
            tensors |= {f"{name}.scales": state.state2.absmax, f"{name}.mean": state.offset.view(1)}
        tensors[f"{name}.dense"] = bnb.dequantize_4bit(codes, state)
    w = weights(64, 128, torch.float16, 9)
    codes, absmax, _ = bnb.int8_vectorwise_quant(w.clone())
    tensors |= {"int8.weight": w, "int8.codes": codes, "int8.absmax": absmax.view(-1, 1)}
    tensors["int8.dense"] = bnb.int8_vectorwise_dequant(codes, absmax)
    tensors["dynamic_map"] = bnb.create_dynamic_map()
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, Path(__file__).parent / "bitsandbytes.safetensors")


if __name__ == "__main__":
    main()
