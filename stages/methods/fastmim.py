"""FastMIM: expediting masked image modeling pre-training for vision (arXiv 2212.06593).

SimMIM made cheap by small images and a target that stands them: histograms of oriented gradients
(HOG) in the place of pixels. Random squares of the image are painted with one learnt colour, so any
encoder will do, also one whose patches overlap. A small decoder predicts the HOG of each place, and
the loss is the squared error at painted places.

`input_size` is the side of the images in pretraining; tasks show the encoder the data's own and
resize its positions. `discard` leaves the last blocks out of pretraining: in the exported encoder
they are as they were drawn, for fine-tuning (probe the block before them: `block` of k-NN and of
the linear probe).

Follows ggjy/FastMIM.pytorch (kit/parts/fastmim.py, maskfeat.py), with these departures:
- masks are pure functions of seed, step and sample, and the count of visible squares is cut in
  exact arithmetic;
- heads of a ViT are the model's. The official class for pretraining has 6 of 128 channels, that for
  fine-tuning 12 of 64, and loads its weights all the same; which of them gave the published figures
  is not known. num_heads 6 in the model is the former, in pretraining and after;
- norms of the decoder have the eps of the encoder's last norm; there it is 1e-6 with a ViT, 1e-5
  with a Swin. As there, an encoder with stages gets xavier weights in its linear layers;
- a square that is larger or smaller than a token, and cells of another size than 8, work for every
  encoder. Errors are means over cells, which for squares of whole tokens are those over tokens;
- the target is computed in float32 under autocast, too, and its sums bin by bin;
- defaults are for small images; PUBLISHED is the recipe for ImageNet and ViT-B/16 at 128 pixels.
  Swin-B: 400 epochs of 2048 images, squares of 32 pixels (its stride), decoder_depth 4; PVTv2-B2:
  predict pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

from stages.kit.data.views import View
from stages.kit.parts.fastmim import PaintedImages
from workflow import checks

TARGET = None
NEEDS = set()
LABELS = False
TRAINS = True
PUBLISHED = {
    "epochs": 800,
    "batch_size": 4096,
    "input_size": 128,
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
    pass


def views(config: Config, spec) -> dict[str, View]:
    return {"view": View(size=spec.image_size, scale=(config.crop_min, 1.0), flip=config.flip)}


class Method(PaintedImages):
    def __init__(self, config: Config, spec, target=None):
        super().__init__(config, spec)
