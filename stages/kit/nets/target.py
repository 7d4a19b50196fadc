"""What supplies targets: the base class, the encoder of a run as a target, and the frozen holder.

A target looks at whole images in [0,1]. It gives a dict of what it is asked for, on the student's
grid of N patches, in float32 (ids: int64):

    "ids"        (B,N), codes                   "logits"     (B,N,K), a score for each code
    "patch"      (B,N,D), features              "cls"        (B,D), of the class token
    "attention"  (B,heads,N), the class token's attention to the patches, in the last block
    "layers"     list of (B,N,D), the patches after the blocks that are named, before the last norm
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from stages.kit.eager import eager
from stages.kit.nets import encoders
from stages.kit.nets.attention import unfused


class Target(nn.Module):
    """The base: a subclass sets `spec` (the student's) and `sizes`, and defines `look`.

    sizes: {what it gives: how large}: codes of "ids" and "logits", channels of "patch", "cls" and
    "layers", heads of "attention". A target is always in evaluation mode. Gradients pass through it
    to the images where it is differentiable; a student holds it in `Frozen`, which stops them.
    """

    render = None  # or a method (features (B,N,D), images) -> pictures (B,3,H,W) in [0,1]
    # or another target (Frozen) that it looks through. It moves along, and is saved beside it.
    upstream = None

    def __init__(self):
        super().__init__()
        self.sizes: dict[str, int] = {}
        self._in_range = UnitRange(type(self).__module__.rpartition(".")[2])

    def train(self, mode: bool = True) -> Target:
        return super().train(False)

    def _apply(self, fn, recurse: bool = True) -> Target:  # what `to` calls
        if self.upstream is not None:
            self.upstream.open._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def look(self, images: torch.Tensor, wanted: set[str], norm: bool, layers: tuple) -> dict:
        """`forward` without its checks; it may give more than is wanted."""
        raise TypeError(f"{type(self).__name__}: found no `look`, expected one of its own")

    def forward(
        self, images: torch.Tensor, *wanted: str, norm: bool = True, layers: tuple = ()
    ) -> dict:
        """(B,3,H,W) in [0,1] -> {what is wanted: its tensor}, as described above.

        norm False: "patch" and "cls" of an encoder before its last norm; other targets ignore it.
        layers: blocks whose output is wanted as "layers", from 1; negative numbers count from the
        end. ValueError for other pixels, for what this target does not give, and for another number
        of patches than the student has.
        """
        if missing := set(wanted) - set(self.sizes):
            given, missing = (", ".join(sorted(names)) for names in (self.sizes, missing))
            raise ValueError(f"target: found {given}, expected {missing}")
        self._in_range(images)
        found = self.look(images, set(wanted), norm, tuple(layers))
        rows, patches = len(images), self.spec.grid**2
        for name in {"ids", "logits", "patch"} & set(wanted):
            shape = tuple(found[name].shape)
            if shape[:2] != (rows, patches):
                raise ValueError(
                    f"target: found {name} of shape {shape}, expected {rows} rows of {patches} "
                    "patches"
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

    It gives "patch", and as far as the encoder can, "cls", "attention" and "layers" (of blocks that
    are all as wide). What lies on another grid than the student's is resized bilinearly; attention
    keeps its sum.
    """

    def __init__(self, encoder: nn.Module, spec):
        super().__init__()
        self.encoder, self.spec = encoder, spec
        self.norm, encoder.norm = encoder.norm, nn.Identity()  # to give states from before it, too
        width, depths = encoder.num_features, encoders.depths(encoder)
        self.sizes = {"patch": width}
        if encoders.can(encoder, "taps") and len(depths) == 1:
            self.sizes["layers"] = width
        if encoders.has_cls(encoder):
            self.sizes["cls"] = width
        if encoders.has_cls(encoder) and encoders.can(encoder, "attention") and sum(depths):
            self.sizes["attention"] = encoder.blocks[-1].attn.num_heads
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, folder: Path, spec, device: torch.device | str = "cpu") -> EncoderTarget:
        """From an exported encoder's folder, for images of spec's size, to which timm resizes its
        positions (tasks/_features.py). FileNotFoundError if there is none.
        """
        encoder = encoders.load(folder, img_size=spec.image_size)
        return unfused(cls(encoder, spec), device).to(device)

    def look(self, images: torch.Tensor, wanted: set[str], norm: bool, layers: tuple) -> dict:
        images, grid = self.spec.normalise(images), self.spec.grid
        count = sum(encoders.depths(self.encoder))
        blocks = tuple(n if n > 0 else count + 1 + n for n in layers)
        attention = "attention" in wanted
        seen = encoders.features(self.encoder, images, taps=blocks, attention=attention)
        last = self.norm if norm else nn.Identity()
        patch, cls = last(on_grid(seen["patch"], grid)), last(seen["cls"])
        states = (encoders.split(self.encoder, seen["taps"][n])["patch"] for n in blocks)
        found = {"patch": patch.float(), "cls": cls.float()}
        found["layers"] = [on_grid(x, grid).float() for x in states]
        if attention:
            weights = seen["attention"].transpose(1, 2)  # (B,n,heads)
            share = weights.shape[1] / grid**2  # a finer grid has more patches, each with less
            found["attention"] = on_grid(weights, grid).transpose(1, 2) * share
        return found


def on_grid(patches: torch.Tensor, grid: int) -> torch.Tensor:
    """Patches (B,n,D) of a square grid -> (B,grid*grid,D), resized where the grid is another."""
    side = round(patches.shape[1] ** 0.5)
    if side == grid:
        return patches
    maps = patches.transpose(1, 2).unflatten(2, (side, side))
    how = {"mode": "bilinear", "align_corners": False, "antialias": True}
    return F.interpolate(maps, size=(grid, grid), **how).flatten(2).transpose(1, 2)


class UnitRange:
    """Refuses batches with pixels outside of [0,1]; `who` is named in the message.

    It looks at every batch on a CPU. On a GPU, which it makes wait, it looks at the first and at
    every 256th.
    """

    def __init__(self, who: str):
        self.who, self.calls = who, 0

    @eager  # it counts, and looks at values
    def __call__(self, images: torch.Tensor) -> None:
        """ValueError, if it looks, unless all pixels are in [0,1], as normalised ones are not."""
        if images.device.type == "cpu" or self.calls % 256 == 0:
            low, high = (float(x) for x in torch.aminmax(images.detach()))
            if not (low >= -1e-4 and high <= 1 + 1e-4):
                raise ValueError(
                    f"{self.who}: found images with pixels from {low:.3g} to {high:.3g}, expected "
                    "pixels in [0, 1]; it normalises them itself, so give it images from before "
                    "any mean and std were applied"
                )
        self.calls += 1
