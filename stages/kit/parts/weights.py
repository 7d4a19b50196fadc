"""Files of weights that a user names, read without running code that they hold."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


class WeightsError(ValueError):
    """A file of weights that is not what it should be; the message names it."""

    plain = True  # shown without a traceback


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a state dict, on the CPU: of a .safetensors file, or of what torch.save wrote.

    WeightsError for anything else; a pickled module is refused, since to read it is to run it.
    """
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"weights: {path}: found no plain state dict ({first_line(error)}), expected "
            ".safetensors, or what torch.save(module.state_dict(), PATH) wrote"
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise WeightsError(f"weights: {path}: cannot be read: {first_line(error)}") from None
    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise WeightsError(
            f"weights: {path}: found a {type(state).__name__}, expected a state dict"
        )
    return state


def first_line(error: Exception) -> str:
    """The first two lines of what an error says, in one of at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:200]
