"""Virtual tokens before each document: prompt tuning (Lester et al. 2021) and P-tuning (Liu et al. 2021) train what is embedded there.

    tokens     -1 -2 -3 a b c | -1 -2 -3 d e        ids below 0 are virtual; two documents of a packed row
    embedded    p0 p1 p2 . . .   p0 p1 p2 . .        p (n, d): prompt_tokens itself, or an MLP of it (P-tuning)

The loader puts the ids there (TokenCache.with_virtual), so positions, masks and packing need nothing new, and a pipeline's other stages
know nothing of it. Prefix tuning (peft/prefix.py) uses the same places.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from torchft.dist import keyed_generator
from torchft.errors import Problem
from torchft.models.init import fill_blocks
from torchft.peft.inits import copy_part, whole
from torchft.peft.swap import add_parameter, freeze, swapped

MLP = ("prompt_w0", "prompt_b0", "prompt_w1", "prompt_b1", "prompt_w2", "prompt_b2")


@dataclass
class PromptConfig:
    """Prompt tuning: the embeddings of virtual tokens train."""

    num_tokens: int = 20  # virtual tokens before each document
    init: Literal["vocab", "normal"] = "vocab"  # embeddings of tokens drawn by the seed, or normal numbers of deviation 1

    def check(self) -> Iterator[Problem]:
        if self.num_tokens < 1:
            yield Problem("adapter.prompt.num_tokens", str(self.num_tokens), "a whole number >= 1", "use 20")


@dataclass
class PTuningConfig:
    """P-tuning: an MLP makes the embeddings of virtual tokens; it and what it reads train."""

    num_tokens: int = 20  # virtual tokens before each document
    hidden_size: int = 0  # of the MLP; 0: the model's

    def check(self) -> Iterator[Problem]:
        if self.num_tokens < 1:
            yield Problem("adapter.p_tuning.num_tokens", str(self.num_tokens), "a whole number >= 1", "use 20")
        if self.hidden_size < 0:
            yield Problem("adapter.p_tuning.hidden_size", str(self.hidden_size), "0 or more", "use 0, the model's")


class VirtualMixin:
    """Goes before the class of `embed_tokens`: ids below 0 are virtual, -1 the first. Under `adapters_off` there must be none: the base is
    the model over batches without them."""

    TP_DIMS = {name: (None, None) for name in ("prompt_tokens", *MLP)}
    adapter_on = True
    num_virtual: int

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.adapter_on and bool((tokens < 0).any()):
            raise ValueError("adapters_off over a batch with virtual tokens (ids below 0): the base reads batches made without them")
        h = super().forward(tokens.clamp(min=0))
        if not hasattr(self, "prompt_tokens"):
            return h  # prefix tuning, which puts keys and values there
        if isinstance(h, DTensor):
            h = h.redistribute(placements=[Replicate()] * h.device_mesh.ndim)
        rows = F.embedding((-1 - tokens).clamp(min=0), self.prompt())
        return torch.where((tokens < 0)[..., None], rows, h)

    def prompt(self) -> Tensor:
        """The embeddings of the virtual tokens: (n, d)."""
        if not hasattr(self, "prompt_w0"):
            return self.prompt_tokens
        return mlp(self.prompt_tokens, *(getattr(self, name) for name in MLP))


def mlp(x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """P-tuning's (n, d) -> (n, d)."""
    return F.linear(F.relu(F.linear(F.relu(F.linear(x, w0, b0)), w1, b1)), w2, b2)


def apply_virtual(modules: Sequence[nn.Module], num_tokens: int) -> Iterator[nn.Module]:
    """Freezes this rank's stages and lets the embedding, if it is here, take virtual ids; gives it."""
    freeze(modules)
    for _, module in swapped([root for root in modules if root.first], ["embed_tokens"], VirtualMixin):
        module.num_virtual = num_tokens
        yield module


def apply_prompt(modules: Sequence[nn.Module], cfg: PromptConfig) -> None:
    """Freezes this rank's stages and puts the virtual tokens on the first."""
    for module in apply_virtual(modules, cfg.num_tokens):
        add_parameter(module, "prompt_tokens", cfg.num_tokens, module.embedding_dim)


def apply_p_tuning(modules: Sequence[nn.Module], cfg: PTuningConfig) -> None:
    """Freezes this rank's stages and puts the virtual tokens and their MLP on the first."""
    for module in apply_virtual(modules, cfg.num_tokens):
        d = module.embedding_dim
        hidden = cfg.hidden_size or d
        shapes = ((hidden, d), (hidden,), (hidden, hidden), (hidden,), (d, hidden), (d,))
        for name, shape in (("prompt_tokens", (cfg.num_tokens, d)), *zip(MLP, shapes, strict=True)):
            add_parameter(module, name, *shape)


@torch.no_grad()
def init_prompt(modules: Sequence[nn.Module], cfg: PromptConfig, seed: int) -> None:
    """Embeddings of tokens drawn by the seed, or normal numbers."""
    for module in (root.embed_tokens for root in modules if root.first):
        if cfg.init == "normal":
            fill_normal("embed_tokens.prompt_tokens", module.prompt_tokens, seed)
            continue
        drawn = torch.randint(module.num_embeddings, (cfg.num_tokens,), generator=keyed_generator("prompt", seed, cfg.num_tokens))
        copy_part(module.prompt_tokens, whole(module.weight)[drawn.to(module.weight.device)])


@torch.no_grad()
def init_p_tuning(modules: Sequence[nn.Module], cfg: PTuningConfig, seed: int) -> None:
    """Normal numbers of deviation 1 before the MLP; its matrices uniform in +-1 / sqrt(in), as PyTorch's linear layers, its biases 0."""
    for module in (root.embed_tokens for root in modules if root.first):
        fill_normal("embed_tokens.prompt_tokens", module.prompt_tokens, seed)
        for name in MLP:
            parameter = getattr(module, name)
            if parameter.ndim == 1:
                parameter.zero_()
            else:
                fill_blocks(f"embed_tokens.{name}", parameter, _uniform, seed)


def fill_normal(name: str, parameter: Tensor, seed: int) -> None:
    """Normal numbers of deviation 1, as PEFT begins."""
    fill_blocks(name, parameter, lambda shape, g: torch.empty(shape).normal_(generator=g), seed)


def num_virtual(model: nn.Module) -> int:
    """Virtual tokens that each document must begin with; under `adapters_off` none."""
    return next((module.num_virtual for module in model.modules() if isinstance(module, VirtualMixin) and module.adapter_on), 0)


def virtual_ids(count: int) -> list[int]:
    """-1, -2, ...: the ids of virtual tokens."""
    return [-1 - i for i in range(count)]


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
