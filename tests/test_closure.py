"""The import closure: what a file imports, what that imports, and nothing else."""

from __future__ import annotations

import ast
import os
import time
from pathlib import Path

import pytest

from workflow.closure import OBSERVERS, closure
from workflow.plugins import FOLDERS, ROOT, ParamsError, names


def project(folder: Path, **files: str) -> Path:
    """A folder of files: path with __ for / -> text; packages get an __init__.py."""
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for package in [p for p in folder.rglob("*") if p.is_dir()]:
        (package / "__init__.py").touch()
    return folder


@pytest.mark.parametrize(
    "text",
    [
        "import stages.kit.b\n",
        "import stages.kit.b as c\n",
        "from stages.kit import b\n",
        "from stages.kit.b import x\n",
        "from .kit import b\n",
        "from .kit.b import x\n",
        "from . import kit\nfrom stages.kit import b, c\n",
        "def f():\n    if 1:\n        from stages.kit.b import x\n",
        "try:\n    import stages.kit.b\nexcept ImportError:\n    pass\n",
    ],
)
def test_every_form_of_import_is_followed(tmp_path, text):
    root = project(tmp_path, stages__a=text, stages__kit__b="x = 1\n", stages__kit__other="")
    packages = ("stages/__init__.py", "stages/kit/__init__.py")
    assert closure(["stages/a.py"], root) == tuple(
        sorted(["stages/a.py", "stages/kit/b.py", *packages])
    )


def test_imports_are_followed_to_their_end_and_in_circles(tmp_path):
    root = project(
        tmp_path,
        stages__a="from stages.b import x\n",
        stages__b="import numpy\nfrom stages.c import x\n",
        stages__c="from stages.b import y\nfrom workflow import checks, plan\n",
        workflow__checks="",
        workflow__plan="",
    )
    expected = ["stages/__init__.py", *(f"stages/{n}.py" for n in "abc"), "workflow/checks.py"]
    assert closure(["stages/a.py"], root) == tuple(expected)
    assert closure(["stages/c.py", "stages/a.py"], root) == tuple(expected)


def test_what_only_watches_is_left_out_with_what_it_imports(tmp_path):
    root = project(
        tmp_path,
        stages__a="from stages.kit.job import track\n",
        stages__kit__job__track="from stages.kit.job import outbox\n",
        stages__kit__job__outbox="",
    )
    found = closure(["stages/a.py"], root)
    assert not OBSERVERS.intersection(found) and "stages/kit/job/outbox.py" not in found


def test_an_edit_and_a_new_file_are_seen(tmp_path):
    root = project(tmp_path, stages__a="from stages import b\n", stages__c="")
    assert "stages/b.py" not in closure(["stages/a.py"], root)
    (root / "stages/b.py").write_text("x = 1\n")
    assert "stages/b.py" in closure(["stages/a.py"], root)
    (root / "stages/b.py").write_text("from stages import c\n")
    assert "stages/c.py" in closure(["stages/a.py"], root)


def test_entries_are_in_it_whatever_they_are(tmp_path):
    root = project(tmp_path, stages__a="")
    (root / "stages/page.html").write_text("<p>")
    found = closure(["stages/page.html", "stages/gone.py"], root)
    assert {"stages/page.html", "stages/gone.py"} <= set(found)


def test_a_file_that_is_not_python_is_named(tmp_path):
    root = project(tmp_path, stages__a="from stages import b\n", stages__b="def f(:\n")
    with pytest.raises(ParamsError, match="stages/b.py, line 1: "):
        closure(["stages/a.py"], root)


def test_no_plugin_imports_another_and_no_stage_a_stage():
    """Then the closure of one job holds no code of another."""
    for kind, folder in FOLDERS.items():
        for name in names(kind):
            entry = f"stages/{folder}/{name}.py"
            others = [
                path
                for path in closure([entry], ROOT)
                if path.startswith(f"stages/{folder}/")
                and path != entry
                and not Path(path).name.startswith("_")
            ]
            assert not others, f"{entry} imports {others}"
    stages = {f"stages/{p.name}" for p in (ROOT / "stages").glob("[a-z]*.py")}
    for stage in stages:
        assert stages.intersection(closure([stage], ROOT)) == {stage}


def test_the_closure_holds_whatever_is_really_imported():
    """Of every file of stages that a stage imports by name, none is missed."""
    found = set(closure(["stages/pretrain.py"], ROOT))
    for path in found:
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module and module.startswith("stages") and not node.level:
                file = module.replace(".", "/")
                there = {f"{file}.py", f"{file}/__init__.py"} - OBSERVERS
                existing = {p for p in there if (ROOT / p).is_file()}
                assert existing <= found


def test_four_hundred_jobs_cost_little():
    entries = ["stages/pretrain.py", "stages/methods/mae.py", "stages/encoders/vit.py"]
    closure(entries, ROOT)
    start = time.process_time()
    for _ in range(400):
        closure(entries, ROOT)
    assert time.process_time() - start < 2, os.cpu_count()
