"""Self-distillation between crops: DINO's training (arXiv 2104.14294).

A student and its exponential moving average, the teacher, see different crops of an image and map
each to a distribution over learnt prototypes; the student must match the teacher's centred and
sharpened distribution for another crop. The target and the method `dino` are this module with
settings of their own, and kit/parts/ibot.py builds on it; `config` is a checks.SelfDistillation. By
default Sinkhorn-Knopp (kit/parts/sinkhorn.py) does what DINO's centre does in the published recipe.

Follows facebookresearch/dino. Departures:
- the rate reaches its peak in the step after the warm-up, officially in the warm-up's last one
  (`schedule: beit`, which PUBLISHED has);
- the temperature changes at every step, as a function of the share of the training; the official
  one changes once per epoch;
- centre and teacher move once per optimiser step, from all its micro batches (the same without
  gradient accumulation);
- gradients are dropped in the last layer before they are clipped, not after; clipping is per
  tensor, so it is the same;
- position embeddings for local crops are resized by timm, with antialiasing, which the official
  code does not use; the class token starts as timm's does, with deviation 1e-6 instead of 0.02 (it
  has a position, which starts with that);
- the order of operations in a view is kit/data/views.py's: crop, flip, colours, grey, blur,
  solarise;
- paths are dropped by kit/train/droppath.py: local crops as large as the global ones (local_size 1)
  drop the same paths;
- a teacher whose outputs do not depend on the image stops the training (kit/parts/collapse.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from stages.kit.data.views import View
from stages.kit.nets import ema, encoders
from stages.kit.nets.pictures import principal_colours
from stages.kit.nets.target import Target, UnitRange
from stages.kit.parts.collapse import Watch
from stages.kit.parts.prototypes import Head, Prototypes, multi_view_loss
from stages.kit.parts.sinkhorn import REASON, centring
from stages.kit.train import schedule

GLOBAL = ("global1", "global2")  # the large views


def views(config, spec) -> dict[str, View]:
    """global1, global2 and n_local smaller ones: local1, local2, ..."""
    size = spec.image_size
    blur = config.blur and size >= 64
    common = {
        "flip": config.flip,
        "jitter": tuple(config.jitter),
        "jitter_p": config.jitter_p,
        "grey": config.grey,
        "blur_sigma": (0.1, max(0.2, 2 * min(1, size / 128))),
    }
    large = {**common, "size": size, "scale": tuple(config.global_scale)}
    small = {**common, "size": local_side(config, spec), "scale": tuple(config.local_scale)}
    return {
        "global1": View(**large, blur=1.0 * blur),
        "global2": View(**large, blur=0.1 * blur, solarise=config.solarise),
        **{f"local{i}": View(**small, blur=0.5 * blur) for i in range(1, config.n_local + 1)},
    }


def local_side(config, spec) -> int:
    """Side of a local crop in pixels: whole patches, at least one."""
    return max(1, round(config.local_size * spec.grid)) * spec.patch


class Network(nn.Module):
    """An encoder and its head.

    patch_layer: patches have prototypes of their own, `patch_last_layer`, in place of the head's.
    """

    def __init__(self, config, spec, patch_layer: bool = False, **kw):
        super().__init__()
        self.spec = spec
        self.encoder = encoders.create(spec, "timm", **kw)
        sizes = (config.prototypes, config.hidden, config.bottleneck, config.norm_last)
        self.head = Head(self.encoder.embed_dim, *sizes)
        self.patch_last_layer = None
        if patch_layer:
            sizes = (config.bottleneck, config.prototypes, config.norm_last)
            self.patch_last_layer = Prototypes(*sizes)

    def features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B,3,h,w) in [0,1] -> {"cls": (B,D), "patch": (B,N,D)}, after the final norm."""
        return encoders.features(self.encoder, self.spec.normalise(images))

    def patch_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Patch tokens (..., D) -> logits (..., K) in float32. Class tokens go through `head`."""
        if self.patch_last_layer is None:
            return self.head(tokens)
        with torch.autocast(tokens.device.type, enabled=False):
            return self.patch_last_layer(self.head.trunk(tokens))


class MomentumTeacher(Network, Target):
    """The moving average of a student, with the centre of its class-token logits.

    It is frozen and always in evaluation mode. As a target it gives patches, the class token and
    its attention, always after the last norm.
    """

    def __init__(self, config, spec, patch_layer: bool = False):
        super().__init__(config, spec, patch_layer)
        self._in_range = UnitRange("teacher")
        self.centre = centring(config)
        width, heads = self.encoder.embed_dim, self.encoder.blocks[-1].attn.num_heads
        self.sizes = {"patch": width, "cls": width, "attention": heads}
        self.requires_grad_(False).eval()

    def features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """As the student's, in float32. ValueError for pixels outside of [0,1]."""
        return self(images, "cls", "patch")

    def look(self, images: torch.Tensor, wanted: set[str], norm: bool, layers: tuple) -> dict:
        attention, images = "attention" in wanted, self.spec.normalise(images)
        found = encoders.features(self.encoder, images, attention=attention)
        return {name: found[name].float() for name in wanted}

    def follow(self, student: Network, momentum: float) -> None:
        """momentum * own weights + (1 - momentum) * the student's."""
        for name, part in self.named_children():
            if name != "centre":
                ema.update(part, getattr(student, name), momentum)


