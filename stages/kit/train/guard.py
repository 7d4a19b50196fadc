"""What a training says when a number in it became NaN or infinite."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from workflow.files import JobError, write_atomic


class NonFiniteError(FloatingPointError):
    """A loss, one of its terms, a gradient or a weight became NaN or infinite, in the batch of
    `step` (None: unknown).
    """

    plain = True  # the message says it all: shown without a traceback

    def __init__(self, message: str, step: int | None = None):
        super().__init__(message)
        self.step = step


def dump(path: Path, facts: dict) -> str:
    """Writes the batch at fault, with what is known of it; a sentence about where it lies."""
    content = io.BytesIO()
    torch.save(facts, content)
    try:
        write_atomic(path, content.getvalue())
    except (OSError, JobError) as error:
        return f"The batch could not be written: {error}"
    return f"The batch was written to {path} (torch.load(path, weights_only=True))."


def advice(batch: dict[str, torch.Tensor]) -> str:
    """Whether the batch itself is at fault, and what to try."""
    floats = {key: value for key, value in batch.items() if value.is_floating_point()}
    broken = ", ".join(key for key, value in floats.items() if not value.isfinite().all())
    if broken:
        return f"The batch itself holds non-finite numbers in {broken}: look at the data."
    return (
        "The batch itself is finite. Try: a lower lr, a longer warmup, clip: 1.0, "
        "train.precision: fp32."
    )
