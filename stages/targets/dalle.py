"""OpenAI's DALL-E tokenizer (arXiv 2102.12092), with which BEiT (arXiv 2106.08254) was published.

The encoder of a discrete VAE that was trained on 250 million images: residual groups of
convolutions, a score for each of 8,192 codes in each cell of 8 pixels. Nothing is trained here; the
weights are the user's: `weights: file:PATH`.

Follows openai/DALL-E (dall_e/encoder.py, utils.py) and microsoft/unilm (beit): pixels in [0,1] are
mapped to 0.8 x + 0.1; the code is the one with the largest score, no noise. It looks at 8 pixels
for each patch of the student, 112 for the published 14x14 patches of 224 pixels; images of another
size are brought to that by Lanczos' filter (kit/nets/resize.py). Departures:
- the file is read without running code of its own: .safetensors, or what torch.save wrote of a
  state dict. OpenAI's encoder.pkl is a pickled module, which is code. Where the package dall_e is
  installed and the file is trusted, this makes a state dict of it once:
  torch.save(torch.load("encoder.pkl", weights_only=False).state_dict(), "encoder.pt");
- convolutions run in the precision of the job; the official ones run in half precision on a GPU,
  the last one in float32.
Widths and blocks per group are read from the shapes of the weights.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stages import targets
from stages.kit.nets.resize import lanczos
from stages.kit.parts import codes
from stages.kit.parts.weights import WeightsError, first_line, read_state
from workflow import checks

PRODUCES = {"ids", "logits"}
UPSTREAM = None
LABELS = False
STRIDE, GROUPS = 8, 4  # pixels of a cell; groups of blocks, of which all but the last are pooled
CHUNK = 32  # images that go through at once on a CPU
FIRST, LAST = "blocks.input.w", "blocks.output.conv.w"


@dataclass(frozen=True)
class Config(checks.Codes):
    weights: str = "file:encoder.pt"  # the encoder's state dict
    codes: int = 8192  # that it has
    min_usage: float = 0.0
    min_perplexity: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not self.weights.startswith("file:") or self.weights == "file:":
            raise ValueError(f"weights: found {self.weights!r}, expected file:PATH")


class Convolution(nn.Module):
    """Of odd size, with the names and the initial weights of openai/DALL-E."""

    def __init__(self, channels: int, width: int, size: int):
        super().__init__()
        self.w = nn.Parameter(
            torch.randn(width, channels, size, size) / (channels * size**2) ** 0.5
        )
        self.b = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class Block(nn.Module):
    """x, or a projection to another width, plus four convolutions of it over `layers` squared."""

    def __init__(self, channels: int, width: int, layers: int):
        super().__init__()
        inner = width // 4
        shapes = [(channels, inner, 3), (inner, inner, 3), (inner, inner, 3), (inner, width, 1)]
        path = OrderedDict()
        for number, shape in enumerate(shapes, start=1):
            path |= {f"relu_{number}": nn.ReLU(), f"conv_{number}": Convolution(*shape)}
        same = channels == width
        self.id_path = nn.Identity() if same else Convolution(channels, width, 1)
        self.res_path, self.gain = nn.Sequential(path), 1 / layers**2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.id_path(x) + self.gain * self.res_path(x)


class Encoder(nn.Module):
    """Pixels (B,3,8G,8G) from 0.1 to 0.9 -> scores of the codes (B,K,G,G)."""

    def __init__(self, width: int = 256, blocks: int = 2, codes: int = 8192):
        super().__init__()
        parts, before = OrderedDict(input=Convolution(3, width, 7)), width
        for group in range(1, GROUPS + 1):
            made, wide = OrderedDict(), width * 2 ** (group - 1)
            for number in range(1, blocks + 1):
                made[f"block_{number}"], before = Block(before, wide, GROUPS * blocks), wide
            if group < GROUPS:
                made["pool"] = nn.MaxPool2d(2)
            parts[f"group_{group}"] = nn.Sequential(made)
        last = OrderedDict(relu=nn.ReLU(), conv=Convolution(before, codes, 1))
        self.blocks = nn.Sequential(parts | {"output": nn.Sequential(last)})

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.blocks(pixels)

    @classmethod
    def of(cls, state: dict[str, torch.Tensor]) -> Encoder:
        """One of the sizes that the weights have. KeyError if they are no encoder's."""
        first = [name for name in state if name.startswith("blocks.group_1.block_")]
        blocks = len({name.split(".")[2] for name in first})
        with torch.device("meta"):
            return cls(len(state[FIRST]), blocks, len(state[LAST])).to_empty(device="cpu")


class Target(targets.Target):
    """The tokenizer. It is empty until `prepare` reads the weights, or `load_state_dict` does."""

    def __init__(self, config: Config, spec):
        super().__init__()
        self.config, self.spec = config, spec
        self.sizes = {"ids": config.codes, "logits": config.codes}
        self.network: Encoder | None = None
        self.side = STRIDE * spec.grid  # pixels of what it looks at
        self.eval()

    def prepare(self) -> Target:
        """Reads the weights; returns the target itself. WeightsError if that is impossible."""
        path = Path(self.config.weights.partition(":")[2]).expanduser()
        state = read_state(path)
        try:
            self._build(state)
            self.network.load_state_dict(state)
        except (KeyError, RuntimeError) as error:
            raise WeightsError(
                f"weights: {path}: found other tensors than those of DALL-E's encoder, such as "
                f"{FIRST} ({first_line(error)})"
            ) from None
        if len(state[LAST]) != self.config.codes:
            raise WeightsError(
                f"codes: found {self.config.codes}, expected the {len(state[LAST])} of {path}"
            )
        return self

    def forward(self, images: torch.Tensor, *wanted: str, **how) -> dict:
        """As every target's. RuntimeError if there are no weights yet."""
        if self.network is None:
            raise RuntimeError("target: dalle has no weights yet, call prepare() first")
        return super().forward(images, *wanted, **how)

    def look(self, images: torch.Tensor, wanted: set[str], norm: bool, layers: tuple) -> dict:
        parts = images.split(CHUNK) if images.device.type == "cpu" else [images]
        found = [self._part(part, wanted) for part in parts]
        return {name: torch.cat([each[name] for each in found]) for name in wanted}

    def _part(self, images: torch.Tensor, wanted: set[str]) -> dict:
        pixels = 0.8 * lanczos(images, self.side) + 0.1
        logits = self.network(pixels).flatten(2).transpose(1, 2).float()
        both = {"ids": logits.argmax(dim=-1), "logits": logits}
        return {name: both[name] for name in wanted}

    def _build(self, state: dict[str, torch.Tensor]) -> None:
        self.network = Encoder.of(state).requires_grad_(False).eval()

    def _load_from_state_dict(self, state: dict, prefix: str, *args) -> None:
        start = f"{prefix}network."
        mine = {name[len(start) :]: x for name, x in state.items() if name.startswith(start)}
        if mine:
            self._build(mine)
        super()._load_from_state_dict(state, prefix, *args)


def health(target: Target, images: Iterator[torch.Tensor], config: Config) -> dict:
    """Over the validation images: usage, perplexity and counts of the codes."""
    return codes.health(target, images, config, "More or more varied images raise it.")


@torch.no_grad()
def pictures(target: Target, images: torch.Tensor) -> dict[str, np.ndarray]:
    """code_map and codebook of kit/parts/codes.py; near is a large score."""
    found = target(images, "ids", "logits")
    best = found["logits"].log_softmax(dim=-1).amax(dim=-1)
    return codes.pictures(images, found["ids"], best, target.spec.stride)
