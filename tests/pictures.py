"""The pictures of MLflow's page in docs/: python -m tests.pictures [mlflow.db]

Starts MLflow on a store, such as the demo leaves, and looks at it in a headless Chromium:
docs/mlflow-runs.png has the rows with scores and cost, docs/mlflow-compare.png the score of each
task against the time it took.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from stages.kit.job import courier, links
from tests import browser

DOCS = Path(__file__).parents[1] / "docs"
SHOWN = "document.body && document.body.innerText.includes({!r})"
PANEL = "localStorage.setItem('mlflow.assistant.{}_v1', JSON.stringify({}))"


@contextlib.contextmanager
def served(store: Path, folder: Path) -> Iterator[str]:
    """The address of an MLflow server on the loopback with a SQLite store."""
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        port = it.getsockname()[1]
    words = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--backend-store-uri", f"sqlite:///{store.resolve()}"]
    with (folder / "server.log").open("w") as log:
        running = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words],
            stdout=log,
            stderr=log,
            cwd=folder,
            start_new_session=True,
            env=os.environ | courier.SETTINGS,
        )
    try:
        end = time.monotonic() + 300
        while True:
            said = (folder / "server.log").read_text()
            assert running.poll() is None and time.monotonic() < end, said
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5),
            ):
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(running.pid, 9)  # it only reads
        running.wait(60)


def quiet(page: browser.Page, address: str) -> None:
    """Closes what MLflow's page opens by itself beside the runs."""
    page.go(f"{address}/health")
    page.wait("document.body && location.pathname == '/health'")
    page.run(PANEL.format("panelOpen", "false"))
    page.run(PANEL.format("fab.autoOpenedOnFirstLoad", "true"))


def take(store: Path, to: Path) -> None:
    """Writes both pictures into a folder; the store has one experiment with results."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{store.resolve()}")
    [experiment] = [e.experiment_id for e in client.search_experiments() if e.name != "Default"]
    rows = client.search_runs([experiment], "tags.stage = 'run'")
    ready = {
        "mlflow-runs.png": ("", f"document.querySelectorAll('[role=row]').length > {len(rows)}"),
        "mlflow-compare.png": ("&compareRunsMode=CHART", "document.querySelector('.trace')"),
    }
    with tempfile.TemporaryDirectory() as folder, served(store, Path(folder)) as address:
        at = f"{address}/#/experiments/{experiment}/{links.rows()}"
        with browser.open(Path(folder), 1500, 860) as page:
            quiet(page, address)
            for picture, (more, drawn) in ready.items():
                page.go(f"{at}{more}")
                page.wait(f"{SHOWN.format(rows[0].info.run_name)} && {drawn}")
                time.sleep(5)  # what is drawn moves for a while
                page.shot(to / picture)
                image = Image.open(to / picture).quantize(64)
                image.save(to / picture, optimize=True)


if __name__ == "__main__":
    take(Path(*sys.argv[1:] or ["mlflow.db"]), DOCS)
