"""The methods of adapters, each in a file of its own, behind one set of functions: which one it is, its config's class tells.

    apply_adapter (on meta, before parallelism) --> parallelize --> weights --> init_adapter --> training --> files, or merged

A method that changes weights only in a way that a weight can carry is merged row by row; the others have no `merger`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from torchft.models.decoder import build_decoder
from torchft.models.spec import ModelSpec
from torchft.peft.ia3 import Ia3Config, apply_ia3, ia3_merger, init_ia3
from torchft.peft.inits import init_adapters
from torchft.peft.linear import is_adapter
from torchft.peft.llama_pro import LlamaProConfig, apply_llama_pro, base_name, expanded, init_llama_pro
from torchft.peft.lora import LoraConfig, apply_lora
from torchft.peft.oft import OftConfig, apply_oft, init_oft, oft_merger
from torchft.peft.prefix import PrefixConfig, apply_prefix, init_prefix
from torchft.peft.vera import VeraConfig, apply_vera, init_vera, vera_merger
from torchft.peft.virtual import PromptConfig, PTuningConfig, apply_p_tuning, apply_prompt, init_p_tuning, init_prompt

Merge = Callable[[Tensor, slice, Mapping[str, Tensor]], Tensor]  # (rows of W, which, the layer's own tensors) -> those rows, merged


@dataclass(frozen=True)
class Method:
    """What a method does. `apply` freezes the base and raises ConfigError; `init` sets every adapter parameter."""

    config: type
    apply: Callable[[Sequence[nn.Module], Any], None]
    init: Callable[[Sequence[nn.Module], Any, int], None]
    merger: Callable[[Any, Mapping[str, tuple[int, int]]], Merge] | None = None  # (config, (out, in) of its layers); LoRA has its own


METHODS = {
    "lora": Method(LoraConfig, apply_lora, init_adapters),
    "ia3": Method(Ia3Config, apply_ia3, init_ia3, ia3_merger),
    "vera": Method(VeraConfig, apply_vera, init_vera, vera_merger),
    "oft": Method(OftConfig, apply_oft, init_oft, oft_merger),
    "prompt": Method(PromptConfig, apply_prompt, init_prompt),
    "p_tuning": Method(PTuningConfig, apply_p_tuning, init_p_tuning),
    "prefix": Method(PrefixConfig, apply_prefix, init_prefix),
    "llama_pro": Method(LlamaProConfig, apply_llama_pro, init_llama_pro),
}


def method_of(cfg: Any) -> Method:
    """The method whose config this is."""
    return next(method for method in METHODS.values() if isinstance(cfg, method.config))


def config_from(section: Mapping[str, Any]) -> Any:
    """The method's config out of a recipe's section `adapter`, as plain values; keys of no method are left out."""
    name = section.get("method", "lora")
    cls = METHODS[name].config
    values, own = section if name == "lora" else section.get(name) or {}, {f.name for f in fields(cls)}
    return cls(**{key: value for key, value in values.items() if key in own})


def apply_adapter(modules: Sequence[nn.Module], cfg: Any) -> None:
    """Freezes this rank's stages (on meta) and puts the adapter on. Raises ConfigError."""
    method_of(cfg).apply(modules, cfg)


def init_adapter(modules: Sequence[nn.Module], cfg: Any, seed: int) -> None:
    """First values of a new adapter, the same on every layout; the base's weights are loaded."""
    method_of(cfg).init(modules, cfg, seed)


def num_virtual_of(cfg: Any) -> int:
    """Virtual tokens that the method puts before each document; 0 for one that puts none."""
    return cfg.num_tokens if isinstance(cfg, PromptConfig | PTuningConfig | PrefixConfig) else 0


def grown(spec: ModelSpec, cfg: Any) -> ModelSpec:
    """The model that is built for a base: with more layers where the method adds some. Raises ConfigError."""
    return expanded(spec, cfg) if isinstance(cfg, LlamaProConfig) else spec


def base_names(names: Iterable[str], base: ModelSpec, cfg: Any) -> dict[str, str]:
    """Where the weights of the built model stand in its base, by our names; what the method adds itself is not among them."""
    names = [name for name in names if not is_adapter(name)]
    return {name: base_name(name, base.num_layers, cfg) if isinstance(cfg, LlamaProConfig) else name for name in names}


def trained_names(spec: ModelSpec, cfg: Any) -> set[str]:
    """The parameters of the whole model that train. Raises ConfigError for a target that does not exist."""
    model = build_decoder(spec)
    apply_adapter([model], cfg)
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
