"""What a model must know about the data and its encoder: sizes, normalisation, counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from stages.kit.eager import constant
from workflow import plugins


@dataclass(frozen=True)
class Spec:
    """Facts that methods, targets and tasks share; built from data.json and params, nothing else.

    image_size: side of the square images in pixels; kind, model: the encoder's family (a file in
    stages/encoders) and its Config; mean, std: of pixels in [0, 1], per channel; num_classes: of
    the data set; images: size of the train split; classes: their names, where they are known.
    """

    image_size: int
    kind: str
    model: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    images: int
    classes: tuple[str, ...] = ()

    @classmethod
    def of(cls, info: dict, image_size: int, model: dict) -> Spec:
        """From the content of data.json (`store.info`), the image size and {"kind", "config"}."""
        return cls(
            image_size=image_size,
            kind=model["kind"],
            model=encoder_config(model["kind"], model["config"]),
            mean=tuple(info["mean"]),
            std=tuple(info["std"]),
            num_classes=len(info["classes"]),
            images=info["splits"]["train"]["count"],
            classes=tuple(info["classes"]),
        )

    @classmethod
    def from_json(cls, values: dict) -> Spec:
        """The inverse of `to_json`."""
        model = encoder_config(values["kind"], values["model"])
        mean, std = tuple(values["mean"]), tuple(values["std"])
        classes = tuple(values.get("classes", ()))
        return cls(**{**values, "model": model, "mean": mean, "std": std, "classes": classes})

    def to_json(self) -> dict:
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    def at(self, image_size: int | None) -> Spec:
        """The same for images of another size; None leaves it as it is."""
        size = image_size or self.image_size
        return replace(self, image_size=size, model=self.model.at(self.image_size, size))

    @property
    def patch(self) -> int:
        """Side in pixels of a patch, as the encoder embeds it."""
        return self.model.patch_size

    @property
    def stride(self) -> int:
        """Side in pixels of a token that the encoder gives; more than `patch` after stages."""
        return self.model.stride

    @property
    def grid(self) -> int:
        """Tokens per side that the encoder gives, which is where targets lie."""
        return self.model.grid(self.image_size)

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


def encoder_config(kind: str, values: dict):
    """The Config of a family of encoders."""
    return configure(plugins.module("encoder", kind).Config, values)


def configure(config_class: type, values: dict):
    """`config_class(**values)` for values that came through JSON: lists become tuples, as in the
    defaults.
    """
    return config_class(**{key: _tuples(value) for key, value in values.items()})


def _tuples(value):
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
