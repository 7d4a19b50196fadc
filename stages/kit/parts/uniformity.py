"""U-MAE's term against features that are all alike (arXiv 2210.08344; PKU-ML/U-MAE, loss_func.py).

A masked autoencoder may use few directions of its feature space. The mean squared cosine of all
pairs of a batch, each image with itself included, is 1 if all features lie on a line, and 1 / width
at least for a large batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stages.kit import dist

REASON = "its uniformity term compares the features of all images of the batch"


def uniformity(features: torch.Tensor) -> torch.Tensor:
    """Mean squared cosine of all pairs of features (n,D) with those of all ranks, a scalar.

    Gradients reach the features of this rank alone. Each pair counts there twice, as (i, j) and as
    (j, i), so that the mean of the ranks' gradients is that of the whole batch.
    """
    unit = F.normalize(features if features.dtype == torch.float64 else features.float(), dim=1)
    pairs = (unit @ dist.gather(unit.detach()).T).square().mean()
    return 2 * pairs - pairs.detach()
