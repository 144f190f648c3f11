"""Names of dtypes in configs and files, and the one rule for precision inside the maths: at least fp32, never less than given."""

import torch
from torch import Tensor

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def upcast(x: Tensor) -> Tensor:
    """x in fp32 if it is narrower, else as it is: fp64 stays fp64, so parity tests in fp64 see every bug."""
    return x.float() if x.dtype.itemsize < 4 else x
