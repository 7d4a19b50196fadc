"""FastMIM-P: FastMIM whose images grow within one training (arXiv 2212.06593).

The first steps see small images and many of them, the last ones images of full size: views, images
of a step and rate follow the share of the training that is behind. All else is FastMIM
(methods/fastmim.py).

The official code switches size, batch and accumulation by epoch and recomputes the rate for the
batch, but it cannot be run: its encoders assert one size of image, their positions do not follow,
and no schedule is published. So the schedule is ours:
- `sizes` are shares of the side of the full image, rounded to whole tokens; a ViT's positions, made
  for the full size, are resized by timm as for a transfer;
- a step takes `batches` of train.batch_size images (kit/growth.py): with tokens halved it sees
  twice as many images, and the number of steps stays;
- the rate follows by the linear rule where `lr_per` is given;
- a squared error is a mean over all painted cells of a step's part, so that its images weigh alike
  whatever their size.
With compute.compile each size is compiled once. The optimiser, its moments and the schedule of the
rate go on from size to size.
"""

from __future__ import annotations

from dataclasses import dataclass

from stages.kit.data.views import View
from stages.kit.parts.fastmim import PaintedImages
from workflow import checks

TARGET = None
NEEDS = {"sizes"}
LABELS = False
TRAINS = True
PUBLISHED = {
    "epochs": 800,
    "batch_size": 4096,
    "predict": "hog",
    "norm": True,
    "mask_ratio": 0.75,
    "cell": 8,
    "decoder_dim": 256,
    "decoder_depth": 1,
    "decoder_heads": 8,
    "crop_min": 0.2,
    "lr": 0.00015,
    "lr_per": 256,
    "min_lr": 0.0,
    "warmup": 0.025,
    "weight_decay": 0.05,
    "betas": [0.9, 0.95],
}


@dataclass(frozen=True)
class Config(checks.PaintedImages):
    sizes: tuple[float, ...] = (0.5, 0.75, 1.0)  # of the images, shares of the full side
    until: tuple[float, ...] = (0.5, 0.8)  # shares of the training at which the next size begins
    batches: tuple[int, ...] = (4, 2, 1)  # of batch_size images in a step of each size

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "(0, 1]", "sizes")
        checks.within(self, "(0, 1)", "until")
        checks.within(self, "[1, inf)", "batches", most=1000)
        for key, count in (("until", len(self.sizes) - 1), ("batches", len(self.sizes))):
            if len(getattr(self, key)) != count:
                raise ValueError(
                    f"{key}: found {len(getattr(self, key))} entries, expected {count} for the "
                    f"{len(self.sizes)} of sizes"
                )
        for key in ("sizes", "until"):
            found = getattr(self, key)
            if list(found) != sorted(set(found)):
                raise ValueError(f"{key}: found {list(found)}, expected rising numbers")
        if self.sizes[-1:] != (1.0,):
            raise ValueError(f"sizes: found {list(self.sizes)}, expected 1.0 as the last")

    @property
    def growth(self) -> tuple[tuple[float, int], ...]:
        """(share of the training from which on, batches of a step)."""
        return tuple(zip((0.0, *self.until), self.batches, strict=True))

    def size(self, image_size: int, model, fraction: float) -> int:
        """Side of the images at this share of the training: whole tokens and painted squares."""
        share = self.sizes[sum(fraction >= end for end in self.until)]
        unit = max(model.stride, self.side(model))
        return max(1, round(share * image_size / unit)) * unit

    def check(self, image_size: int, model) -> None:
        for fraction in (0.0, *self.until):
            super().check(self.size(image_size, model, fraction), model)


def views(config: Config, spec, fraction: float = 0.0) -> dict[str, View]:
    size = config.size(spec.image_size, spec.model, fraction)
    return {"view": View(size=size, scale=(config.crop_min, 1.0), flip=config.flip)}


class Method(PaintedImages):
    def __init__(self, config: Config, spec, target=None):
        super().__init__(config, spec, sizes=True)
