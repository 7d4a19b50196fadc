"""Signals that ask a training to stop, kept until it can."""

from __future__ import annotations

import signal
import threading


class Signals:
    """While entered, SIGTERM and the first SIGINT only set `number`; a second SIGINT acts at once.

    A second SIGTERM changes nothing: Slurm sends one to every process of a job, and torchrun passes
    its own on. Outside of the main thread, where Python takes no signals, nothing is kept.
    """

    def __init__(self):
        self.number = 0

    def __enter__(self) -> Signals:
        self._old = {}
        if threading.current_thread() is threading.main_thread():
            for which in (signal.SIGTERM, signal.SIGINT):
                self._old[which] = signal.signal(which, self._note)
        return self

    def _note(self, number: int, frame) -> None:
        self.number = number
        if number == signal.SIGINT:
            signal.signal(number, self._old[number])

    def __exit__(self, *error) -> None:
        for which, handler in self._old.items():
            signal.signal(which, handler)
