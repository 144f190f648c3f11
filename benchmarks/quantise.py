"""Quantising a model as it is read: MB/s of the file, and the host memory it takes beside the quantised model.

    python benchmarks/quantise.py ~/.cache/torchft/SmolLM2-135M-Instruct-0.1.0 [nf4|int8] [fp32|bf16]

Memory is the process's anonymous resident memory (pages of the mapped file don't count: the system takes them back), sampled every
two milliseconds; `ratio` is its growth at most over the bytes of the model's parameters after loading.
"""

import re
import sys
import threading
import time
from pathlib import Path

from torchft.checkpoint.hf import load_hf
from torchft.dtypes import DTYPES
from torchft.models.build import read_config
from torchft.models.decoder import build_decoder
from torchft.quant.swap import QuantConfig, apply_quant, quantised_modules


def anonymous() -> int:
    """Bytes of this process that are no file's."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


class Peak(threading.Thread):
    """Samples `anonymous` until stopped."""

    def __init__(self):
        super().__init__(daemon=True)
        self.start_bytes = self.peak = anonymous()
        self.running = True

    def run(self) -> None:
        while self.running:
            self.peak = max(self.peak, anonymous())
            time.sleep(0.002)


def measure(folder: Path, cfg: QuantConfig, dtype: str) -> dict[str, float]:
    """Loads the folder into one process's quantised model."""
    spec, _ = read_config(folder)
    model = build_decoder(spec, dtype=DTYPES[dtype])
    apply_quant([model], cfg)
    peak = Peak()
    peak.start()
    start = time.perf_counter()
    model.to_empty(device="cpu")
    report = load_hf(folder, spec, model.named_parameters(), quantised=quantised_modules([model]))
    seconds = time.perf_counter() - start
    peak.running = False
    peak.join()
    held = sum(p.nbytes for p in model.parameters())
    return {
        "seconds": seconds,
        "read_mb": report.num_bytes / 1e6,
        "mb_per_s": report.num_bytes / 1e6 / seconds,
        "model_mb": held / 1e6,
        "peak_mb": (peak.peak - peak.start_bytes) / 1e6,
        "ratio": (peak.peak - peak.start_bytes) / held,
    }


if __name__ == "__main__":
    folder, format, dtype = [*sys.argv[1:], *["", "nf4", "fp32"][len(sys.argv) - 1 :]]
    for key, value in measure(Path(folder), QuantConfig(format=format), dtype).items():
        print(f"{key:10} {value:10.2f}")
