"""The untrained encoder, the floor that every pretraining must beat: exactly MAE's encoder at initialisation.

A ViT with xavier weights and fixed sin-cos positions (arXiv 2111.06377), or a Swin with its own initial weights
(arXiv 2103.14030); only the seed of the run differs. Nothing is trained, so this file has no views and no loss.
With `depth`, the first blocks only; 0 leaves projected patches and positions, which is dBOT's first teacher of large
students (arXiv 2209.03917).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from stages.kit import encoder as kit

TARGET = None
ENCODERS = ("vit", "swin", "convvit")
LABELS = False
TRAINS = False


@dataclass(frozen=True)
class Config:
    depth: int | None = None  # blocks; None: all of model.depth

    def check(self, image_size: int, model: dict) -> None:
        if self.depth is not None and not (isinstance(model["depth"], int) and 0 <= self.depth <= model["depth"]):
            raise ValueError(f"depth: found {self.depth}, expected 0 to model.depth {model['depth']} of a ViT")
        if model["embed_dim"] % 4 and isinstance(model["depth"], int):
            raise ValueError(f"model.embed_dim: found {model['embed_dim']}, expected a multiple of 4 "
                             "(sin-cos positions)")


class Method(nn.Module):
    def __init__(self, config: Config, spec, target=None):
        super().__init__()
        self.encoder = kit.create(spec) if spec.hierarchical else kit.sincos_vit(spec)
        if config.depth is not None:
            whole, self.encoder = self.encoder.state_dict(), kit.create(spec, depth=config.depth)
            self.encoder.load_state_dict({key: whole[key] for key in self.encoder.state_dict()})
