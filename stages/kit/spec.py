"""What a model must know about the data: sizes, normalisation, counts. Built from data.json and
params, nothing else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import lru_cache

import torch

from stages.kit.eager import constant


@dataclass(frozen=True)
class Spec:
    """Facts shared by methods, targets and tasks.

    image_size: side of the (square) training image in pixels; model: the `model` section of
    params.yaml; mean, std: of pixels in [0, 1], per channel; num_classes: of the data set; images:
    size of the train split.
    """

    image_size: int
    model: dict
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    images: int

    @classmethod
    def of(cls, info: dict, image_size: int, model: dict) -> Spec:
        """From the content of data.json (`store.info`), the image size and the model section."""
        return cls(
            image_size=image_size,
            model=dict(model),
            mean=tuple(info["mean"]),
            std=tuple(info["std"]),
            num_classes=len(info["classes"]),
            images=info["splits"]["train"]["count"],
        )

    @classmethod
    def from_json(cls, values: dict) -> Spec:
        """The inverse of `to_json`; unknown keys (of a later version) are ignored."""
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in values.items() if key in known}
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})

    def to_json(self) -> dict:
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @property
    def hierarchical(self) -> bool:
        """Whether the student has stages of falling resolution (a list of depths), as Swin has."""
        return isinstance(self.model.get("depth"), list | tuple)

    @property
    def stride(self) -> int:
        """Side in pixels of a token that the student gives: patch_size, doubled by each stage after
        the first.
        """
        stages = len(self.model["depth"]) if self.hierarchical else 1
        return self.model["patch_size"] * 2 ** (stages - 1)

    @property
    def grid(self) -> int:
        """Tokens per side that the student gives, which is where targets lie."""
        return self.image_size // self.stride

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """(B,3,H,W) in [0,1] -> zero mean and unit variance per channel, by this data set's
        statistics.
        """
        mean, inverse = _constants(self.mean, self.std, images.device, images.dtype)
        return (images - mean) * inverse

    def denormalise(self, images: torch.Tensor) -> torch.Tensor:
        """The inverse of `normalise` (not clamped)."""
        mean, inverse = _constants(self.mean, self.std, images.device, images.dtype)
        return images / inverse + mean


@constant
def _constants(mean: tuple, std: tuple, device: torch.device, dtype: torch.dtype):
    return _copied(mean, std, device, dtype)


@lru_cache(maxsize=32)  # a copy from the host every step would be a synchronisation on a GPU
def _copied(mean: tuple, std: tuple, device: torch.device, dtype: torch.dtype):
    mean = torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1)
    inverse = 1 / torch.tensor(std, dtype=torch.float64).view(-1, 1, 1)
    return mean.to(device, dtype), inverse.to(device, dtype)


def configure(config_class: type, values: dict):
    """`config_class(**values)` for values that came through JSON: its lists become tuples again, as
    in the defaults.
    """
    return config_class(**{key: _tuples(value) for key, value in values.items()})


def _tuples(value):
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
