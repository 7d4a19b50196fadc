"""Jobs tracked by an MLflow server whose store is PostgreSQL, both real and on the loopback
address.

Runs where PostgreSQL's programs and psycopg2 are (Debian: postgresql; pip: mimlab's extra
`server`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
from test_track import box, finish, make_run

from stages.kit.job import courier, track

BIN = next(
    (p.parent for p in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)), None
)
BIN = BIN or (Path(shutil.which("initdb")).parent if shutil.which("initdb") else None)


def free_port() -> int:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


@pytest.fixture
def postgresql():
    """The address of an empty data base of a server of its own."""
    if BIN is None:
        pytest.skip("PostgreSQL is not installed here: no initdb")
    pytest.importorskip("psycopg2", reason="needs psycopg2-binary")
    # PostgreSQL refuses to run as root; its own user then needs a way to its files
    owner = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    folder, port = Path(tempfile.mkdtemp(dir="/tmp")), free_port()
    (folder / "password").write_text("sesame\n")
    if owner:
        shutil.chown(folder, "postgres")
        shutil.chown(folder / "password", "postgres")

    def run(program: str, *words) -> None:
        subprocess.run(
            [*owner, str(BIN / program), *map(str, words)],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd="/",
            env=os.environ | {"PGPASSWORD": "sesame"},
        )

    try:
        run(
            "initdb",
            "-D",
            folder / "data",
            "-U",
            "mlflow",
            "-A",
            "scram-sha-256",
            "--pwfile",
            folder / "password",
            "--no-sync",
        )
        listen = (
            f"-c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off -p {port}"
        )
        run("pg_ctl", "-D", folder / "data", "-l", folder / "log", "-o", listen, "-w", "start")
        try:
            run("createdb", "-h", "127.0.0.1", "-p", port, "-U", "mlflow", "mlflow")
            yield f"postgresql://mlflow:sesame@127.0.0.1:{port}/mlflow"
        finally:
            run("pg_ctl", "-D", folder / "data", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def server(postgresql, tmp_path):
    """The address of an MLflow server with that store."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
        "--backend-store-uri",
        postgresql,
        "--artifacts-destination",
        str(tmp_path / "artifacts"),
    ]
    with (tmp_path / "server.log").open("w") as log:
        running = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            cwd=tmp_path,
            start_new_session=True,
            env=os.environ | courier.SETTINGS,
        )
    try:
        end = time.monotonic() + 300
        while True:
            assert running.poll() is None and time.monotonic() < end, (
                tmp_path / "server.log"
            ).read_text()
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5),
            ):
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(running.pid, 15)
        running.wait(60)


def test_a_job_tracked_by_a_server_with_postgresql(server, postgresql, tmp_path, monkeypatch):
    import psycopg2

    monkeypatch.delenv("MIMLAB_TRACKING", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setattr(track, "IDLE", 1.0)
    monkeypatch.setattr(track, "WAIT", 120.0)
    run = make_run(tmp_path)
    with track.tracked(run):
        finish(run, rows=1200)  # more than one batch
    assert track.entries(box(tmp_path)) == [], "everything is delivered"
    assert not (tmp_path / "mlflow.db").exists()
    with contextlib.closing(psycopg2.connect(postgresql)) as base, base.cursor() as query:
        query.execute(
            "select run_uuid, status, artifact_uri from runs where name = 'pretrain/mae-s0'"
        )
        [(id, status, artifacts)] = query.fetchall()
        assert status == "FINISHED" and artifacts.startswith("mlflow-artifacts:/")
        query.execute(
            "select step, value from metrics where run_uuid = %s and key = 'loss' order by step",
            (id,),
        )
        rows = dict(query.fetchall())
        assert rows[0] == 1 and rows[1199] == pytest.approx(1 / 1200) and len(rows) == 1200
        query.execute("select value from tags where run_uuid = %s and key = 'fingerprint'", (id,))
        assert query.fetchone() == ("f" * 64,)
    stored = {p.name for p in (tmp_path / "artifacts").rglob("*") if p.is_file()}
    assert stored == {"manifest.json", "history.jsonl", "masks.png", "config.json"}
