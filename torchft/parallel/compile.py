"""torch.compile, block by block: one graph serves all layers, and the loss and the embedding stay eager."""

from dataclasses import dataclass

from torchft.models.decoder import Decoder


@dataclass
class CompileConfig:
    enabled: bool = False  # compile each block; the first steps are slow
    backend: str = "inductor"  # inductor, or aot_eager and eager to look for errors


def apply_compile(model: Decoder, cfg: CompileConfig) -> None:
    """Compiles every block of the stage, in place."""
    if cfg.enabled:
        for block in model.layers.values():
            block.compile(backend=cfg.backend, fullgraph=True)
