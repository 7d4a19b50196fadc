"""Self-distillation between crops: DINO's training (arXiv 2104.14294), on which iBOT (arXiv
2111.07832) builds.

A student and its exponential moving average, the teacher, see different crops of an image and map
each to a distribution over learnt prototypes; the student must match the teacher's centred and
sharpened distribution for another crop. The teacher target and the methods of that name are this
module with settings of their own; `config` is any of theirs.

Follows facebookresearch/dino. Departures:
- schedules of temperature, and the epochs in which the last layer rests, count in shares of the
  training and in epochs, per step; the official temperature changes once per epoch;
- centre and teacher move once per optimiser step, from all its micro batches (the same without
  gradient accumulation);
- gradients are dropped in the last layer before they are clipped, not after; clipping is per
  tensor, so it is the same;
- position embeddings for local crops are resized by timm, with antialiasing, which the official
  code does not use; the class token starts as timm's does, with deviation 1e-6 instead of 0.02 (it
  has a position, which starts with that);
- the order of operations in a view is kit/data/views.py's: crop, flip, colours, grey, blur,
  solarise;
- paths are dropped by kit/train/droppath.py: local crops of the global ones' size (local_size 1)
  drop those that these drop;
- a teacher that stays silent stops the training (kit/parts/collapse.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from stages.kit.data.views import View
from stages.kit.nets import ema, encoders
from stages.kit.nets.pictures import principal_colours
from stages.kit.nets.target import Target
from stages.kit.parts.collapse import Watch
from stages.kit.parts.prototypes import Centre, Head, Prototypes, multi_view_loss
from stages.kit.train import schedule


def views(config, spec) -> dict[str, View]:
    """global1, global2 and n_local smaller ones, local1, local2, ..."""
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
    small = {
        **common,
        "size": local_side(config, spec),
        "scale": tuple(config.local_scale),
        "blur": 0.5 * blur,
    }
    return {
        "global1": View(**large, blur=1.0 * blur),
        "global2": View(**large, blur=0.1 * blur, solarise=config.solarise),
        **{f"local{i}": View(**small) for i in range(1, config.n_local + 1)},
    }


def local_side(config, spec) -> int:
    """Side of a local crop in pixels: whole patches, at least one."""
    return max(1, round(config.local_size * spec.grid)) * spec.patch


class Network(nn.Module):
    """An encoder and its head. `patch_last_layer`, if patches have prototypes of their own,
    replaces the head's for them.
    """

    def __init__(self, config, spec, patch_layer: bool = False, **kw):
        super().__init__()
        self.spec = spec
        self.encoder = encoders.create(spec, "timm", **kw)
        self.head = Head(
            self.encoder.embed_dim,
            config.prototypes,
            config.hidden,
            config.bottleneck,
            config.norm_last,
        )
        layer = (
            Prototypes(config.bottleneck, config.prototypes, config.norm_last)
            if patch_layer
            else None
        )
        self.patch_last_layer = layer

    def features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B,3,h,w) in [0,1] -> {"cls": (B,D), "patch": (B,N,D)}, after the final norm."""
        return encoders.features(self.encoder, self.spec.normalise(images))

    def patch_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Patch tokens (...,D) -> logits (...,K) in float32; those of class tokens are
        `head(tokens)`.
        """
        if self.patch_last_layer is None:
            return self.head(tokens)
        with torch.autocast(tokens.device.type, enabled=False):
            return self.patch_last_layer(self.head.trunk(tokens))


class MomentumTeacher(Network, Target):
    """The moving average of a student, with the centre of its class-token logits; frozen and always
    in evaluation mode. As a target it gives patches, class token and its attention.
    """

    def __init__(self, config, spec, patch_layer: bool = False):
        super().__init__(config, spec, patch_layer)
        self.centre = Centre(config.prototypes, config.centre_momentum)
        width, heads = self.encoder.embed_dim, self.encoder.blocks[-1].attn.num_heads
        self.sizes = {"patch": width, "cls": width, "attention": heads}
        self.requires_grad_(False).eval()

    def features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """As the student's, in float32. ValueError for pixels outside of [0,1]."""
        self._in_range(images)
        return {name: value.float() for name, value in super().features(images).items()}

    def look(self, images: torch.Tensor, wanted: set[str], norm: bool, layers: tuple) -> dict:
        found = {}
        if wanted & {"patch", "cls"}:
            found = {name: x.float() for name, x in super().features(images).items()}
        if "attention" in wanted:
            found["attention"] = class_attention(self.encoder, self.spec.normalise(images))
        return found

    def follow(self, student: Network, momentum: float) -> None:
        """momentum * own weights + (1 - momentum) * the student's."""
        for name, part in self.named_children():
            if name != "centre":
                ema.update(part, getattr(student, name), momentum)


