"""Numbers that tell a live tokenizer or teacher from a collapsed one."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 8192  # feature vectors that are examined at most


def usage(counts: Tensor) -> float:
    """Share of the codes that were hit at least once, of min(codes, hits) that could be.

    counts (K,): how often each was hit.
    """
    possible = min(len(counts), int(counts.sum()))
    return int((counts > 0).sum()) / possible if possible else 0.0


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of frequencies or counts, (..., K) -> (...).

    K if all are equal; 1 if one has everything, or if nothing was counted at all.
    """
    counts = counts.double()
    share = counts / counts.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.special.entr(share).sum(dim=-1).exp()


def effective_rank(features: Tensor, centre: bool = True) -> float:
    """exp of the entropy of the singular values of (n,D), normalised to sum 1: from 1 to min(n,D).

    RankMe (arXiv 2210.02885, equation 1; after Roy and Vetterli 2007). centre (ours): first
    subtract the mean, whose direction would otherwise outweigh all others in the features of a
    transformer.
    """
    features = features.double()
    if centre:
        features = features - features.mean(dim=0)
    values = torch.linalg.svdvals(features)
    return float(perplexity(values)) if float(values.max()) > 1e-9 else 1.0


def spread(features: Tensor) -> float:
    """How far apart the directions of (n,D) are: 0 if all are the same, 1 if their mean is zero.

    Root of the total variance of the normalised vectors, as SimSiam watches for collapse (arXiv
    2011.10566, section 4.1).
    """
    return float(
        F.normalize(features.double(), dim=-1).var(dim=0, correction=0).sum().clamp(min=0).sqrt()
    )


def information(probabilities: Tensor) -> tuple[float, float]:
    """Distributions (n,K) of n samples -> (mean entropy, mutual information with the sample), nats.

    The second is the entropy of the mean distribution minus the mean of the entropies: 0 when all
    samples have the same distribution, be it uniform or one class; at most ln K.
    """
    probabilities = probabilities.double()
    entropy = float(torch.special.entr(probabilities).sum(dim=-1).mean())
    of_mean = float(torch.special.entr(probabilities.mean(dim=0)).sum())
    return entropy, max(0.0, of_mean - entropy)


def sample_rows(batches: Iterable[Tensor], per_image: int = 8, rows: int = ROWS) -> Tensor:
    """Features (B,N,D) of batch after batch -> those of evenly spread patches, (n,D), n <= `rows`.

    The result is float32 and on the CPU. ValueError if there is no batch.
    """
    found, count = [], 0
    for features in batches:
        patches = features.shape[1]
        which = (
            torch.linspace(0, patches - 1, min(per_image, patches), device=features.device)
            .round()
            .long()
        )
        found.append(features[:, which].flatten(0, 1).float().cpu())
        count += len(found[-1])
        if count >= rows:
            break
    if not found:
        raise ValueError("health: there are no images to examine")
    return torch.cat(found)[:rows]


def feature_problems(rank: float, spread: float, min_rank: float, advice: str) -> list[str]:
    """What is wrong with features of this effective rank and spread; empty if nothing is."""
    if not (math.isfinite(rank) and math.isfinite(spread)):
        return [f"features are not finite (effective rank {rank}, spread {spread}). {advice}"]
    if rank < min_rank:
        return [
            f"features have collapsed: effective rank {rank:.2f}, expected at least {min_rank:g} "
            f"(spread of their directions {spread:.3f}, 0 is none). {advice}"
        ]
    return []


def of_features(target, images: Iterable[Tensor], min_rank: float, advice: str) -> dict:
    """A target's health by its patch features, over batches of images (B,3,H,W) in [0,1].

    Effective rank, spread and number of channels, and the problems.
    """
    rows = sample_rows(target(batch, "patch")["patch"] for batch in images)
    rank, width = effective_rank(rows), spread(rows)
    problems = feature_problems(rank, width, min_rank, advice)
    return {"rank": rank, "spread": width, "dim": target.sizes["patch"], "problems": problems}
