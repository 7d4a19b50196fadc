"""What tokenizers share: how their codes are used, and pictures of them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from stages.kit.nets.patches import patchify
from stages.kit.nets.pictures import colour_codes, contact_sheet
from stages.kit.parts import health as measure

SHOWN = 12  # codes in the picture of a codebook, and patches of each


def health(target, images: Iterable[Tensor], config, advice: str) -> dict:
    """How a tokenizer uses its codes over batches of images (B,3,H,W) in [0,1].

    Usage (share of the codes that were hit), perplexity, number of codes and of tokens, the counts
    of each code, and the problems by `config` (checks.Codes), which end with `advice`.
    """
    size = target.sizes["ids"]
    counts = torch.zeros(size, dtype=torch.int64)
    for batch in images:
        counts += torch.bincount(target(batch, "ids")["ids"].flatten().cpu(), minlength=size)
    used, spread = measure.usage(counts), float(measure.perplexity(counts))
    possible = min(size, int(counts.sum()))
    problems = []
    if used < config.min_usage:
        problems.append(
            f"the codebook has collapsed: {used:.1%} of {possible} codes are used, expected at "
            f"least {config.min_usage:.0%} (min_usage). {advice}"
        )
    if spread < config.min_perplexity * possible:
        problems.append(
            f"a few codes take almost all patches: perplexity {spread:.1f} of {possible}, expected "
            f"at least {config.min_perplexity * possible:.1f} (min_perplexity "
            f"{config.min_perplexity:g}). {advice}"
        )
    return {
        "usage": used,
        "perplexity": spread,
        "codes": size,
        "tokens": int(counts.sum()),
        "counts": counts.tolist(),
        "problems": problems,
    }


def pictures(images: Tensor, ids: Tensor, near: Tensor, patch: int) -> dict[str, np.ndarray]:
    """Pictures of the codes ids (B,N) of images (B,3,H,W) in [0,1], of patches of `patch` pixels.

    code_map: images | their codes, a colour each. codebook: the codes that are used most here, each
    with a row of its patches, the largest `near` (B,N) first.
    """
    ids, near = ids.flatten(), near.flatten()
    patches = patchify(images, patch).unflatten(2, (patch, patch, 3))
    patches = patches.flatten(0, 1).permute(0, 3, 1, 2)
    rows = []
    for code in torch.bincount(ids).argsort(descending=True, stable=True)[:SHOWN].tolist():
        mine = (ids == code).nonzero()[:, 0]
        best = mine[near[mine].argsort(descending=True, stable=True)][:SHOWN]
        blank = torch.ones(SHOWN - len(best), *patches.shape[1:], device=patches.device)
        rows.append(torch.cat([patches[best], blank]))
    maps = colour_codes(ids.view(len(images), -1), images.shape[-1])
    return {
        "code_map": contact_sheet([images, maps]),
        "codebook": contact_sheet(list(torch.stack(rows, 1)), side=32),
    }
