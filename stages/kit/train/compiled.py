"""`compute.compile`: a module's forward and backward through torch.compile, with a fallback that
says why.

Off unless asked for: on a CPU the time of compiling comes back after thousands of steps only, and
on a GPU it has not been measured yet. `auto` is a fixed rule, never a timing: on for CUDA and
trainings of at least `STEPS` steps, where fused elementwise operations should pay; off elsewhere.

Compiled and eager arithmetic differ in rounding. A training that is resumed with another setting is
therefore equal up to rounding, not to the byte.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from stages.kit import eager

STEPS = 20_000  # compiling for about a minute comes back if each of so many steps gets 3 ms shorter
SHAPES = 64  # of batches, each of which is compiled; others run as they stand


def wanted(setting: bool | str, device: torch.device | str, steps: int) -> bool:
    """Whether to compile a training of so many steps: `setting` is True, False or "auto"."""
    if setting == "auto":
        return torch.device(device).type == "cuda" and steps >= STEPS
    return setting


def forward(module: nn.Module, say: Callable[[str], None], backend: str = "inductor") -> Callable:
    """`module.forward`, compiled when first called, for each shape that it meets; the module itself
    stays as it is.

    Where compiling fails, `say` is told once, with the reason, and torch runs the same operations
    one by one. While a dispatch mode counts FLOPs, torch compiles nothing.
    """
    eager.hand_over()
    compiled = torch.compile(module.forward, backend=_Backend(backend, say), dynamic=False)
    # After an error of the tracer itself torch says it, and runs that function as it stands.
    settings = {"suppress_errors": True, "recompile_limit": SHAPES}

    def call(*args):
        with torch._dynamo.config.patch(settings):
            return compiled(*args)

    return call


class _Backend:
    """A compiler of graphs that gives a graph back as it is once one could not be compiled.

    Falling back here, and not around the whole forward, repeats nothing that the forward has
    counted already.
    """

    def __init__(self, name: str, say: Callable[[str], None]):
        self.name, self.say, self.failed = name, say, False

    def __call__(self, graph: torch.fx.GraphModule, inputs: list):
        if not self.failed:
            # Dropout draws what it draws without compiling. The backward graph is compiled now,
            # not when it is needed, so that its errors come here too.
            options = (
                {"config_patches": {"fallback_random": True}} if self.name == "inductor" else {}
            )
            with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
                try:
                    return torch._dynamo.lookup_backend(self.name)(graph, inputs, **options)
                except Exception as error:  # whatever a compiler may raise
                    self.failed = True
                    reason = next(iter(str(error).strip().splitlines()), "")
                    self.say(
                        f"not compiled ({type(error).__name__}: {reason}); training goes on without"
                    )
        return graph.forward
