"""Self-distillation with masks: iBOT's losses, masks and pictures (arXiv 2111.07832).

This is DINO's training (kit/parts/selfdistil.py) with a second loss. The student sees the global
views with patches hidden; at these its distribution over prototypes must match the teacher's for
the same patch of the same view, unmasked. Which patches are hidden is up to the method, which may
first ask the teacher; iBOT's own are `drawn`. A step is:

    large = global_views(batch)                        # (2B,3,H,W)
    seen = self.look(large)                            # the teacher's logits, of whole views
    mask = ...                                         # bool (2B,N), the method's own
    return self.losses(large, mask, seen, batch, progress)

`config` is a checks.MaskedSelfDistillation. Departures from bytedance/ibot:
- the student's head sees no more patches than can be hidden; where fewer are hidden, the others
  weigh nothing, as there;
- shared_head is one setting for student and teacher; the official code has two, both true in the
  published recipe;
- without a patch_weight nothing is asked of the patches' head, and it is that of the class token;
- teacher and student start equal in all that they share, also where the last layers are two;
- masks are pure functions of seed and step, where the official ones come from the loader's
  generators; a view with a ratio r hides at most r of its patches, by the same rule.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stages.kit.nets import encoders
from stages.kit.nets.masks import block_masks, hidden_ids, random_masks, take
from stages.kit.nets.pictures import colour_codes, contact_sheet, paint, windows
from stages.kit.parts.collapse import Watch
from stages.kit.parts.prototypes import cross_entropy
from stages.kit.parts.selfdistil import SelfDistillation, feature_columns
from stages.kit.parts.sinkhorn import centring


class MaskedSelfDistillation(SelfDistillation):
    """Student and teacher, their two losses, and what the second one needs: a mask token, a centre.

    most: patches that can be hidden in a view.
    """

    def __init__(self, config, spec, most: int):
        own = bool(config.patch_weight) and not config.shared_head
        super().__init__(config, spec, patch_layer=own)
        self.most = most
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.encoder.embed_dim))  # the student's
        self.patch_centre = centring(config)
        watched = (config.prototypes, config.min_information, "assignments of patches")
        self.patch_watch = Watch(*watched)
        if not config.cls_weight:  # a layer that no loss trains need not depend on the image
            self.watch.min_information = 0.0

    def drawn(
        self, uniform: Callable[..., torch.Tensor], view: str, share: float, kind: str
    ) -> torch.Tensor:
        """Which patches of a view are hidden by iBOT's rule, bool (B,N).

        With probability 1 - share it is none, else at most a ratio of them that is uniform in
        mask_ratio. The official rule (loader.py): for the kind "block" blocks of at least (side //
        3)^2 patches until no further one fits, for "random" single patches. `uniform(name, *shape)`
        as Progress.uniform.
        """
        (low, high), side = self.config.mask_ratio, self.spec.grid
        chosen, ratio = uniform(f"{view}-ratio", 2).unbind(1)
        count = (low + (high - low) * ratio) * side**2 * (chosen < share)  # (B,), with fractions
        if kind == "random":
            return random_masks(uniform(f"{view}-mask", side**2), count)

        def of_view(name: str, *shape: int) -> torch.Tensor:
            return uniform(f"{view}-{name}", *shape)

        return block_masks(of_view, (side, side), count, smallest=(side // 3) ** 2)

    @torch.no_grad()
    def look(self, images: torch.Tensor, *more: str) -> dict[str, torch.Tensor]:
        """Whole views (V,3,H,W) in [0,1] -> the teacher's raw logits "cls" (V,K), and "patch"
        (V,N,K) if patches have a loss.

        `more`: what else the teacher shall give, such as its "attention" (V,heads,N).
        """
        wanted = ("cls", "patch") if self.config.patch_weight else ("cls",)
        seen = self.teacher(images, *wanted, *more)
        heads = {"cls": self.teacher.head, "patch": self.teacher.patch_logits}
        return {**seen, **{name: heads[name](seen[name]) for name in wanted}}

    def tokens(self, images: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """The student's "cls" (V,D) and "patch" (V,N,D) for whole views with patches hidden."""
        images = self.spec.normalise(images)
        return encoders.masked(self.student.encoder, images, mask, self.mask_token)

    def losses(self, large, mask, seen: dict, batch: dict, progress) -> dict[str, torch.Tensor]:
        """Global views (2B,3,H,W), their mask (2B,N), what `look` gave of them -> {"loss", ...}.

        The others are the two losses, entropies of the teacher's distributions for class tokens and
        hidden patches, and "divergence", by which the weighted loss is above the least possible.
        Those of the patches are left out if they weigh nothing.
        """
        tokens = self.tokens(large, mask)
        cls_logits = self.student.head(tokens["cls"])
        cls_loss, entropy = self.class_loss(seen["cls"], cls_logits, batch, progress)
        weights = (self.config.cls_weight, self.config.patch_weight)
        out = {
            "loss": weights[0] * cls_loss,
            "cls_loss": cls_loss,
            "teacher_entropy": entropy,
            "divergence": weights[0] * (cls_loss - entropy),
        }
        if not self.config.patch_weight:
            return out
        patch_loss, least, patch_entropy = self.patch_loss(
            seen["patch"], tokens["patch"], mask, progress
        )
        return {
            **out,
            "loss": out["loss"] + weights[1] * patch_loss,
            "patch_loss": patch_loss,
            "patch_entropy": patch_entropy,
            "divergence": out["divergence"] + weights[1] * (patch_loss - least),
        }

    def patch_loss(self, teacher: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, progress):
        """Teacher's raw logits (V,N,K), student's tokens (V,N,D), mask (V,N) of V views -> (loss,
        the least that it can be, the teacher's mean entropy at hidden patches).

        The loss is the cross entropy at hidden patches, averaged within each view, then over all
        views; a view without any counts as 0. All patches count for the centre, with Sinkhorn the
        hidden ones.
        """
        self.patch_centre.count(teacher)
        ids = hidden_ids(mask, self.most)  # hidden ones first; others, if any, weigh nothing
        hidden = mask.gather(1, ids).float()
        weight = hidden / hidden.sum(dim=1, keepdim=True).clamp(min=1) / len(mask)
        temperature = progress.scheduled(partial(self.temperature, end="patch_temp_end"))
        assigned = self.patch_centre.assign(take(teacher, ids), temperature, hidden)
        self.patch_watch.count(assigned)
        student = self.student.patch_logits(take(tokens, ids))
        loss = cross_entropy(student, assigned, self.config.student_temp)  # (V,n)
        entropy = torch.special.entr(assigned).sum(dim=-1)
        mean = (entropy * hidden).sum() / hidden.sum().clamp(min=1)
        return (loss * weight).sum(), (entropy * weight).sum(), mean

    def after_step(self, progress) -> None:
        self.patch_centre.step()
        super().after_step(progress)
        self.patch_watch.step(progress)

    @torch.no_grad()
    def masked_pictures(self, images: torch.Tensor, mask: torch.Tensor) -> dict[str, np.ndarray]:
        """Images (B,3,H,W) in [0,1] and their mask (B,N) -> two contact sheets.

        tokens: image | masked | the student's prototypes at hidden patches | the teacher's, of the
        whole image | principal components of patch tokens | attention. One colour per prototype.
        prototypes: a row for each of those that most patches share, with the patches that the
        teacher gives to it and their surroundings, surest first.
        """
        guess = self.student.patch_logits(self.tokens(images, mask)["patch"]).argmax(dim=-1)
        temperature = self.temperature(1.0, "patch_temp_end")
        centre = self.patch_centre if self.config.patch_weight else self.teacher.centre
        logits = self.teacher.patch_logits(self.teacher(images, "patch")["patch"])
        assigned = centre.sharpen(logits, temperature)
        share, given = assigned.max(dim=-1)
        size = images.shape[-1]
        columns = [
            images,
            paint(images, mask),
            paint(colour_codes(guess, size), ~mask),
            colour_codes(given, size),
        ]
        return {
            "tokens": contact_sheet([*columns, *feature_columns(self.teacher, images)]),
            "prototypes": self.prototype_sheet(images, given.flatten(), share.flatten()),
        }

    def prototype_sheet(
        self, images: torch.Tensor, given: torch.Tensor, share: torch.Tensor, side: int = 8
    ) -> np.ndarray:
        """Prototypes `given` (B*N,) to the patches of images, and their shares (B*N,) -> a contact
        sheet: rows of patches that have the same prototype.
        """
        around = windows(images, self.spec.patch)
        around = F.pad(around, (0,) * 6 + (0, 1), value=1.0)  # the last one is white
        rows = []
        for prototype in given.bincount().topk(min(side, int(given.max()) + 1)).indices:
            found = torch.where(given == prototype, share, -1.0).topk(min(side, len(given)))
            places = torch.where(found.values >= 0, found.indices, len(given))
            rows.append(F.pad(places, (0, side - len(places)), value=len(given)))
        return contact_sheet([around[column] for column in torch.stack(rows, dim=1)])
