"""What torch.compile must not follow, said without loading its tracer, torch._dynamo.

The tracer takes about a second of CPU time to import, and most jobs compile nothing. A function
marked `eager` or `constant` is therefore only noted here. `hand_over` passes the notes on to
torch.compiler, when the first forward is compiled (kit/train/compiled.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from types import ModuleType, SimpleNamespace

import torch

TRACER = "torch._dynamo"
_noted: list[tuple[str, Callable]] = []  # the name of torch.compiler's own mark, and the function


def eager(function: Callable) -> Callable:
    """Marks a function or method: a compiled forward calls it as it stands (compiler.disable)."""
    return _note("disable", function)


def constant(function: Callable) -> Callable:
    """Marks a function: a compiled forward calls it once and keeps its result."""
    return _note("assume_constant_result", function)


def _note(mark: str, function: Callable) -> Callable:
    if "<locals>" in function.__qualname__:
        raise ValueError(f"{function.__qualname__}: found a local function, expected a named one")
    _noted.append((mark, function))
    return function


def hand_over() -> None:
    """Puts torch's marked function in the place of each noted one, in its module or class.

    A name that was imported from there before keeps the function as it was.
    """
    while _noted:
        mark, function = _noted.pop()
        *owners, name = function.__qualname__.split(".")
        owner = reduce(getattr, owners, sys.modules[function.__module__])
        setattr(owner, name, getattr(torch.compiler, mark)(function))


@contextmanager
def without_tracer() -> Iterator[None]:
    """While entered, libraries that are imported find a stand-in for the tracer.

    torchvision imports it to ask which devices it knows, timm to mark one class. The stand-in
    answers when it is asked; nothing else may be looked up in it.
    """
    if TRACER in sys.modules:
        yield
        return

    def is_compile_supported(device: str) -> bool:
        from torch._dynamo.utils import is_compile_supported

        return is_compile_supported(device)

    tracer, utils = ModuleType(TRACER), ModuleType(f"{TRACER}.utils")
    tracer.config = SimpleNamespace()
    tracer.disable = lambda function, *rest, **options: function
    tracer.utils, utils.is_compile_supported = utils, is_compile_supported
    sys.modules |= {TRACER: tracer, f"{TRACER}.utils": utils}
    try:
        yield
    finally:
        del sys.modules[TRACER], sys.modules[f"{TRACER}.utils"]
