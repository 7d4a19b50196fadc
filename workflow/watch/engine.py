"""The engine as a child: its output goes to a file, signals go to it, its status is kept."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

NAMES = ("snakemake", "dvc")
WARNING = re.compile(r"^(\S+: )?warning: .*\S")


def name(command: Sequence[str]) -> str:
    """What a command is called: snakemake, dvc, or its first word."""
    words = [Path(word).name for word in command]
    return next((word for word in words[:3] if word in NAMES), words[0])


def files(command: Sequence[str]) -> dict[str, str]:
    """The params file and results folder that Snakemake is given by --config."""
    pairs = [word.partition("=") for word in command]
    return {key: value for key, _, value in pairs if key in ("params", "results") and value}


class Engine:
    """A running command. `log`: the file that gets its output."""

    def __init__(self, command: Sequence[str], log: Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self.read = log, 0
        with log.open("wb") as out:
            self.child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)

    def ended(self, seconds: float) -> bool:
        """Whether it has ended within so many seconds."""
        try:
            self.child.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    @property
    def status(self) -> int:
        """Its exit status, as a shell counts: 128 and the number of the signal that ended it."""
        code = self.child.returncode
        return code if code >= 0 else 128 - code

    def warnings(self) -> Iterator[str]:
        """What it and its jobs have warned of since the last call."""
        with self.log.open("rb") as file:
            file.seek(self.read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.read += len(whole)
        for line in whole.decode("utf-8", "replace").splitlines():
            if WARNING.match(line):
                yield line.rstrip()

    @contextlib.contextmanager
    def signalled(self):
        """Signals to this process are for the child; it decides when to end.

        What a terminal sends on Ctrl-C reaches the child by itself, as all of its process group.
        """

        def interrupted(number, frame):
            if not _by_terminal():
                self.child.send_signal(number)

        handlers = {
            signal.SIGINT: interrupted,
            signal.SIGTERM: lambda number, frame: self.child.send_signal(number),
        }
        before = {number: signal.getsignal(number) for number in handlers}
        for number, handler in handlers.items():
            if before[number] != signal.SIG_IGN:
                signal.signal(number, handler)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _by_terminal() -> bool:
    """Whether Ctrl-C would reach this process: it is in the foreground of a terminal."""
    try:
        with open("/dev/tty", "rb") as tty:
            return os.tcgetpgrp(tty.fileno()) == os.getpgrp()
    except OSError:
        return False
