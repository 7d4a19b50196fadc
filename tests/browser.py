"""A headless Chromium that a test looks through and clicks in, by DevTools over a pipe.

    with browser.open(tmp_path) as page:
        page.go("http://127.0.0.1:5000")
        page.wait("document.querySelector('table')")
        page.shot(tmp_path / "table.png")

MIMLAB_CHROMIUM names the program where it is on no PATH.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PROGRAM = os.environ.get("MIMLAB_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe"),
)


class Page:
    """A page of a Chromium that listens at one pipe and answers at another."""

    def __init__(self, to: int, answers: int):
        self.to, self.answers, self.last = to, os.fdopen(answers, "rb"), 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        self.call("Page.enable")

    session = None

    def call(self, method: str, **params) -> dict:
        """What a command of DevTools answers. RuntimeError if that is an error."""
        self.last += 1
        message = {"id": self.last, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._next())
            if answer.get("id") == self.last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _next(self) -> bytes:
        text = bytearray()
        while (letter := self.answers.read(1)) != b"\0":
            if not letter:
                raise RuntimeError("Chromium has gone")
            text += letter
        return bytes(text)

    def go(self, url: str) -> None:
        """Opens an address; what it loads may come later."""
        self.call("Page.navigate", url=url)

    def run(self, script: str):
        """The value of an expression, as JSON would hold it."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 300.0) -> None:
        """Waits until an expression is a true one. AssertionError if it does not become so."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < end, f"{script}: {self.run('document.body.innerText')}"
            time.sleep(0.5)

    def shot(self, path: Path) -> None:
        """Writes what is to be seen as a PNG."""
        found = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.contextmanager
def open(folder: Path, width: int = 1400, height: int = 800) -> Iterator[Page]:
    """A page of a Chromium whose profile lies in `folder`."""
    (inside, to), (answers, outside) = os.pipe(), os.pipe()
    chromium = [PROGRAM, *OPTIONS, f"--user-data-dir={folder / 'profile'}"]
    chromium.append(f"--window-size={width},{height}")
    with (folder / "chromium.log").open("w") as log:
        running = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{inside} 4>&{outside}', "bash", *chromium],
            pass_fds=(inside, outside),
            stdout=log,
            stderr=log,
        )
    os.close(inside)
    os.close(outside)
    try:
        yield Page(to, answers)
    finally:
        running.terminate()
        running.wait(30)
        os.close(to)
