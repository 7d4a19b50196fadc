"""The untrained encoder, the floor that every pretraining must beat.

By default exactly MAE's encoder at initialisation: a ViT with xavier weights and fixed sin-cos
positions (arXiv 2111.06377), or a Swin with its own initial weights (arXiv 2103.14030). With
`family: beit` that of BEiT v2 and SimMIM, which knows no absolute positions and starts far lower:
compare these two with it. Nothing is trained, so this file has no views and no loss. With `depth`,
the first blocks only; 0 leaves projected patches and positions, which is dBOT's first teacher of
large students (arXiv 2209.03917).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from stages.kit.nets import encoders
from workflow import checks

TARGET = None
ENCODERS = ("vit", "swin", "convvit")
LABELS = False
TRAINS = False


@dataclass(frozen=True)
class Config:
    depth: int | None = None  # blocks; None: all of model.depth
    family: Literal["vit", "beit"] = "vit"  # of a ViT: whose positions and initial weights
    layer_scale: float = 0.1  # of family beit

    def check(self, image_size: int, model: dict) -> None:
        if self.depth is not None and not (
            isinstance(model["depth"], int) and 0 <= self.depth <= model["depth"]
        ):
            raise ValueError(
                f"depth: found {self.depth}, expected 0 to model.depth {model['depth']} of a ViT"
            )
        if self.family == "beit":
            if not isinstance(model["depth"], int) or model["name"].startswith("convvit"):
                raise ValueError(
                    f"family: found 'beit', expected 'vit' with model.name {model['name']}"
                )
            if self.depth is not None:
                raise ValueError("depth: cuts an encoder of family vit, found family 'beit'")
        elif isinstance(model["depth"], int):
            checks.sincos(model)


class Method(nn.Module):
    def __init__(self, config: Config, spec, target=None):
        super().__init__()
        if config.family == "beit":
            self.encoder = encoders.beit_vit(spec, init_values=config.layer_scale)
        else:
            self.encoder = encoders.create(spec) if spec.hierarchical else encoders.sincos_vit(spec)
        if config.depth is not None:
            whole, self.encoder = (
                self.encoder.state_dict(),
                encoders.create(spec, depth=config.depth),
            )
            self.encoder.load_state_dict({key: whole[key] for key in self.encoder.state_dict()})
