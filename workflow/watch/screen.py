"""Where the view goes: a block at the bottom of a terminal, or plain lines."""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import TextIO

from workflow.watch import words
from workflow.watch.board import Board

BEAT = 30.0  # seconds between two lines on how far all is, where there is no terminal
BAR = 30  # columns


class Lines:
    """Plain lines: when a job begins or ends, and from time to time how far all is."""

    def __init__(self, out: TextIO):
        self.out, self.last = out, time.monotonic()

    def say(self, text: str) -> None:
        """A line that stays."""
        print(text, file=self.out, flush=True)

    def event(self, board: Board, id: str, state: str) -> None:
        """A job's state is new."""
        if state != "waiting":
            self.say(f"{time.strftime('%H:%M:%S')} {words.changed(board, id, state)}")

    def show(self, board: Board) -> None:
        """How far all is; called often."""
        if time.monotonic() - self.last >= BEAT:
            self.say(f"{time.strftime('%H:%M:%S')} {words.heartbeat(board)}")
            self.last = time.monotonic()

    def close(self) -> None:
        """Nothing more will be shown."""


class Terminal(Lines):
    """Lines of finished jobs that scroll up, above a block that is drawn anew."""

    def __init__(self, out: TextIO):
        super().__init__(out)
        self.drawn = 0  # lines of the block

    def say(self, text: str) -> None:
        self.close()
        super().say(text)

    def event(self, board: Board, id: str, state: str) -> None:
        if state not in ("waiting", "running"):
            super().event(board, id, state)

    def show(self, board: Board) -> None:
        size = shutil.get_terminal_size()
        lines = [line[: size.columns - 1] for line in block(board, size.lines - 2)]
        # up, erase all below, draw: in one write, so that nothing flickers
        up = f"\x1b[{self.drawn}F" if self.drawn else ""
        self.out.write(f"{up}\x1b[J" + "".join(f"{line}\n" for line in lines))
        self.out.flush()
        self.drawn = len(lines)

    def close(self) -> None:
        if self.drawn:
            self.out.write(f"\x1b[{self.drawn}F\x1b[J")
            self.out.flush()
        self.drawn = 0


def block(board: Board, rows: int) -> list[str]:
    """The whole of a plan in at most so many lines."""
    full = round(board.share() * BAR)
    lines = [f"[{'#' * full}{'.' * (BAR - full)}] {words.overall(board)}"]
    active = [f"  {id}: {words.running(board, id)}" for id in board.of("running")]
    wait = [f"  waiting: {words.waiting(board)}"] if board.of("waiting") else []
    room = max(1, rows - len(lines) - len(wait))
    if len(active) > room:
        active = [*active[: room - 1], f"  and {len(active) - room + 1} more that run"]
    return ["", *lines, *active, *wait][-max(1, rows) :]


def screen(out: TextIO | None = None) -> Lines:
    """What suits a stream: a block on a terminal that can move its cursor, else lines."""
    out = out or sys.stdout
    able = out.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    return Terminal(out) if able else Lines(out)
