"""CLIP's image tower (arXiv 2103.00020) with weights of the user's, as EVA, MILAN, BEiT v2, dBOT
and MimCo look at it.

Weights:
- `timm:NAME`: from the network or timm's cache. Names with `clip_quickgelu` are OpenAI's function:
  the same name without `quickgelu` has the same weights and another activation;
- `local:FOLDER`: what timm's save_for_hf wrote of a CLIP tower with its projection as head;
- `file:PATH`: a state dict of OpenAI's CLIP or of open_clip, a ViT. It is read without running code
  of its own. OpenAI's file is an archive of code; where it is trusted, this makes a state dict of
  it once: torch.save(torch.jit.load("ViT-B-16.pt", map_location="cpu").state_dict(), "clip.pt").
  Only the image tower is read, in float32. A file does not tell its activation (`activation`):
  OpenAI's and the open_clip models whose names end in -quickgelu have QuickGELU, others GELU.

What the papers use, all of the last block, normed and projected:

| paper | setting |
|---|---|
| BEiT v2, EVA, dBOT | the defaults: CLIP's statistics of the input |
| dBOT with ViT-L/14, for 14x14 patches | `input_size: 196` |
| MILAN | `normalise: imagenet`, the student's, which its code gives CLIP unchanged |

A tower with another grid than the student's is brought to it: features are averaged or interpolated
(ours), so ViT-B/16 at its 224 pixels teaches a student of 8x8 patches. `average` above 1 is MILAN's
average over the last blocks: normed each, averaged, normed again. Its released code counts one
block too many there and fails.

CLIP saw captions, not class labels, so its students compete in the report. Weights that were tuned
on classes say so with `labels: true`; a timm name tells by itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from stages.kit.nets.pictures import contact_sheet
from stages.kit.parts import health as measure
from stages.kit.parts.selfdistil import feature_columns
from stages.kit.parts.timm_weights import fetched, named, saw_labels
from stages.kit.parts.tower import STATISTICS, Tower
from stages.kit.parts.weights import WeightsError, first_line, read_state
from workflow import checks

PRODUCES = {"patch", "cls", "attention"}
UPSTREAM = None
READS = ("config.json", "model.safetensors")  # of a local folder
LABELS = False  # unless `labels` below says otherwise

MODELS = {"quickgelu": "vit_base_patch16_clip_quickgelu_224", "gelu": "vit_base_patch16_clip_224"}
HEAD = 64  # channels of an attention head in CLIP's ViTs


@dataclass(frozen=True)
class Config:
    weights: str = "timm:vit_base_patch16_clip_quickgelu_224.openai"  # or local:, file:
    activation: Literal["quickgelu", "gelu"] = "quickgelu"  # of `file:` weights
    layer: int = -1  # the last block that is used, negative from the end
    average: int = 1  # how many blocks, up to that one, are averaged
    post_norm: bool = True  # the last norm on patches, too
    project: bool = True  # the projection on all tokens
    normalise: Literal["clip", "imagenet", "inception"] = "clip"  # statistics of its input
    input_size: int | None = None  # pixels that the image is resized to; None: the tower's own
    labels: bool | None = None  # whether labels trained the weights; None: as their name says
    min_rank: float = 4.0  # effective rank over the validation images; below, the stage fails

    def __post_init__(self):
        kind, _, name = self.weights.partition(":")
        if kind not in ("timm", "local", "file") or not name:
            raise ValueError(
                f"weights: found {self.weights!r}, expected 'timm:NAME', 'local:FOLDER' or "
                "'file:PATH'"
            )
        if self.layer == 0:
            raise ValueError("layer: found 0, expected a block's number from 1, or from the end")
        checks.within(self, "[1, inf)", "average", most=checks.MOST_DEPTH)
        checks.within(self, "[4, inf)", "input_size", most=checks.MOST_PIXELS)
        checks.within(self, "[0, inf)", "min_rank")


def labels(config: Config) -> bool:
    """Whether class labels trained the weights. Captions are none."""
    if config.labels is not None:
        return config.labels
    return config.weights.startswith("timm:") and saw_labels(config.weights)


class Target(Tower):
    """The tower. It is empty until `prepare` finds the weights, or `load_state_dict` brings them.

    `card` in the state says how to build it, in the bytes of a JSON text.
    """

    def __init__(self, config: Config, spec):
        super().__init__()
        self.config, self.spec = config, spec
        self.register_buffer("card", torch.zeros(0, dtype=torch.uint8))
        self.eval()

    def prepare(self) -> Target:
        """Finds the weights and builds the tower; returns the target itself.

        ValueError, WeightsError or RuntimeError, with what to do, if that is impossible.
        """
        network, card = _found(self.config)
        size = self.config.input_size or card["args"]["img_size"]
        if size % card["args"]["patch_size"]:
            raise ValueError(
                f"input_size: found {size}, expected a multiple of the tower's patches of "
                f"{card['args']['patch_size']} pixels"
            )
        network.set_input_size(img_size=size)
        card["args"]["img_size"] = size
        described = json.dumps(card, sort_keys=True).encode()
        self._build(card, network)
        self.card = torch.tensor(list(described), dtype=torch.uint8, device=self.card.device)
        return self

    def forward(self, images: torch.Tensor, *wanted: str, **how) -> dict:
        """As every target's. RuntimeError if there are no weights yet."""
        if not self.sizes:
            raise RuntimeError("target: clip has no weights yet, call prepare() first")
        return super().forward(images, *wanted, **how)

    def _build(self, card: dict, network: VisionTransformer | None = None) -> None:
        if network is None:
            network = timm.create_model(card["architecture"], pretrained=False, **card["args"])
        depth, config = len(network.blocks), self.config
        last = config.layer if config.layer > 0 else depth + 1 + config.layer
        if not config.average <= last <= depth:
            raise ValueError(
                f"layer: found {config.layer} and average {config.average}, expected blocks among "
                f"the {depth} of {card['architecture']}"
            )
        proj = nn.Linear(network.embed_dim, network.head.out_features, bias=False)
        proj.weight = network.head.weight
        network.reset_classifier(0)
        network.family = "vit"
        blocks = range(last - config.average + 1, last + 1)
        size, statistics = card["args"]["img_size"], STATISTICS[config.normalise]
        network, proj = network.to(self.card.device), proj.to(self.card.device)
        how = {"post_norm": config.post_norm, "project": config.project}
        self.place(network, proj, size, statistics, blocks, **how)
        self.requires_grad_(False).eval()

    def _load_from_state_dict(self, state: dict, prefix: str, *args) -> None:
        saved = state.get(f"{prefix}card")
        if saved is not None:
            self._build(json.loads(bytes(saved.cpu().tolist())))
            self.card = torch.empty_like(saved, device=self.card.device)
        super()._load_from_state_dict(state, prefix, *args)


