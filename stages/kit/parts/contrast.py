"""Momentum contrast between two views of an image: MoCo v3's training (arXiv 2104.02057).

InfoNCE, its watch over the training, and the pictures serve other contrastive methods, too.

A query is what encoder, projector and predictor make of one view; a key is what moving averages of
encoder and projector make of the other view. Each query must pick, among the keys of all images of
the batch, that of its own image (InfoNCE, without a queue). The target and the method `mocov3` are
this module; `config` is a checks.MomentumContrast. The patch projection stays as it was drawn.

Follows facebookresearch/moco-v3 with a ViT. Departures:
- the moving averages take a step's weights at the end of that step, with the momentum of the next
  one; the official code does it at the beginning of the next one, before any key is made. Only the
  last step has one more, which nobody sees: what is kept is the encoder of the queries;
- both views go through the encoder at once; projector and predictor, whose norms look at the whole
  batch, get each view by itself, as officially;
- norms have no running statistics (kit/nets/batchnorm.py); the official ones are never read;
- projector and predictor are computed in float32 whatever autocast is active: their norms enlarge
  differences between images, and rounding with them;
- the two halves of the sin-cos positions are MAE's, the column's first, where the official code has
  the row's first: another order of channels, on which nothing depends;
- the order of operations in a view is kit/data/views.py's: crop, flip, colours, grey, blur,
  solarise, where the official one flips last; below 64 pixels nothing is blurred;
- queries that find their keys no better than by chance, for long, stop the training.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.kit import dist, keyed
from stages.kit.data.views import View, linked
from stages.kit.eager import eager
from stages.kit.nets import ema, encoders
from stages.kit.nets.batchnorm import BatchNorm
from stages.kit.nets.init import moco_init
from stages.kit.nets.pictures import contact_sheet, principal_colours
from stages.kit.nets.target import Target
from stages.kit.parts.collapse import Streak

VIEWS = ("view1", "view2")
REASON = "each image is compared with all others of the batch, and norms look at all of them"
ADVICE = (
    "Try a lower lr, a longer warm-up, larger batches, weaker crops and colours, or more epochs; "
    "check that the images are not all alike."
)
NEAREST = 5  # images shown beside each


def views(config, spec) -> dict[str, View]:
    """view1 is always blurred, view2 in a tenth of the cases and sometimes solarised."""
    size = spec.image_size
    blur = config.blur and size >= 64
    common = {
        "size": size,
        "scale": (config.crop_min, 1.0),
        "flip": config.flip,
        "jitter": tuple(config.jitter),
        "jitter_p": config.jitter_p,
        "grey": config.grey,
        "blur_sigma": blur_sigma(size),
    }
    return {
        "view1": View(**common, blur=1.0 * blur),
        "view2": View(**common, blur=0.1 * blur, solarise=config.solarise),
    }


def blur_sigma(size: int) -> tuple[float, float]:
    """Range of the blur's deviation in pixels: up to 2 from 128 pixels on, less in small images."""
    return 0.1, max(0.2, 2 * min(1, size / 128))


def head(width: int, hidden: int, dim: int, layers: int) -> nn.Sequential:
    """Projector (3 layers) or predictor (2): linear layers without bias, each with a batch norm.

    After all but the last come gain, shift and ReLU; the last norm has none of them.
    """
    sizes, parts = [width, *[hidden] * (layers - 1), dim], []
    for number, (into, out) in enumerate(zip(sizes, sizes[1:], strict=False), start=1):
        last = number == layers
        parts += [nn.Linear(into, out, bias=False), BatchNorm(out, affine=not last)]
        parts += [] if last else [nn.ReLU()]
    return nn.Sequential(*parts)


class QueryEncoder(Target):
    """The encoder of the queries, which is what is kept.

    As a target it gives patches, class token and its attention after the last norm, and states
    after blocks before it. `information` says what its training reached: the mean of the last few
    hundred steps, as a share of what it can be at most.
    """

    def __init__(self, config, spec):
        super().__init__()
        self.config, self.spec = config, spec
        self.encoder = encoders.create(spec, "sincos")
        moco_init(self.encoder)
        self.encoder.patch_embed.requires_grad_(not config.freeze_patches)
        self.register_buffer("information", torch.zeros(()))
        width, self.depth = self.encoder.embed_dim, len(self.encoder.blocks)
        heads = self.encoder.blocks[-1].attn.num_heads
        self.sizes = {"patch": width, "cls": width, "attention": heads, "layers": width}

    def look(self, images: Tensor, wanted: set[str], norm: bool, layers: tuple) -> dict:
        return encoders.looked(self.encoder, self.spec.normalise(images), wanted, layers)

    def classes(self, images: Tensor) -> Tensor:
        """(B,3,H,W) in [0,1] -> class tokens (B,D) after the last norm."""
        return encoders.features(self.encoder, self.spec.normalise(images))["cls"]


