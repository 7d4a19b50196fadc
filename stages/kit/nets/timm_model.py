"""timm models in the sizes of a `models` entry, with errors that name its keys."""

from __future__ import annotations

import timm
from torch import nn

from workflow.plugins import did_you_mean


def create(spec, name: str, cls, args: dict, kw: dict, without: tuple = ()) -> nn.Module:
    """`timm.create_model` without a head for the images of `spec`.

    `args` are the family's arguments; the entry's own `args`, then `kw`, override them. `without`:
    names of the common arguments (patch_size, mlp_ratio) that the family does not have. ValueError
    for a name that timm does not have, sizes that it cannot build, or a model of another class.
    """
    model = spec.model
    spec.model.check(spec.image_size)
    common = {"patch_size": model.patch_size, "mlp_ratio": model.mlp_ratio}
    common = {key: value for key, value in common.items() if key not in without}
    args = {**common, **args, **model.args, **kw}
    if not timm.is_model(name):
        near = did_you_mean(name, timm.list_models())
        raise ValueError(f"model.name: timm has no model {name!r}{near}")
    try:
        encoder = timm.create_model(name, num_classes=0, img_size=spec.image_size, **args)
    except (TypeError, IndexError, AssertionError) as error:
        raise ValueError(f"model: timm cannot build {name!r} with {args}: {error}") from error
    if not isinstance(encoder, cls):
        expected = " or ".join(c.__name__ for c in (cls if isinstance(cls, tuple) else (cls,)))
        raise ValueError(
            f"model.name: {name!r} is a {type(encoder).__name__}, expected a {expected} "
            f"(kind {spec.kind}; the other keys of model set its sizes)"
        )
    return encoder