def _found(config: Config) -> tuple[VisionTransformer, dict]:
    """The tower with its weights in float32, its projection as head, and how to build it again."""
    kind, _, name = config.weights.partition(":")
    if kind == "file":
        return _of_file(Path(name).expanduser(), config)
    architecture, args, _, _, source = named(config.weights)
    network = fetched(config.weights, architecture, source, args).float()
    plain = isinstance(network, VisionTransformer) and network.cls_token is not None
    if not plain or not isinstance(network.head, nn.Linear):
        raise ValueError(
            f"weights: found {architecture}, expected a CLIP tower: a ViT of timm with a class "
            "token, and its projection as head"
        )
    if network.head.bias is not None and bool(network.head.bias.any()):
        raise ValueError(
            f"weights: the head of {architecture} has a bias, expected CLIP's projection, which "
            "has none: this head is a classifier"
        )
    embed = network.patch_embed
    args |= {"num_classes": network.head.out_features, "img_size": embed.img_size[0]}
    args |= {"patch_size": embed.patch_size[0]}
    return network, {"architecture": architecture.partition(".")[0], "args": args}


def _of_file(path: Path, config: Config) -> tuple[VisionTransformer, dict]:
    """The tower in a state dict of OpenAI's CLIP or of open_clip."""
    state = {name.removeprefix("module."): x for name, x in read_state(path).items()}
    state = {name: x.float() for name, x in state.items() if name.startswith("visual.")}
    try:
        args = _sizes(state)
        with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten
            network = timm.create_model(MODELS[config.activation], pretrained=False, **args)
        network.load_state_dict(checkpoint_filter_fn(state, network))
    except (KeyError, IndexError, RuntimeError, ZeroDivisionError) as error:
        raise WeightsError(
            f"weights: {path}: found other tensors than those of a ViT of CLIP, such as "
            f"visual.conv1.weight ({type(error).__name__}: {first_line(error)})"
        ) from None
    return network, {"architecture": MODELS[config.activation], "args": args}


def _sizes(state: dict[str, torch.Tensor]) -> dict:
    """Arguments of timm's ViT, by the shapes of CLIP's tensors. KeyError if one is missing."""
    width, _, patch, _ = state["visual.conv1.weight"].shape
    blocks = {name.split(".")[3] for name in state if name.startswith("visual.transformer.resb")}
    grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    hidden = len(state["visual.transformer.resblocks.0.mlp.c_fc.bias"])
    return {
        "img_size": patch * grid,
        "patch_size": patch,
        "embed_dim": width,
        "depth": len(blocks),
        "num_heads": max(1, width // HEAD),
        "mlp_ratio": hidden / width,
        "num_classes": state["visual.proj"].shape[1],
    }


def health(target: Target, images, config: Config) -> dict:
    """Over the validation images: effective rank and spread of the features."""
    advice = "Check that the weights are CLIP's, and that the images are not all alike."
    found = measure.of_features(target, images, config.min_rank, advice)
    return {"input_size": target.size, **found}


@torch.no_grad()
def pictures(target: Tower, images: torch.Tensor) -> dict[str, np.ndarray]:
    """features: images | principal components of the patches | the class token's attention."""
    return {"features": contact_sheet([images, *feature_columns(target, images)])}
