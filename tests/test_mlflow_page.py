"""MLflow's own page in a real browser: it opens on training runs, one row for each pretraining."""

from __future__ import annotations

import shutil

import pytest
from PIL import Image
from test_track import box, empty_store, make_run, make_task, settings, whole, whole_task

from stages.kit.job import courier
from tests import browser, pictures

__all__ = ["empty_store", "settings"]  # fixtures


pytestmark = pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium on this machine")


def test_the_view_of_the_rows(empty_store, tmp_path):
    """The scores of both tasks are columns, and no job has a row of its own."""
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    run = make_run(tmp_path)
    whole(run)
    whole_task(make_task(tmp_path, run), 0.5)
    whole_task(make_task(tmp_path, run, "linear", "b" * 64), 0.75)
    assert courier.replay(box(tmp_path)) == (3, [])
    [(name, at)] = courier.pages(tmp_path / "mlflow.db")
    assert name == "demo"
    text = "document.body.innerText"
    with (
        pictures.served(tmp_path / "mlflow.db", tmp_path) as address,
        browser.open(tmp_path) as page,
    ):
        pictures.quiet(page, address)
        page.go(f"{address}/{at}")
        page.wait(f"document.body && {text}.includes('mae-s0') && {text}.includes('matching')")
        page.wait(f"{text}.includes('score/knn') && {text}.includes('0.75')")
        shown = page.run(text)
    assert "1 matching run" in shown and "Methods: scores and cost" in shown
    assert "pretrain/mae-s0" not in shown and "Evaluation runs" not in shown


def test_the_pictures_of_the_docs_are_taken(empty_store, tmp_path):
    """Of the rows, and of their scores against cost; what they show is not compared."""
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    for n in range(2):
        run = make_run(tmp_path, f"mae-s{n}", f"{n}" * 64)
        whole(run)
        whole_task(make_task(tmp_path, run, print=f"{n + 2}" * 64), 0.5 + n / 4)
    assert courier.replay(box(tmp_path)) == (4, [])
    pictures.take(tmp_path / "mlflow.db", tmp_path)
    for name in ("mlflow-runs.png", "mlflow-compare.png"):
        image = Image.open(tmp_path / name)
        assert image.width == 1500 and len(image.convert("RGB").getcolors(10**6)) > 20