class MomentumContrast(nn.Module):
    """Queries, keys, and their training."""

    whole_batch = REASON

    def __init__(self, config, spec):
        super().__init__()
        self.config, self.spec = config, spec
        self.query = QueryEncoder(config, spec)
        width = self.query.encoder.embed_dim
        self.projector = head(width, config.hidden, config.dim, layers=3)
        self.predictor = head(config.dim, config.hidden, config.dim, layers=2)
        # of the keys; both start as copies
        self.key_encoder = copy.deepcopy(self.query.encoder).requires_grad_(False)
        self.key_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.watch = InformationWatch(config.min_information)

    @property
    def encoder(self) -> nn.Module:
        """What a method exports: the encoder of the queries, as the official code evaluates it."""
        return self.query.encoder

    def param_groups(self, weight_decay: float) -> list[dict]:
        """All that is trained is decayed, biases and norms too, as officially."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return [{"params": trained, "weight_decay": weight_decay}]

    def forward(self, batch: dict, progress) -> dict[str, Tensor]:
        """{"view1", "view2": (n,3,H,W) in [0,1]} -> {"loss", "accuracy", "information"}.

        The loss is 2 T (CE(q1, k2) + CE(q2, k1)), with cross-entropies over the keys of all ranks,
        B of them; at chance it is 4 T ln B. accuracy: of queries whose key is the nearest.
        information: ln B minus the mean cross-entropy, a lower bound of the mutual information of
        the two views in nats (arXiv 1807.03748, section 2.3), at most ln B; negative for queries
        that are worse than chance.
        """
        images = torch.cat([batch[view] for view in VIEWS])
        first, second = self.queries(images)
        with torch.no_grad():
            keys = [gathered(k) for k in self.keys(images)]
        temperature, place = self.config.temperature, dist.rank() * len(first)
        pairs = ((first, keys[1]), (second, keys[0]))
        both = [info_nce(q, k, temperature, place) for q, k in pairs]
        entropy = sum(loss for loss, _ in both) / 2
        information = math.log(len(keys[0])) - entropy
        self.watch.count(entropy, len(keys[0]))
        return {
            "loss": 4 * temperature * entropy,
            "accuracy": sum(accuracy for _, accuracy in both) / 2,
            "information": information,
        }

    def queries(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Both views, one after the other (2n,3,H,W) -> unit vectors (n,dim) of each, float32."""
        return self._unit(self.query.classes(images), self.projector, self.predictor)

    def keys(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `queries`, of the moving averages."""
        found = encoders.features(self.key_encoder, self.spec.normalise(images))["cls"]
        return self._unit(found, self.key_projector)

    def _unit(self, tokens: Tensor, *heads: nn.Module) -> tuple[Tensor, Tensor]:
        return tuple(directions(view, *heads) for view in tokens.chunk(2))

    @torch.no_grad()
    def after_step(self, progress) -> None:
        """Keys follow, with the momentum of the step that comes."""
        fraction = (progress.step + 1) / progress.steps
        momentum = ema.momentum(self.config.momentum, fraction)
        ema.update(self.key_encoder, self.query.encoder, momentum)
        ema.update(self.key_projector, self.projector, momentum)
        share = self.watch.step(progress)
        if share is not None:
            weight = max(0.01, 1 / (progress.step + 1))  # a plain mean at first
            self.query.information.lerp_(share, weight)


def directions(tokens: Tensor, *heads: nn.Module) -> Tensor:
    """(n,D) through the heads, one after the other -> unit vectors (n,dim), float32 whatever
    autocast is active.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        tokens = tokens.float()
        for part in heads:
            tokens = part(tokens)
        return F.normalize(tokens, dim=1)


def info_nce(
    queries: Tensor,
    keys: Tensor,
    temperature: float,
    place: int = 0,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Unit vectors, queries (n,D) and keys (B,D) -> (cross-entropy, accuracy), float32 scalars.

    The key of query i is that in row place + i; all others are negatives. known: bool (B,), which
    rows hold a key at all; None: all do.
    """
    with torch.autocast(queries.device.type, enabled=False):
        logits = queries @ keys.T / temperature  # (n,B)
        if known is not None:
            logits = logits.masked_fill(~known, -torch.inf)
        labels = place + torch.arange(len(queries), device=queries.device)
        accuracy = (logits.detach().argmax(dim=1) == labels).to(logits.dtype).mean()
        return F.cross_entropy(logits, labels), accuracy


@eager  # it talks to the other ranks
def gathered(keys: Tensor) -> Tensor:
    """Keys (n,D) of each rank -> (B,D), in the order of the ranks; no gradient passes."""
    return dist.gather(keys.detach())


class InformationWatch(Streak):
    """Stops a training whose queries tell too little of their keys.

    That is ln B - cross-entropy, below `min_information` * ln B for many steps in a row. `count`
    takes each micro batch; `step` gives the mean over ranks as a share of ln B, or None if nothing
    was counted.
    """

    def __init__(self, min_information: float):
        super().__init__()
        self.min_information = min_information
        self._found: list[Tensor] = []  # shares of ln B

    @torch.no_grad()
    def count(self, entropy: Tensor, keys: int) -> None:
        """entropy: the mean cross-entropy over so many keys, in nats."""
        most = math.log(max(2, keys))
        self._found.append(1 - entropy.detach() / most)

    def step(self, progress) -> Tensor | None:
        if not self._found:
            return None
        share = dist.mean(torch.stack(self._found).mean())
        self._found = []

        def explain() -> str:
            return (
                f"the queries have told their keys apart too little until step "
                f"{progress.step + 1} of {progress.steps}: for {int(self.steps_below)} steps what "
                f"they say of the keys was below {self.min_information:g} of ln(batch) "
                f"(min_information), now it is {float(share):.4f} of it.\n{ADVICE} "
                "min_information: 0 lets it go on."
            )

        bound = self.min_information if self.min_information > 0 else -math.inf
        self.judge(share, bound, progress, explain)
        return share


# --------------------------------------------------------------------------------------- pictures


@torch.no_grad()
def pictures(
    query: QueryEncoder, images: Tensor, gallery: Tensor | None = None
) -> dict[str, np.ndarray]:
    """Of images (B,3,H,W) in [0,1], of which at most 8 have a row:

    - features: image | principal components of its patch tokens | its two views;
    - nearest: image | the images of the gallery (by default the others) with the most similar class
      tokens;
    - similarity: of the class tokens of first views (rows) and of second views (columns), from
      black (the least) to white. What all have in common is subtracted. A training that worked has
      a white diagonal.
    """
    seen = seen_as(views(query.config, query.spec), images)
    seen = [seen[name] for name in VIEWS]
    colours = principal_colours(query(images, "patch")["patch"])
    colours = F.interpolate(colours, size=images.shape[-2:], mode="nearest")
    columns = [images, colours, *seen]
    gallery = images if gallery is None else gallery
    first, second = alike(torch.cat([query(view, "cls")["cls"] for view in seen])).chunk(2)
    cosines = first @ second.T
    low, high = cosines.amin(), cosines.amax()
    grey = ((cosines - low) / (high - low).clamp(min=1e-9))[None, None].expand(1, 3, -1, -1)
    return {
        "features": contact_sheet([x[:8] for x in columns]),
        "nearest": nearest(gallery, query(gallery, "cls")["cls"]),
        "similarity": contact_sheet([grey], side=256),
    }


def seen_as(recipes: dict[str, View], images: Tensor) -> dict[str, Tensor]:
    """Images (B,3,H,W) in [0,1] as the views of `recipes` show them, always in the same way.

    {view: (B,3,size,size), view.box: (B,5)}, see `View.make`; on the images' device.
    """
    raw = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    rows = SimpleNamespace(images=raw, index=torch.arange(len(images)))
    key, found = partial(keyed.key, 0, "pictures"), {}
    for name, recipe in linked(recipes).items():
        found |= recipe.make(name, rows, key)
    return {name: value.to(images.device) for name, value in found.items()}


def nearest(images: Tensor, features: Tensor) -> np.ndarray:
    """Images (B,3,H,W) in [0,1] and a vector for each, (B,D) -> a contact sheet: at most 8 of them
    | the others whose vectors are the most similar, the nearest first.

    Similarity is the cosine, after what all vectors have in common was subtracted.
    """
    tokens = alike(features)
    close = (tokens @ tokens.T).fill_diagonal_(-torch.inf).argsort(dim=1, descending=True)
    close = close[:8, : min(NEAREST, len(images) - 1)]
    return contact_sheet([images[:8], *(images[n] for n in close.T)])


def alike(tokens: Tensor) -> Tensor:
    """(B,D) -> directions of what each has beside the mean."""
    return F.normalize(tokens - tokens.mean(dim=0), dim=1)
