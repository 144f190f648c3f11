"""Model FLOPs of a token and the share of a device's peak that a run reaches (MFU, Chowdhery et al. 2022).

A multiply-add is 2 FLOPs. Forward: 2 for each matmul parameter (the embedding lookup is none, a head is one, tied or not) plus
attention's q k' and p v over the keys a causal token sees on average, (t + 1) / 2 without a window. Backward: twice the forward.
What the maths needs is counted, not what the device repeats: neither recomputed activations nor masked halves nor padding, so MFU
falls when work is wasted. Documents shorter than the sequence attend less than counted here.
"""

import re

import torch

from torchft.models.spec import ModelSpec

# Dense bf16 with fp32 accumulation, in TFLOP/s, from the makers' data sheets; the first name found in the device's name counts.
PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.5),
    ("H200", 989.5),
    ("H100 PCIe", 756.5),
    ("H100 NVL", 835.5),
    ("H100", 989.5),
    ("H800", 989.5),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 6000 Ada", 364.2),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("MI325X", 1307.4),
    ("MI300X", 1307.4),
    ("MI250X", 191.5),  # one of the two dies, which is one device
)


def matmul_parameters(spec: ModelSpec) -> int:
    """How many weights every token is multiplied with: projections, MLPs and heads; no embedding, norm or bias."""
    a, d = spec.attention, spec.hidden_size
    attention = d * a.head_dim * (2 * a.num_heads + 2 * a.num_kv_heads)  # q and o, k and v
    mlp = (3 if spec.mlp.gated else 2) * d * spec.mlp.intermediate_size  # gate, up, down
    return spec.num_layers * (attention + mlp) + sum(d * head.size for head in spec.heads.values())


def attention_flops(spec: ModelSpec, seq_len: int) -> float:
    """Forward FLOPs a token of q k' and p v over all layers, for documents as long as the sequence."""
    per_key = 4 * spec.attention.num_heads * spec.attention.head_dim
    return per_key * sum(_mean_keys(seq_len, layer.window) for layer in spec.layers)


def flops_per_token(spec: ModelSpec, seq_len: int, *, trained_share: float = 1.0) -> float:
    """FLOPs of forward and backward for one token: 6 a matmul parameter + 12 * heads * head_dim * keys a layer.

    trained_share: the part of the matmul parameters that get a gradient of their own (full fine-tuning 1, LoRA on a frozen base 0:
    then 4 a parameter; the adapters' own few FLOPs are left out).
    """
    return (4 + 2 * trained_share) * matmul_parameters(spec) + 3 * attention_flops(spec, seq_len)


def peak_tflops(device: torch.device) -> float | None:
    """The device's dense bf16 peak; None for a CPU or a device that is not in the table."""
    return peak_of_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of_name(name: str) -> float | None:
    """The peak by a device's name: ("NVIDIA A100-SXM4-80GB") -> 312.0. Laptop chips and MIG slices are other, slower devices: None."""
    if re.search(r"\b(MIG|Laptop|Max-Q)\b", name):
        return None
    return next((peak for known, peak in PEAK_TFLOPS if re.search(rf"\b{known}\b", name)), None)


def mfu(tokens_per_s: float, flops_per_token: float, num_devices: int, peak_tflops: float | None) -> float | None:
    """Model FLOPs utilisation, 0..1: tokens_per_s over all devices against num_devices peaks. None where the peak is unknown."""
    return None if peak_tflops is None else tokens_per_s * flops_per_token / (num_devices * peak_tflops * 1e12)


def _mean_keys(seq_len: int, window: int | None) -> float:
    """Keys a token attends to, averaged over a sequence: token i sees min(i + 1, window)."""
    w = seq_len if window is None else min(window, seq_len)
    return w - w * (w - 1) / (2 * seq_len)