class SelfDistillation(nn.Module):
    """`student` and `teacher`, a Network and a MomentumTeacher (or a class of its kind), and their
    training.
    """

    def __init__(self, config, spec, teacher=MomentumTeacher, **kw):
        super().__init__()
        self.config, self.spec = config, spec
        # crops of any size
        self.student = Network(
            config, spec, drop_path_rate=config.drop_path, dynamic_img_size=True, **kw
        )
        self.teacher = teacher(config, spec, **kw)
        self.teacher.follow(self.student, momentum=0.0)  # starts as a copy
        self.watch = Watch(config.prototypes, config.min_information, "assignments of class tokens")

    @property
    def encoder(self) -> nn.Module:
        """What a method exports: the teacher's."""
        return self.teacher.encoder

    def forward(self, batch: dict, progress) -> dict[str, torch.Tensor]:
        """{"global1", "global2", "local1", ...: (B,3,h,w) in [0,1]} -> {"loss", entropy of the
        teacher's distributions, "divergence" of the student from them, which is the loss above the
        least possible}.
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
        """Logits (2B,K) of both for the global views -> (DINO's loss over these and the local
        views, the teacher's entropy).

        The logits are the raw ones; they are counted for the centre, which moves after the step.
        """
        assigned = self.teacher.centre.sharpen(teacher, progress.scheduled(self.temperature))
        self.teacher.centre.count(teacher)
        self.watch.count(assigned)
        local = [batch[name] for name in batch if name.startswith("local") and "." not in name]
        if local:
            student = torch.cat([student, self.logits(torch.cat(local))])
        student, assigned = (
            student.unflatten(0, (2 + len(local), -1)),
            assigned.unflatten(0, (2, -1)),
        )
        loss = multi_view_loss(student, assigned, self.config.student_temp)
        return loss, torch.special.entr(assigned).sum(dim=-1).mean()

    def temperature(self, fraction: float, end: str = "teacher_temp_end") -> float:
        """Of the teacher, `fraction` of the training done: linearly from teacher_temp to config's
        `end`; None: it stays.
        """
        start, end, warmup = (
            self.config.teacher_temp,
            getattr(self.config, end),
            self.config.teacher_temp_warmup,
        )
        return (
            start
            if end is None
            else schedule.linear(fraction / warmup if warmup else 1.0, start, end)
        )

    def before_step(self, progress) -> None:
        """The last layers rest at first: without gradients the optimiser leaves them alone, weight
        decay included.
        """
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
    return torch.cat([batch["global1"], batch["global2"]])


def class_attention(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Normalised images -> attention of the class token to the patches, (B,heads,N)."""
    return encoders.attention(encoder, images)[:, :, 0, encoder.num_prefix_tokens :]


@torch.no_grad()
def feature_columns(network: Network, images: torch.Tensor) -> list[torch.Tensor]:
    """For images (B,3,H,W) in [0,1], columns of a contact sheet: principal components of the patch
    tokens | attention of the class token, mean over heads, from black (its least) to white.
    """
    grid, size = network.spec.grid, images.shape[-2:]
    colours = principal_colours(network.features(images)["patch"])
    weights = class_attention(network.encoder, network.spec.normalise(images)).mean(dim=1)
    low, high = weights.amin(dim=1, keepdim=True), weights.amax(dim=1, keepdim=True)
    weights = (weights - low) / (high - low).clamp(min=1e-9)
    weights = weights.view(-1, 1, grid, grid).expand(-1, 3, -1, -1)
    return [F.interpolate(x, size=size, mode="nearest") for x in (colours, weights)]
