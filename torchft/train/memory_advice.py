"""What to change after running out of memory: where this rank's memory went, and the settings that save most, largest saving first."""

from collections.abc import Iterator, Mapping

from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

GIB = 1 << 30
SHOWN = 5


def component_sizes(parameters: list[nn.Parameter], optimizer: Optimizer) -> dict[str, float]:
    """GiB that this rank holds: parameters, gradients (as large as what is trained), optimizer state (before there is any: twice that)."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    states = [value for state in optimizer.state.values() for value in state.values() if hasattr(value, "untyped_storage")]
    gradients = sum(map(_bytes, trained))
    state = sum(map(_bytes, states)) or 2 * gradients
    return {"parameters": sum(map(_bytes, parameters)) / GIB, "gradients": gradients / GIB, "optimizer state": state / GIB}


def memory_advice(cfg, sizes: Mapping[str, float], error: str) -> str:
    """The lines given, expected, fix."""
    known = {name: size for name, size in sizes.items() if name != "peak"}
    rest = max(0.0, sizes.get("peak", 0.0) - sum(known.values()))
    shown = ", ".join(f"{name} {size:.2f}" for name, size in {**known, "activations and the rest": rest}.items())
    fixes = sorted(_fixes(cfg, known, rest), reverse=True)[:SHOWN]
    lines = [f"{text} (about {saved:.2f} GiB less)" for saved, text in fixes] or ["use more processes, or a smaller model"]
    return (
        f"  given:    {error.splitlines()[0][:200] if error else 'no memory left'}\n"
        f"            this rank's peak {sizes.get('peak', 0.0):.2f} GiB: {shown}\n"
        "  expected: a step that fits\n  fix:      " + "\n            ".join(lines)
    )


def _fixes(cfg, sizes: Mapping[str, float], rest: float) -> Iterator[tuple[float, str]]:
    """(GiB saved, what to set): estimates, exact for what is sharded or kept in another precision."""
    state, gradients, parameters = (sizes.get(name, 0.0) for name in ("optimizer state", "gradients", "parameters"))
    micro, recompute = cfg.train.micro_batch_size, cfg.memory.recompute
    if micro > 1:
        yield rest * (1 - (micro // 2) / micro), f"train.micro_batch_size={micro // 2}, the same numbers (or train.auto_micro_batch=true)"
    if recompute != "full":
        yield rest * (0.7 if recompute == "none" else 0.4), "memory.recompute=full, a third more time"
    yield rest / 2, f"data.seq_len={cfg.data.seq_len // 2}, which cuts longer samples"
    if cfg.optim.name not in ("adamw_8bit", "adafactor"):
        yield state * (0.75 if cfg.precision.params != "bf16" else 0.5), "optim.name=adamw_8bit"
    if cfg.precision.params != "bf16":
        yield (state + gradients + parameters) / 2, "precision.params=bf16, with a larger optim.lr"
    yield (state + gradients + parameters) / 2, "twice as many processes, which share parameters, gradients and optimizer state (FSDP2)"


def _bytes(tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()
