"""The untrained encoder, the floor that every pretraining must beat: exactly MAE's encoder at initialisation.

A ViT with xavier weights and fixed sin-cos positions (arXiv 2111.06377), or a Swin with its own initial weights
(arXiv 2103.14030); only the seed of the run differs. Nothing is trained, so this file has no views and no loss.
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
    def check(self, image_size: int, model: dict) -> None:
        if model["embed_dim"] % 4 and isinstance(model["depth"], int):
            raise ValueError(f"model.embed_dim: found {model['embed_dim']}, expected a multiple of 4 "
                             "(sin-cos positions)")


class Method(nn.Module):
    def __init__(self, config: Config, spec, target=None):
        super().__init__()
        self.encoder = kit.create(spec) if spec.hierarchical else kit.sincos_vit(spec)
