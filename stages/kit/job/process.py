"""The process of a job: its rank, its threads, the signals that end it, and what it must not do."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading

# No library may report home about a run.
QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
}


def prepare() -> None:
    """Called first by the command of every stage: libraries keep quiet, errors are readable."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if "huggingface_hub.constants" in sys.modules:  # it read the variables when it was imported
        sys.modules["huggingface_hub.constants"].HF_HUB_DISABLE_TELEMETRY = True
    sys.excepthook = show_error


def show_error(kind, error, trace) -> None:
    """Print an error that is meant for the user (`plain`) as its message alone.

    All others are printed as Python does, with a traceback.
    """
    if getattr(error, "plain", False):
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


@contextlib.contextmanager
def terminable():
    """SIGTERM and SIGINT end the job as SystemExit 143 and 130.

    So temporary files are removed and locks are opened. A handler that somebody else has set stays;
    the training loop sets its own inside of this.
    """
    handled = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    if threading.current_thread() is not threading.main_thread():
        handled = {}  # only the main thread may set handlers
    handled = {number: old for number, old in handled.items() if signal.getsignal(number) == old}
    for number in handled:
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        for number, old in handled.items():
            signal.signal(number, old)


def rank() -> int:
    """The number of this process among those of torchrun; 0 alone."""
    return int(os.environ.get("RANK", 0)) if world() > 1 else 0


def barrier() -> None:
    """Wait for the other processes of torchrun."""
    if world() > 1:
        from stages.kit import dist

        dist.barrier()


def world() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def set_threads(wanted: int | None) -> None:
    """Give this process its share of the `wanted` threads of its job; None leaves all as it is."""
    if wanted:
        share = max(1, wanted // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        os.environ["OMP_NUM_THREADS"] = str(share)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(share)


def threads(wanted: int | None) -> int:
    """How many CPU threads this process uses."""
    if "torch" in sys.modules:
        return sys.modules["torch"].get_num_threads()
    return wanted or int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
