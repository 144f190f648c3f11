"""EVA (Paischer et al. 2024): A begins at the principal components of what a layer is given, and layers share the ranks by them.

    batches --base model--> inputs of each layer at trained tokens --Pca--> components (most, in), share of the variance each explains
    the largest shares of all layers together, as many as there were ranks --> a layer's rank; its A = so many components; B = 0

A layer without a rank gets no adapter; alpha goes with the rank, so that the factor stays. Layers with one input (q, k, v) share one Pca.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from torchft.batch import Batch
from torchft.models.decoder import Decoder
from torchft.peft.lora import LoraConfig, adapted


@dataclass
class Eva:
    """What EVA found: the config with every layer's rank and alpha, and A of each by name."""

    cfg: LoraConfig
    factors: dict[str, Tensor]  # module -> (rank, in)


class Pca:
    """Principal components of rows that come batch by batch (Ross et al. 2008), exact as long as no more are needed than are kept."""

    def __init__(self, most: int):
        self.most, self.count = most, 0
        self.mean = self.scatter = torch.zeros(0)  # of each column; the sum of squares around it
        self.values, self.components = torch.zeros(0), torch.zeros(0)  # (k,), (k, columns)

    def update(self, x: Tensor) -> None:
        """Rows (n, columns)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        n, mean = len(x), x.mean(dim=0)
        rows, scatter = x - mean, (x - mean).square().sum(dim=0)
        if self.count:
            share = self.count * n / (self.count + n)
            rows = torch.cat([self.values[:, None] * self.components, rows, share**0.5 * (self.mean - mean)[None]])
            scatter = self.scatter + scatter + share * (self.mean - mean).square()
            mean = (self.count * self.mean + n * mean) / (self.count + n)
        self.count, self.mean, self.scatter = self.count + n, mean, scatter
        _, values, components = torch.linalg.svd(rows, full_matrices=False)
        signs = components.gather(1, components.abs().argmax(dim=1, keepdim=True)).sign()  # the largest number of each is positive
        self.values, self.components = values[: self.most], (components * signs)[: self.most]

    def shares(self) -> list[float]:
        """Of all variance, what each component explains."""
        return (self.values.square() / self.scatter.sum()).tolist()


@torch.no_grad()
def find_eva(model: Decoder, batches: Iterable[Batch], cfg: LoraConfig, rho: float = 2.0) -> Eva:
    """EVA of a base model that is not sharded, over these batches. rho: a layer's rank is at most rho times that of cfg.

    Tokens that train (weights > 0) count. Raises ConfigError as LoRA does for a target that does not exist.
    """
    names = adapted([model], cfg)
    most = {name: round(rho * cfg.rank_of(name)) for name in names}
    pcas = _observe(model, batches, names, max(most.values()))
    ranks = deal_ranks({name: pcas[name].shares()[: most[name]] for name in names}, sum(map(cfg.rank_of, names)))
    kept = [name for name in names if ranks[name]]
    alphas = {name: cfg.alpha_of(name) * ranks[name] / cfg.rank_of(name) for name in kept}
    found = replace(cfg, init="default", targets=kept, exclude=[], layers=[], alpha_pattern=alphas)
    found.rank_pattern = {name: ranks[name] for name in kept}
    return Eva(found, {name: pcas[name].components[: ranks[name]] for name in kept})


def deal_ranks(shares: dict[str, list[float]], budget: int) -> dict[str, int]:
    """How many of the `budget` largest shares are each layer's; of equal ones the earlier layer's first."""
    ordered = sorted(((-share, place, name) for place, (name, own) in enumerate(shares.items()) for share in own))
    counts = dict.fromkeys(shares, 0)
    for _, _, name in ordered[:budget]:
        counts[name] += 1
    return counts


def _observe(model: Decoder, batches: Iterable[Batch], names: list[str], most: int) -> dict[str, Pca]:
    """The Pca of every layer's inputs."""
    owners: dict[str, str] = {}  # layer -> the first one that is given the same tensor
    pcas = {name: Pca(most) for name in names}
    given: list[tuple[Tensor, str]] = []  # of the forward that runs
    chosen = torch.empty(0)

    def look(name: str, x: Tensor) -> None:
        owners[name] = next((first for tensor, first in given if tensor is x), name)
        if owners[name] == name:
            given.append((x, name))
            pcas[name].update(x[chosen])

    wanted = set(names)
    handles = [module.register_forward_pre_hook(_looker(name, look)) for name, module in model.named_modules() if name in wanted]
    training = model.training
    try:
        model.eval()
        for batch in batches:
            given.clear()
            chosen = batch.weights > 0
            if chosen.any():
                model(batch.tokens, layout=batch.layout(), positions=batch.positions, reduce=lambda hidden, heads: hidden)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {name: pcas[owners[name]] for name in names}


def _looker(name: str, look: Callable[[str, Tensor], None]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda module, args: look(name, args[0])
