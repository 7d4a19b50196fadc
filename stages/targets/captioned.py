"""A small network that knows language, trained here: a stand-in for CLIP (arXiv 2103.00020).

An image tower and a text tower learn, from pairs of an image and a caption, to give both the same
direction in a shared space. The captions are made of the images' class names by templates
(kit/parts/captions.py). So this teacher knows labels, and everything that learns from it does: the
report says so, never ranks its students with others, and shows what the teacher itself can do.
It is there to try methods that want such a teacher without a network or CLIP's weights.

The image tower is the student's encoder, with learnt positions; it gives what `clip` gives: patches
and class token after the last norm and the projection, and the attention of the class token
(kit/parts/tower.py). Of CLIP it has the symmetric InfoNCE over the batch of all ranks and a learnt
temperature. Departures from CLIP:
- with few classes most batches have several captions of one class; they are all right answers, each
  with the same share, since captions of a class say the same;
- the text tower reads words of the captions at hand, all at once, and takes their mean: no byte
  pairs, no causal mask, no end token;
- crops are smaller and colours change, as a small set of images needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.kit import dist
from stages.kit.data.views import View
from stages.kit.eager import eager
from stages.kit.nets import encoders
from stages.kit.nets.pictures import contact_sheet
from stages.kit.parts import captions
from stages.kit.parts import health as measure
from stages.kit.parts.selfdistil import feature_columns
from stages.kit.parts.tower import Tower
from workflow import checks

PRODUCES = {"patch", "cls", "attention"}
UPSTREAM = None
NEEDS = {"cls", "attention", "plain"}
LABELS = True
ADVICE = "Train it longer, or with larger batches; check that the class names fit the images."
MOST_SCALE = 100.0  # of the logits, as CLIP's


@dataclass(frozen=True)
class Config(checks.Optimiser, checks.Crop):
    dim: int = 128  # of the shared space
    text_width: int = 64
    text_depth: int = 2
    text_heads: int = 4
    temperature: float = 0.07  # at the start; it is learnt
    crop_min: float = 0.4
    jitter: float = 0.3  # of brightness, contrast and saturation
    warmup: float = 0.1
    min_rank: float = 4.0  # effective rank of the features; below, the stage fails
    min_accuracy: float = 2.0  # times chance, in which images find their captions; the same

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "[1, inf)", "dim", "text_width", "text_heads", most=checks.MOST_WIDTH)
        checks.within(self, "[1, inf)", "text_depth", most=checks.MOST_DEPTH)
        checks.within(self, "(0, inf)", "temperature", most=1000)
        checks.within(self, "[0, inf)", "jitter", "min_rank", "min_accuracy", most=1000)
        if self.text_width % self.text_heads:
            raise ValueError(
                f"text_width: found {self.text_width}, expected a multiple of text_heads "
                f"{self.text_heads}"
            )


def views(config: Config, spec) -> dict[str, View]:
    jitter = (config.jitter, config.jitter, config.jitter, 0.0)
    scale = (config.crop_min, 1.0)
    return {"view": View(spec.image_size, scale, flip=config.flip, jitter=jitter)}


class Target(Tower):
    """The image tower. `accuracy`: how often the caption that is nearest to an image was one of its
    class, over the last few hundred training steps.
    """

    def __init__(self, config: Config, spec):
        super().__init__()
        self.config, self.spec = config, spec
        encoder = encoders.create(spec, "timm")
        proj = nn.Linear(encoder.embed_dim, config.dim, bias=False)
        nn.init.normal_(proj.weight, std=encoder.embed_dim**-0.5)
        self.place(encoder, proj, spec.image_size, (spec.mean, spec.std))
        self.register_buffer("accuracy", torch.zeros(()))


class Text(nn.Module):
    """Captions as numbers of words (B,L), 0 after their end -> (B,dim)."""

    def __init__(self, config: Config, words: int, length: int):
        super().__init__()
        width = config.text_width
        self.words = nn.Embedding(words + 1, width)
        self.places = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, config.text_heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(config.text_depth)
        )
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, config.dim, bias=False)
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.places, std=0.01)
        nn.init.normal_(self.proj.weight, std=width**-0.5)

    def forward(self, text: Tensor) -> Tensor:
        x, end = self.words(text) + self.places, text == 0
        for block in self.blocks:
            x = block(x, src_key_padding_mask=end)
        said = (~end).to(x.dtype)[..., None]
        return self.proj((self.norm(x) * said).sum(1) / said.sum(1))


class Training(nn.Module):
    whole_batch = "each image is compared with the captions of all others of the batch"

    def __init__(self, config: Config, spec, upstream=None):
        super().__init__()
        if spec.num_classes < 2:
            raise ValueError(
                f"captioned needs 2 or more classes, the data set has {spec.num_classes}"
            )
        self.config, self.target = config, Target(config, spec)
        names = spec.classes or [f"class {n}" for n in range(spec.num_classes)]
        table, words = captions.table(names)
        self.register_buffer("captions", table, persistent=False)
        self.text = Text(config, len(words), table.shape[-1])
        self.scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))

    def no_weight_decay(self) -> set[str]:
        """CLIP decays weights of layers alone: no biases, gains, or numbers by themselves."""
        names = {f"target.encoder.{name}" for name in encoders.embeddings(self.target.encoder)}
        return names | {"scale", "text.places"}

    def forward(self, batch: dict, progress) -> dict[str, Tensor]:
        """{"view": (n,3,H,W) in [0,1], "label": (n,)} -> {"loss", "accuracy", "temperature"}.

        The loss is the mean of both cross-entropies over all ranks' images and captions, accuracy
        the share of images whose nearest caption is of their class.
        """
        labels = batch["label"]
        draw = progress.uniform("caption", 1)[:, 0]
        which = (draw * self.captions.shape[1]).long()
        text = self.text(self.captions[labels, which])
        images = self.target.look(batch["view"], {"cls"}, True, ())["cls"]
        images, text = (F.normalize(x.float(), dim=1) for x in (images, text))
        images, text, labels = everywhere(images), everywhere(text), dist.gather(labels)
        with torch.autocast(images.device.type, enabled=False):
            scale = self.scale.float().exp().clamp(max=MOST_SCALE)
            logits = scale * images @ text.T  # (B,B)
        right = labels[:, None] == labels
        found = (symmetric(logits, right) + symmetric(logits.T, right)) / 2
        nearest = labels[logits.detach().argmax(dim=1)]
        self._accuracy = (nearest == labels).float().mean()
        return {"loss": found, "accuracy": self._accuracy, "temperature": 1 / scale.detach()}

    @torch.no_grad()
    def after_step(self, progress) -> None:
        weight = max(0.01, 1 / (progress.step + 1))  # a plain mean at first
        self.target.accuracy.lerp_(self._accuracy, weight)


def symmetric(logits: Tensor, right: Tensor) -> Tensor:
    """Cross-entropy of the rows of logits (B,B) with all right answers (B,B, bool) alike."""
    share = right.float() / right.sum(dim=1, keepdim=True)
    return -(share * logits.log_softmax(dim=1)).sum(dim=1).mean()


@eager  # it talks to the other ranks
def everywhere(x: Tensor) -> Tensor:
    """Rows (n,D) of each rank -> (B,D), in the order of the ranks, each rank's own with gradient.

    Every rank works out the loss of all. Its gradient for a rank's own rows is whole, and a mean
    over the ranks would divide it by their number; so it is multiplied by that here.
    """
    world = dist.world()
    if world == 1:
        return x
    own = x + (world - 1) * (x - x.detach())
    parts = list(dist.gather(x.detach()).chunk(world))
    parts[dist.rank()] = own
    return torch.cat(parts)


@torch.no_grad()
def health(target: Target, images, config: Config) -> dict:
    """Over the validation images: effective rank and spread of patches. And how often the nearest
    caption was right at the end of the training, by chance one in as many as there are classes.
    """
    found = measure.of_features(target, images, config.min_rank, ADVICE)
    accuracy, chance = float(target.accuracy), 1 / target.spec.num_classes
    if not accuracy >= config.min_accuracy * chance:
        found["problems"].append(
            f"images do not find their captions: {accuracy:.1%} did, expected at least "
            f"{config.min_accuracy:g} times as many as by chance, {chance:.1%} (min_accuracy). "
            f"{ADVICE}"
        )
    return {"accuracy": accuracy, **found}


@torch.no_grad()
def pictures(target: Target, images: torch.Tensor) -> dict[str, np.ndarray]:
    """features: images | principal components of patch tokens | attention of the class token."""
    return {"features": contact_sheet([images, *feature_columns(target, images)])}
