"""k-means codes of any target's features: a tokenizer that is fitted in minutes, not trained.

ClusterMIM (Du, Wang and Wang, "On the Role of Discrete Tokenization in Visual Representation
Learning", ICLR 2024; arXiv 2407.09087): mini-batch k-means of patches, either of their pixels or of
DINO's features; the number of its nearest centre is a patch's token. Here the features are those of
`upstream`: of a teacher, of another run's encoder (run:NAME), of hog or of pixels.

The fit is scikit-learn's MiniBatchKMeans (Sculley 2010), on a sample of patches. Images are those
of the training split, each seen once through a random crop, as students see them, in a random
order. Of every image as many patches are drawn, 8 at least, and only so many images are looked at
as `vectors` asks for: memory is that of `vectors` rows of features in float32. The result is a
function of the parameters; scikit-learn gets one thread, because its sums depend on their number.

- `normalise`: features are first divided by their length, so that it is their directions that are
  clustered. The centres are means of directions and stay as they are, shorter than 1.
- A centre that nothing of the sample is nearest to restarts at one of the vectors that are farthest
  from their centre. Where the sample has fewer vectors than there are codes, the last codes are
  copies of the first one and are never used.
- logits are 2 x.c - |c|^2: minus the squared distance of x to the centre c, but for |x|^2. That is
  the same for all codes, so neither the largest nor a softmax sees that it is left out. Their
  softmax is what a mixture of Gaussians of variance 1/2 around the centres says; a student that
  wants it sharper divides by a temperature.

Departures from ClusterMIM: crops and a sample instead of whole images and the whole set, and
normalised features. The students are other targets' and methods' own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import MiniBatchKMeans
from threadpoolctl import threadpool_limits

from stages import targets
from stages.kit import keyed
from stages.kit.data.views import View
from stages.kit.parts import codes
from stages.kit.parts.quantize import nearest
from workflow import checks

PRODUCES = {"ids", "logits"}
UPSTREAM = {"patch"}
LABELS = False

PER_IMAGE = 8  # patches at least


@dataclass(frozen=True)
class Config(checks.Crop, checks.Codes):
    normalise: bool = True  # cluster directions of features
    vectors: int = 100_000  # patches that are clustered, at most
    passes: int = 20  # over them, at most
    step_vectors: int = 4096  # in a mini-batch
    starts: int = 3  # initial centres that are tried; the best are taken

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "[1, inf)", "vectors", "passes", "step_vectors", "starts")
        if self.vectors < self.codes:
            raise ValueError(
                f"vectors: found {self.vectors}, expected at least as many as codes, {self.codes}"
            )


def views(config: Config, spec) -> dict[str, View]:
    return {"view": View(size=spec.image_size, scale=(config.crop_min, 1.0), flip=config.flip)}


class Target(targets.Target):
    """Images -> the nearest centre of each patch's features ("ids"), or a score of each."""

    def __init__(self, config: Config, spec, upstream):
        super().__init__()
        self.config, self.spec, self.upstream = config, spec, upstream
        self.sizes = {"ids": config.codes, "logits": config.codes}
        self.register_buffer("centres", torch.randn(config.codes, upstream.sizes["patch"]))
        self.register_buffer("explained", torch.zeros(()))  # share of the sample's variance
        self.eval()

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B,3,H,W) in [0,1] -> what is clustered, (B,N,D), float32."""
        found = self.upstream.open(images, "patch")["patch"].float()
        return F.normalize(found, dim=-1) if self.config.normalise else found

    def look(self, images: torch.Tensor, wanted: set[str], norm: bool, layers: tuple) -> dict:
        x, found = self.features(images), {}
        with torch.autocast(images.device.type, enabled=False):
            if "ids" in wanted:
                found["ids"] = assign(x, self.centres)
            if "logits" in wanted:
                found["logits"] = 2 * (extended(x) @ table(self.centres).T)
        return found

    @torch.no_grad()
    def fit(self, images: Iterable[torch.Tensor], seed: int) -> None:
        """Finds the centres. images: training images (b,3,H,W) in [0,1], each once; it takes as
        many as it needs.
        """
        patches, wanted = self.spec.grid**2, self.config.vectors
        each = min(patches, max(PER_IMAGE, math.ceil(wanted / self.spec.images)))
        sample, seen, base = [], 0, keyed.key(seed, "kmeans", "patches")
        for batch in images:
            rows = torch.arange(seen, seen + len(batch))
            which = keyed.bits(base, rows, patches).argsort(dim=1, stable=True)[:, :each]
            features = self.features(batch)
            places = which.to(features.device)[..., None].expand(-1, -1, features.shape[-1])
            sample.append(features.gather(1, places).flatten(0, 1).cpu())
            seen += len(batch)
            if seen * each >= wanted:
                break
        vectors = torch.cat(sample)[:wanted]
        if not vectors.isfinite().all():
            raise ValueError("upstream: found features that are not finite, expected numbers")
        centres = cluster(vectors, self.config, keyed.key(seed, "kmeans", "fit"))
        self.centres.copy_(centres)
        left = (vectors - centres[assign(vectors, centres)]).square().sum()
        whole = (vectors - vectors.mean(dim=0)).square().sum()
        self.explained.fill_(float(1 - left / whole) if whole > 0 else 1.0)


def extended(x: torch.Tensor) -> torch.Tensor:
    """(...,D) -> (x, 1), (...,D+1)."""
    return F.pad(x, (0, 1), value=1.0)


def table(centres: torch.Tensor) -> torch.Tensor:
    """Centres c as (c, -|c|^2 / 2), (K,D+1): whose product with (x, 1) is largest is nearest."""
    return torch.column_stack([centres, -centres.square().sum(dim=1) / 2])


def assign(x: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Features (...,D) -> the number of their nearest centre (...), int64; of equals the first."""
    return nearest(extended(x).flatten(0, -2), table(centres)).view(x.shape[:-1])


def cluster(vectors: torch.Tensor, config: Config, seed: int) -> torch.Tensor:
    """Centres (K,D) of vectors (T,D) on a CPU; the same for any number of threads."""
    count = min(config.codes, len(vectors))
    with threadpool_limits(1):
        found = MiniBatchKMeans(
            count,
            max_iter=config.passes,
            batch_size=config.step_vectors,
            n_init=config.starts,
            compute_labels=False,
            random_state=seed % 2**32,
        ).fit(vectors.numpy())
        centres = torch.from_numpy(found.cluster_centers_).float()
        ids = assign(vectors, centres)
        empty = (torch.bincount(ids, minlength=count) == 0).nonzero()[:, 0]
        far = (vectors - centres[ids]).square().sum(dim=1).argsort(descending=True, stable=True)
        centres[empty] = vectors[far[: len(empty)]]
    return torch.cat([centres, centres[:1].expand(config.codes - count, -1)])


def health(target: Target, images, config: Config) -> dict:
    """Over the validation images: usage, perplexity and counts of the codes; of the vectors that
    were clustered, the share of their variance that the codes keep.
    """
    advice = "Fewer codes, more or more varied images, or another upstream raise it."
    found = codes.health(target, images, config, advice)
    return found | {"explained": float(target.explained)}


@torch.no_grad()
def pictures(target: Target, images: torch.Tensor) -> dict[str, np.ndarray]:
    """code_map and codebook of kit/parts/codes.py; near is a small distance."""
    x = target.features(images)
    ids = assign(x, target.centres)
    far = (x - target.centres[ids]).square().sum(dim=-1)
    return codes.pictures(images, ids, -far, target.spec.stride)
