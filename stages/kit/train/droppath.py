"""Drop path (stochastic depth, arXiv 1603.09382) whose draws are keyed, so that a batch may be cut
anywhere.

timm's layers draw from a generator that advances: what a sample gets then depends on who is
computed before it, on the micro batch and on the process. Here it depends on (seed, step, layer,
row, view) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

from timm.layers import DropPath
from torch import Tensor, nn


@contextmanager
def keyed(module: nn.Module) -> Iterator[Callable]:
    """While entered, the DropPath layers of `module` draw from the Progress last given to the
    function that this yields.

    x (V*b, ...) holds V views of the b images of a micro batch, view after view. Calls of one layer
    with equally shaped x in one step share their draws: a forward pass that is repeated for its
    gradients is the same again.
    """
    now = SimpleNamespace(progress=None)
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, DropPath) and layer.drop_prob
    }
    for name, layer in layers.items():
        layer.forward = partial(_forward, layer, name, now)
    try:
        yield partial(setattr, now, "progress")
    finally:
        for layer in layers.values():
            del layer.forward


def _forward(layer: DropPath, name: str, now: SimpleNamespace, x: Tensor) -> Tensor:
    if not layer.training:
        return x
    progress, keep = now.progress, 1 - layer.drop_prob
    views, rest = divmod(len(x), len(progress.rows))
    if rest:
        raise ValueError(
            f"drop path of {name}: found {len(x)} samples, expected views of the "
            f"{len(progress.rows)} images of the batch"
        )
    shape = "x".join(map(str, x.shape[1:]))
    kept = progress.uniform(f"drop path {name} {shape}", views).T.flatten() < keep  # (V*b,)
    scale = 1 / keep if layer.scale_by_keep and keep else 1.0
    return x * (kept.to(x.dtype) * scale).view(-1, *[1] * (x.ndim - 1))
