"""The optimiser steps of a training: rates by the schedule, loss scaling, clipping."""

from __future__ import annotations

import torch
from torch import nn

from stages.kit.train import optim
from stages.kit.train.recipe import Recipe


class Updates:
    """An optimiser over the parameters of a module, as a recipe says.

    A module chooses its own groups by `param_groups(weight_decay)`. `scaler` is for fp16, else
    None.
    """

    def __init__(
        self,
        module: nn.Module,
        recipe: Recipe,
        device: torch.device,
        scaler: torch.amp.GradScaler | None,
    ):
        self.recipe, self.scaler = recipe, scaler
        if hasattr(module, "param_groups"):
            groups = module.param_groups(recipe.weight_decay)
        else:
            groups = optim.groups(module, recipe.weight_decay)
        self.optimizer = optim.build(recipe, groups, device)
        # The optimiser's groups hold the current rates; these are those that they started with.
        self.bases = [(g["lr_scale"], g["weight_decay"]) for g in self.optimizer.param_groups]
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def set_rates(self, step: int) -> None:
        """Learning rate and weight decay of every group, for this step."""
        lr = self.recipe.lr_at(step)
        for group, (scale, decay) in zip(self.optimizer.param_groups, self.bases, strict=True):
            group["lr"] = lr * scale
            group["weight_decay"] = self.recipe.weight_decay_at(step, decay)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of a part of the batch."""
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def unscale(self) -> None:
        """The gradients are complete; from now on they are those of the loss itself."""
        if self.scaler:
            self.scaler.unscale_(self.optimizer)

    def step(self) -> torch.Tensor | None:
        """Clips and steps; the norm that the gradients had.

        None in fp16: its scaler finds overflows by itself, lowers its scale and skips the step.
        """
        norm = optim.clip(self.parameters, self.recipe.clip, self.recipe.clip_mode)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return None if self.scaler else norm

    def broken(self) -> nn.Parameter | None:
        """The first parameter that is not finite, if there is one; waits for the device."""
        norms = torch._foreach_norm([p.detach() for p in self.parameters], float("inf"))
        finite = torch.stack(norms).isfinite()
        return None if finite.all() else self.parameters[int(finite.logical_not().nonzero()[0])]

    def state(self) -> dict:
        """For a checkpoint."""
        scaler = self.scaler.state_dict() if self.scaler else None
        return {"optimizer": self.optimizer.state_dict(), "scaler": scaler}

    def load(self, state: dict) -> None:
        """Takes over what `state` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