class SelfDistillation(nn.Module):
    """A student and its teacher, a Network and a MomentumTeacher, and their training.

    patch_layer: see Network.
    """

    def __init__(self, config, spec, patch_layer: bool = False):
        super().__init__()
        self.config, self.spec = config, spec
        any_size = {"dynamic_img_size": True}  # the student sees crops of two sizes
        self.student = Network(config, spec, patch_layer, drop_path=config.drop_path, **any_size)
        self.teacher = MomentumTeacher(config, spec, patch_layer)
        self.teacher.follow(self.student, momentum=0.0)  # starts as a copy
        self.watch = Watch(config.prototypes, config.min_information, "assignments of class tokens")
        if config.centring == "sinkhorn":
            self.whole_batch = REASON

    @property
    def encoder(self) -> nn.Module:
        """What a method exports: the teacher's encoder, as the official code evaluates it."""
        return self.teacher.encoder

    def forward(self, batch: dict, progress) -> dict[str, torch.Tensor]:
        """{"global1", "global2", "local1", ...: (B,3,h,w) in [0,1]} -> {"loss", "teacher_entropy",
        "divergence"}.

        The entropy of the teacher's distributions is the least that the loss can be; the divergence
        of the student from them is the rest.
        """
        large = global_views(batch)
        with torch.no_grad():
            logits = self.teacher.head(self.teacher.features(large)["cls"])
        loss, entropy = self.class_loss(logits, self.logits(large), batch, progress)
        return {"loss": loss, "teacher_entropy": entropy, "divergence": loss - entropy}

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """The student's logits (B,K) for images of one size."""
        return self.student.head(self.student.features(images)["cls"])

    def class_loss(self, teacher: torch.Tensor, student: torch.Tensor, batch: dict, progress):
        """Raw logits (2B,K) of both for the global views -> (DINO's loss, the teacher's entropy).

        The loss is over these and the local views of the batch. The teacher's logits are counted
        for the centre, which moves after the step.
        """
        assigned = self.teacher.centre.assign(teacher, progress.scheduled(self.temperature))
        self.teacher.centre.count(teacher)
        self.watch.count(assigned)
        local = [batch[name] for name in batch if name.startswith("local") and "." not in name]
        if local:
            student = torch.cat([student, self.logits(torch.cat(local))])
        student = student.unflatten(0, (2 + len(local), -1))  # (V,B,K)
        assigned = assigned.unflatten(0, (2, -1))
        loss = multi_view_loss(student, assigned, self.config.student_temp)
        return loss, torch.special.entr(assigned).sum(dim=-1).mean()

    def temperature(self, fraction: float, end: str = "teacher_temp_end") -> float:
        """The teacher's temperature when `fraction` of the training is done.

        It goes linearly from teacher_temp to the setting that is called `end`; None: it stays.
        """
        start, end = self.config.teacher_temp, getattr(self.config, end)
        warmup = self.config.teacher_temp_warmup
        if end is None:
            return start
        return schedule.linear(fraction / warmup if warmup else 1.0, start, end)

    def before_step(self, progress) -> None:
        """The last layers rest at first: without gradients there is no step and no decay."""
        if progress.epoch < self.config.freeze_last_layer:
            for name, parameter in self.student.named_parameters():
                if "last_layer" in name:
                    parameter.grad = None

    def after_step(self, progress) -> None:
        self.teacher.centre.step()
        self.teacher.follow(self.student, ema.momentum(self.config.momentum, progress.fraction))
        self.watch.step(progress)


def global_views(batch: dict) -> torch.Tensor:
    """Both global views, (2B,3,H,W)."""
    return torch.cat([batch[name] for name in GLOBAL])


@torch.no_grad()
def feature_columns(teacher: MomentumTeacher, images: torch.Tensor) -> list[torch.Tensor]:
    """Images (B,3,H,W) in [0,1] -> two columns of a contact sheet.

    They are principal components of the patch tokens, and the class token's attention, which is
    the mean over heads from black (its least) to white.
    """
    grid, size = teacher.spec.grid, images.shape[-2:]
    found = teacher(images, "patch", "attention")
    colours, weights = principal_colours(found["patch"]), found["attention"].mean(dim=1)
    low, high = weights.amin(dim=1, keepdim=True), weights.amax(dim=1, keepdim=True)
    weights = (weights - low) / (high - low).clamp(min=1e-9)
    weights = weights.view(-1, 1, grid, grid).expand(-1, 3, -1, -1)
    return [F.interpolate(x, size=size, mode="nearest") for x in (colours, weights)]
