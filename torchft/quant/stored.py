"""How GPTQ and AWQ files pack 4-bit numbers into int32, and the section `quantization_config` that says so.

    GPTQ  qweight (in / 8, out)   qzeros (groups, out / 8)   scales (groups, out)   g_idx (in,)    nibble j of a word: number 8 w + j
    AWQ   qweight (in, out / 8)   qzeros (groups, out / 8)   scales (groups, out)                  nibbles hold 0 2 4 6 1 3 5 7

GPTQ stores a zero point less one, modulo 16 (`checkpoint_format: gptq_v2` stores it as it is).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from torchft.errors import ConfigError, Problem

PER_WORD = 8  # 4-bit numbers in an int32
AWQ_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)  # in which nibble of its word a number stands
TENSORS = {"gptq": ("qweight", "qzeros", "scales", "g_idx"), "awq": ("qweight", "qzeros", "scales")}


@dataclass(frozen=True)
class StoredFormat:
    """What a folder's `quantization_config` says."""

    method: Literal["gptq", "awq"]
    group_size: int | None  # inputs under one scale; None: all of a row
    zero_shift: int  # to be added to a stored zero point
    layers: frozenset[str] = frozenset()  # the weights stored so, by our names; known when the files were opened

    def groups(self, in_features: int) -> int:
        """Inputs under one scale."""
        return self.group_size or in_features


def stored_format(config: Mapping[str, Any], *, where: str) -> StoredFormat | None:
    """The packed format of a parsed config.json, None if its weights are plain. Raises ConfigError for one that can't be read."""
    section = config.get("quantization_config")
    if section is None:
        return None
    section = section if isinstance(section, Mapping) else {}
    method, group_size = section.get("quant_method"), section.get("group_size", 128)
    fix = "take a 4-bit GPTQ or AWQ (gemm) checkpoint, or the unquantised one with quant.format=nf4"
    checks = {
        "quant_method": (method, method in TENSORS, "gptq or awq"),
        "bits": (section.get("bits"), section.get("bits") == 4, "4"),
        "group_size": (group_size, isinstance(group_size, int) and (group_size > 0 or group_size == -1), "a whole number > 0, or -1"),
        "version": (section.get("version"), str(section.get("version") or "gemm").lower() == "gemm", "gemm"),
        "checkpoint_format": (
            section.get("checkpoint_format"),
            (section.get("checkpoint_format") or "gptq") in ("gptq", "gptq_v2", "gemm"),
            "gptq or gptq_v2",
        ),
    }
    problems = [
        Problem(f"quantization_config.{key}", repr(given), expected, fix, where)
        for key, (given, good, expected) in checks.items()
        if not good
    ]
    if problems:
        raise ConfigError(problems)
    shift = 1 if method == "gptq" and section.get("checkpoint_format") != "gptq_v2" else 0
    return StoredFormat(method, None if group_size == -1 else group_size, shift)


def unpack_rows(words: Tensor) -> Tensor:
    """GPTQ's qweight: (in / 8, out) int32 -> (in, out) uint8."""
    return _nibbles(words).permute(0, 2, 1).reshape(-1, words.shape[1])


def unpack_columns(words: Tensor, method: str) -> Tensor:
    """AWQ's qweight, and both methods' qzeros: (rows, out / 8) int32 -> (rows, out) uint8."""
    nibbles = _nibbles(words)
    return (nibbles[:, :, AWQ_NIBBLE] if method == "awq" else nibbles).reshape(words.shape[0], -1)


def _nibbles(words: Tensor) -> Tensor:
    """(..., ) int32 -> (..., 8) uint8, the lowest first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & 15).to(torch.uint8)
