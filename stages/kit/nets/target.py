"""What supplies targets: the base class, the encoder of a run as a target, and the frozen holder.

A target looks at whole images in [0,1]. It gives a dict of what it is asked for, on the student's
grid of N patches, in float32 (ids: int64):

    "ids"        (B,N), codes                   "logits"     (B,N,K), a score for each code
    "patch"      (B,N,D), features              "cls"        (B,D), of the class token
    "attention"  (B,heads,N), the class token's attention to the patches, in the last block
    "layers"     list of (B,N,D), the patches after the blocks that are named
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from stages.kit.eager import eager
from stages.kit.nets import attention, encoders
from workflow import plugins


class Target(nn.Module):
    """The base: a subclass sets `spec` (the student's) and `sizes`, and defines `look`.

    sizes: {what it gives: how large}: codes of "ids" and "logits", channels of "patch", "cls" and
    "layers", heads of "attention". A target is always in evaluation mode. Gradients pass through it
    to the images where it is differentiable; a student holds it in `Frozen`, which stops them.
    """

    render = None  # or a method (features (B,N,D), images) -> pictures (B,3,H,W) in [0,1]

    def __init__(self):
        super().__init__()
        self.sizes: dict[str, int] = {}
        self._in_range = UnitRange()

    def train(self, mode: bool = True) -> Target:
        return super().train(False)

    def look(self, images: torch.Tensor, wanted: set[str], norm: bool, layers: tuple) -> dict:
        """`forward` without its checks; may give more than is wanted."""
        raise NotImplementedError

    def forward(
        self, images: torch.Tensor, *wanted: str, norm: bool = True, layers: tuple = ()
    ) -> dict:
        """(B,3,H,W) in [0,1] -> {what is wanted: its tensor}, as described above.

        norm False: the states before an encoder's last norm; targets without such states ignore it.
        layers: blocks whose output is wanted as "layers", from 1; negative numbers count from the
        end. ValueError for other pixels, for what this target does not give, and for another number
        of patches than the student has.
        """
        if missing := set(wanted) - set(self.sizes):
            raise ValueError(
                f"target: found one that gives {', '.join(sorted(self.sizes))}, expected one that "
                f"gives {', '.join(sorted(missing))}"
            )
        if bool(layers) != ("layers" in wanted):
            raise ValueError(
                f"layers: found {tuple(layers)}, expected numbers of blocks if and only if "
                "'layers' is wanted"
            )
        self._in_range(images)
        found = self.look(images, set(wanted), norm, tuple(layers))
        shape = (len(images), self.spec.grid**2)
        for name in {"ids", "logits", "patch"} & set(wanted):
            if found[name].shape[:2] != shape:
                raise ValueError(
                    f"target: found {name} of shape {tuple(found[name].shape)}, expected {shape} "
                    "first (images, patches)"
                )
        return {name: found[name] for name in wanted}


class Frozen:
    """Holds a target for a student: no gradient passes, and torch neither trains nor saves it.

    `open` is the target itself. A loss whose gradient goes through it to images that the student
    made calls that.
    """

    def __init__(self, target: Target):
        self.open = target.requires_grad_(False).eval()
        self.sizes = target.sizes

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, *wanted: str, **how) -> dict:
        """`Target.forward` without gradients."""
        return self.open(images, *wanted, **how)


class EncoderTarget(Target):
    """The finished encoder of a run, which it takes over.

    It gives "patch", "layers" where all blocks have one width, and "cls" and "attention" where
    there is a class token.
    """

    def __init__(self, encoder: nn.Module, spec):
        super().__init__()
        self.encoder, self.spec = encoder, spec
        self.norm, encoder.norm = encoder.norm, nn.Identity()  # to give states from before it, too
        able = plugins.module("encoder", encoder.family).CAN
        self.sizes = {"patch": encoder.num_features}
        if {"taps", "plain"} <= able:
            self.sizes["layers"] = encoder.num_features
        if encoders.has_cls(encoder):
            self.sizes["cls"] = encoder.num_features
            if "attention" in able and len(encoder.blocks):
                self.sizes["attention"] = encoder.blocks[-1].attn.num_heads
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, folder: Path, spec, device: torch.device | str = "cpu") -> EncoderTarget:
        """From an exported encoder's folder. FileNotFoundError if there is none."""
        target = cls(encoders.load(folder), spec)
        if torch.device(device).type == "cpu":
            attention.multiply_out(target)
        return target.to(device)

    def look(self, images: torch.Tensor, wanted: set[str], norm: bool, layers: tuple) -> dict:
        images, grid = self.spec.normalise(images), self.spec.grid
        last, found = self.norm if norm else nn.Identity(), {}
        if wanted & {"patch", "cls"}:
            tokens = encoders.features(self.encoder, images)
            found["patch"] = last(on_grid(tokens["patch"], grid)).float()
            found["cls"] = last(tokens["cls"]).float()
        if "attention" in wanted:
            weights = encoders.attention(self.encoder, images)[:, :, 0]  # the class token's row
            weights = weights[..., self.encoder.num_prefix_tokens :].transpose(1, 2)
            found["attention"] = on_grid(weights, grid).transpose(1, 2)
        if "layers" in wanted:
            blocks = [self._block(number) for number in layers]
            taps = encoders.masked(self.encoder, images, None, None, taps=tuple(blocks))["taps"]
            states = (encoders.split(self.encoder, taps[block])["patch"] for block in blocks)
            found["layers"] = [on_grid(x, grid).float() for x in states]
        return found

    def _block(self, number: int) -> int:
        """The block's number from 1, of one that may count from the end."""
        count = sum(encoders.depths(self.encoder))
        if not 1 <= abs(number) <= count:
            raise ValueError(
                f"layers: found {number}, expected 1 to {count}, or -{count} to -1 from the end"
            )
        return number if number > 0 else count + 1 + number


def on_grid(patches: torch.Tensor, grid: int) -> torch.Tensor:
    """Patches (B,n,D) of a square grid -> (B,grid*grid,D), resized where the grid is another."""
    side = round(patches.shape[1] ** 0.5)
    if side == grid:
        return patches
    maps = patches.transpose(1, 2).unflatten(2, (side, side))
    how = {"mode": "bilinear", "align_corners": False, "antialias": True}
    return F.interpolate(maps, size=(grid, grid), **how).flatten(2).transpose(1, 2)


class UnitRange:
    """Refuses batches with pixels outside of [0,1].

    It looks at every batch on a CPU. On a GPU, where it would wait, it looks at the first and at
    every 256th.
    """

    def __init__(self):
        self.calls = 0

    @eager  # it counts, and looks at values
    def __call__(self, images: torch.Tensor) -> None:
        """ValueError, if it looks, unless all pixels are in [0,1], as normalised ones are not."""
        if images.device.type == "cpu" or self.calls % 256 == 0:
            low, high = (float(x) for x in torch.aminmax(images.detach()))
            if not (low >= -1e-4 and high <= 1 + 1e-4):
                raise ValueError(
                    f"target: found pixels from {low:.3g} to {high:.3g}, expected all in [0, 1]; "
                    "it normalises images itself, so give it those from before mean and std"
                )
        self.calls += 1
