"""First values of adapters, the same on every layout: from (seed, name), or from the base's weights, which must be loaded.

    default      A uniform, B 0 (peft/lora.py)                         gaussian     A normal with std 1 / rank, B 0
    orthogonal   A and B of orthogonal halves, so that B A is 0         pissa, olora A0 and B0 of the base (below), adapter B A - B0 A0
    loftq        what quantising the base took away (peft/loftq.py)

The embedding's adapter has A 0 and B normal whatever `init`, as PEFT's; copies and rows begin as what they stand for.

PiSSA (Meng et al. 2024) and OLoRA (Buyukakyuz 2024) take B0 A0 out of W in their papers; here W stays and B0 A0 is subtracted from the
adapter, which is the same function: the base keeps its hash, may be quantised, and the export is plain LoRA of rank 2r.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchft.dist import keyed_generator, shard_indices
from torchft.models.decoder import build_decoder
from torchft.models.init import fill_blocks
from torchft.models.spec import ModelSpec
from torchft.peft.copies import init_copies
from torchft.peft.dora import DoraMixin, adapted_norm
from torchft.peft.ends import RowsMixin
from torchft.peft.factors import largest_directions
from torchft.peft.linear import LoraMixin
from torchft.peft.loftq import loftq
from torchft.peft.lora import LoraConfig, apply_lora, init_lora


def init_adapters(roots: Iterable[nn.Module], cfg: LoraConfig, seed: int, original: Callable[[str], Tensor] | None = None) -> None:
    """Sets every adapter parameter of this rank's stages. All ranks of a stage call it, after the base's weights were loaded.

    original: of a quantised base, the weight of a layer before it was quantised; what init=loftq needs.
    """
    roots = list(roots)
    init_lora(((name, p) for root in roots for name, p in root.named_parameters()), seed)
    for root in roots:
        for name, module in root.named_modules():
            if isinstance(module, LoraMixin):
                _init_factors(name, module, cfg, seed, original)
            elif isinstance(module, RowsMixin) and "lora_rows" in module._parameters:
                copy_part(module.lora_rows, whole(module.weight)[list(module.lora_tokens)])
        init_copies(root)
        init_magnitudes(root)


def init_magnitudes(root: nn.Module) -> None:
    """Sets DoRA's lengths to those of the adapted weights, which leaves the model as it is."""
    for module in root.modules():
        if isinstance(module, DoraMixin):
            pairs = [(whole(module.lora_a), module.lora_factor * whole(module.lora_b))]
            if module.starts_at_weights:
                pairs.append((whole(module.lora_start_a), -module.lora_factor * whole(module.lora_start_b)))
            copy_part(module.lora_magnitude, adapted_norm(dense_weight(module), pairs))


def starting_factors(kind: str, weight: Tensor, rank: int, factor: float) -> tuple[Tensor, Tensor]:
    """A0 (r, in) and B0 (out, r) of PiSSA or OLoRA for a weight (out, in), in at least fp32."""
    return STARTS_AT_WEIGHTS[kind](weight.detach().to(torch.promote_types(weight.dtype, torch.float32)), rank, factor)


def first_a(spec: ModelSpec, cfg: LoraConfig, seed: int) -> dict[str, Tensor]:
    """Every A of a whole model, as a run begins that draws them from the seed: what LoRA-FA leaves as it is."""
    alone = {"dora": False, "bias": "none", "lora_bias": False, "modules_to_save": [], "trainable_tokens": [], "dropout": 0.0}
    model, cfg = build_decoder(spec), replace(cfg, **alone)  # the rest begins at weights, which are not here
    apply_lora([model], cfg)
    for module in model.modules():
        if isinstance(module, LoraMixin):
            module.lora_a, module.lora_b = (nn.Parameter(torch.empty(p.shape)) for p in (module.lora_a, module.lora_b))
    init_adapters([model], cfg, seed)
    return {name: p.detach() for name, p in model.named_parameters() if name.endswith(".lora_a")}


def dense_weight(module: nn.Module) -> Tensor:
    """The whole weight (out, in) of a linear layer of any class, on every rank. A collective of the module's mesh."""
    dense = getattr(module, "whole_weight", None)  # packed layers have it
    return (dense() if dense else whole(module.weight)).detach()


def whole(x: Tensor) -> Tensor:
    """A parameter without its sharding."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach()


@torch.no_grad()
def copy_part(parameter: Tensor, value: Tensor) -> None:
    """Copies this rank's part of a whole tensor into a parameter of any placement."""
    for dim in range(parameter.ndim):
        held = shard_indices(parameter, dim)
        value = value if held is None else value.index_select(dim, held.to(value.device))
    (parameter.to_local() if isinstance(parameter, DTensor) else parameter).copy_(value)


def _init_factors(name: str, module: LoraMixin, cfg: LoraConfig, seed: int, original: Callable[[str], Tensor] | None) -> None:
    assert cfg.init != "eva", "init=eva needs batches: find_eva (peft/eva.py) gives the config and every A"
    if cfg.init == "gaussian":
        rank = module.lora_a.shape[0]
        fill_blocks(f"{name}.lora_a", module.lora_a, lambda shape, g: torch.empty(shape).normal_(0.0, 1 / rank, generator=g), seed)
    elif cfg.init == "orthogonal":
        a, b = _orthogonal(name, (len(module.lora_b), module.lora_a.shape[1]), len(module.lora_a), seed)
        copy_part(module.lora_a, a)
        copy_part(module.lora_b, b)
    elif cfg.init == "loftq":
        assert original is not None, "init=loftq compares the quantised weights with the original ones"
        seen = dense_weight(module)
        _, a, b = loftq(original(name).to(seen.device), lambda weight: seen, module.lora_a.shape[0], module.lora_factor)
        copy_part(module.lora_a, a)
        copy_part(module.lora_b, b)
    elif cfg.starts_at_weights:
        a, b = starting_factors(cfg.init, dense_weight(module), module.lora_a.shape[0], module.lora_factor)
        for part in ("", "start_"):
            copy_part(getattr(module, f"lora_{part}a"), a)
            copy_part(getattr(module, f"lora_{part}b"), b)


def _orthogonal(name: str, shape: tuple[int, int], rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """A in the span of one half of an orthogonal basis, B in that of the other, both a tenth of normal numbers, as PEFT has it."""

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=keyed_generator("orthogonal", seed, name, size))

    basis = torch.linalg.qr(draw(rank, rank)).Q
    return basis[0::2].T @ draw(rank // 2, shape[1]) / 10, draw(shape[0], rank // 2) @ basis[1::2] / 10


def _olora(weight: Tensor, rank: int, factor: float) -> tuple[Tensor, Tensor]:
    """The first `rank` rows of R and columns of Q of W = Q R."""
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


STARTS_AT_WEIGHTS = {"pissa": largest_directions, "olora": _olora}
