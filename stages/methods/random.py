"""The untrained encoder, the floor that every pretraining must beat.

By default it is MAE's encoder at initialisation: a ViT with xavier weights and fixed sin-cos
positions (arXiv 2111.06377), or a Swin with its own initial weights (arXiv 2103.14030). With
`style: beit` it is that of BEiT v2 and SimMIM: compare those two methods with this one, and give it
the `init` and `layer_scale` that they have, which other styles ignore. Unless the model has
`absolute_positions`, it has none. Nothing is trained, so this file has no views and no loss.

With `depth` it is the first blocks only; 0 leaves projected patches and positions, which is dBOT's
first teacher of large students (arXiv 2209.03917).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from stages.kit.nets import encoders
from workflow import checks

TARGET = None
NEEDS = set()
LABELS = False
TRAINS = False


@dataclass(frozen=True)
class Config(checks.BeitStart):
    depth: int | None = None  # blocks; None: all of model.depth
    style: Literal["sincos", "beit"] = "sincos"  # of a ViT: its positions and initial weights

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "[0, inf)", "depth")

    def check(self, image_size: int, model) -> None:
        plain = isinstance(model.depth, int)  # one stage
        if self.depth is not None and not (plain and 0 <= self.depth <= model.depth):
            raise ValueError(
                f"depth: found {self.depth}, expected 0 to model.depth {model.depth} of a ViT"
            )
        if self.style not in model.styles:
            raise ValueError(f"style: found {self.style!r}, expected {' or '.join(model.styles)}")
        if self.style == "beit" and self.depth is not None:
            raise ValueError(f"depth: found {self.depth}, expected none with style 'beit'")
        if self.style == "sincos" and plain:
            checks.sincos(model)


class Method(nn.Module):
    def __init__(self, config: Config, spec, target=None):
        super().__init__()
        beit = config.style == "beit"
        how = {"init": config.init, "layer_scale": config.layer_scale} if beit else {}
        self.encoder = encoders.create(spec, config.style, **how)
        if config.depth is not None:
            whole = self.encoder.state_dict()
            self.encoder = encoders.create(spec, config.style, depth=config.depth)
            self.encoder.load_state_dict({key: whole[key] for key in self.encoder.state_dict()})
