"""The few distributed calls that the lab needs; each is a no-op in a single process.

Start one process per device: `torchrun --standalone --nproc-per-node N -m -- stages.pretrain --run
mae-s0` (the lone -- keeps torchrun from taking --run for an abbreviation of its own --run-path).
Rank and world are read from torchrun's environment, so they are right even before `start`.
"""

from __future__ import annotations

import atexit
import os

import torch
import torch.distributed as td


def rank() -> int:
    return int(os.environ.get("RANK", 0)) if world() > 1 else 0


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def start() -> None:
    """Joins the process group: gloo for tensors on the CPU, nccl for those on GPUs. Does nothing
    alone or when joined.
    """
    if world() > 1 and not td.is_initialized():
        atexit.register(stop)
        td.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and td.is_nccl_available() else "gloo"
        )


def stop() -> None:
    """Leaves the process group, if joined."""
    if td.is_initialized():
        td.destroy_process_group()


def barrier() -> None:
    """Waits for every rank."""
    agree(0)


def agree(value: int) -> int:
    """The largest of the ranks' host integers: a decision (save, stop) that all of them take at the
    same step.

    Travels over the CPU, so that it does not wait for a GPU's queue.
    """
    if world() == 1:
        return value
    start()
    flag = torch.tensor([value], dtype=torch.int64)
    td.all_reduce(flag, td.ReduceOp.MAX)
    return int(flag)


def mean(tensor: torch.Tensor) -> torch.Tensor:
    """Mean over ranks of an equally shaped tensor, in place; differentiation is not supported."""
    if world() > 1:
        _reduce(tensor, td.ReduceOp.SUM)
        tensor /= world()
    return tensor


def total(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place (codebook counts, centres)."""
    if world() > 1:
        _reduce(tensor, td.ReduceOp.SUM)
    return tensor


def minimum(tensor: torch.Tensor) -> torch.Tensor:
    """Minimum over ranks, in place."""
    if world() > 1:
        _reduce(tensor, td.ReduceOp.MIN)
    return tensor


def maximum(tensor: torch.Tensor) -> torch.Tensor:
    """Maximum over ranks, in place."""
    if world() > 1:
        _reduce(tensor, td.ReduceOp.MAX)
    return tensor


def _reduce(tensor: torch.Tensor, operation) -> None:
    """All-reduce in place; a view that is not contiguous goes through a copy, as gloo would mix up
    its elements.
    """
    dense = tensor.contiguous()
    td.all_reduce(dense, operation)
    if dense is not tensor:
        tensor.copy_(dense)


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """(b, ...) per rank -> (world * b, ...) in rank order, the same on every rank; no gradient
    flows.
    """
    if world() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world())]
    td.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
