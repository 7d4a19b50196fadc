"""Entry scripts and `activate` find the environment that they lie in, whatever it is called."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from workflow.relocate import relocate

# As pip writes them. In a process of its own: pip, once imported, gives a process Python's own
# distutils, with which setuptools, and so torch's compiler, cannot be imported in it any more.
MAKE = """
import sys
from pip._vendor.distlib.scripts import ScriptMaker
maker = ScriptMaker(None, sys.argv[1])
maker.executable, maker.variants, maker.set_mode = sys.argv[2], {""}, True
maker.make(sys.argv[3])
"""
NAMES = ["plain", "two words", 'it\'s "q" $HOME `x` 100% ü', "long" * 40]


@pytest.fixture(params=NAMES, ids=["plain", "spaces", "quotes", "long"])
def moved(request, tmp_path):
    """An environment with a tool as pip installs it, made relocatable, then moved."""
    old, new = tmp_path / request.param / "old", tmp_path / request.param / "new place"
    venv = old / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    package = next((venv / "lib").iterdir()) / "site-packages/tool.py"
    package.write_text(
        "import sys\ndef main():\n    print(sys.prefix, *sys.argv[1:], sep='\\n')\n    return 3\n"
    )
    install(venv, "tool = tool:main")
    assert {path.name for path in relocate(venv)} >= {"tool", "activate"}
    assert relocate(venv) == []
    shutil.move(old, new)
    return new / ".venv"


def install(venv, entry: str) -> None:
    command = [sys.executable, "-c", MAKE, venv / "bin", venv / "bin/python", entry]
    subprocess.run(command, check=True)


def output(*command, status: int = 0, **options) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == status, done.stderr
    return done.stdout.splitlines()


def test_a_moved_script_runs_the_python_beside_it(moved, tmp_path):
    words = ["a b", "it's", "$HOME", ""]
    assert output(moved / "bin/tool", *words, status=3) == [str(moved), *words]
    assert output("bin/tool", status=3, cwd=moved) == [str(moved)]
    (tmp_path / "link").symlink_to(moved / "bin/tool")
    assert output(tmp_path / "link", status=3) == [str(moved)]
    path = {**os.environ, "PATH": f"{moved / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    assert output("tool", status=3, env=path) == [str(moved)]


SHELLS = [shell for shell in ("bash", "zsh") if shutil.which(shell)]


@pytest.mark.parametrize("shell", SHELLS)
def test_a_moved_activate_leads_to_its_own_folder(moved, shell):
    said = 'printf "%s\\n" "$VIRTUAL_ENV"; command -v python; tool'
    clean = {**os.environ, "CDPATH": str(moved.parents[1])}
    for start, cwd in (("bin/activate", moved), (moved / "bin/activate", None)):
        source = f'source "$1" && {said}'
        found = output(shell, "-c", source, shell, start, status=3, cwd=cwd, env=clean)
        assert found == [str(moved), str(moved / "bin/python"), str(moved)]


def test_a_shell_that_cannot_know_gets_the_place_of_the_last_installation(moved):
    relocate(moved)
    found = output(
        "sh", "-c", '. "$1"; printf "%s\\n" "$VIRTUAL_ENV"', "sh", moved / "bin/activate"
    )
    assert found == [str(moved)]
    fish = (moved / "bin/activate.fish").read_text()
    told = str(moved).replace("'", "\\'")
    assert f"\nset -gx VIRTUAL_ENV '{told}'\n" in fish


def test_what_is_no_script_of_this_environment_stays(tmp_path):
    folder = tmp_path / ".venv/bin"
    folder.mkdir(parents=True)
    kept = {
        "perl": b"#!/usr/bin/perl\nprint 1;\n",
        "other": b"#!/opt/other/bin/python3\nprint(1)\n",
        "any": b"#!/usr/bin/env python\nprint(1)\n",
        "binary": bytes(range(256)),
        "empty": b"",
        "future": b'#!/a/.venv/bin/python\n"""Doc."""\nfrom __future__ import annotations\n',
    }
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    (folder / "mine").write_bytes(b"#!/a/.venv/bin/python3.11\nprint(1)\n")
    (folder / "mine").chmod(0o750)
    (folder / "link").symlink_to("mine")
    (tmp_path / "linked").symlink_to(".venv")
    assert relocate(tmp_path / "linked") == [tmp_path / "linked/bin/mine"]
    assert relocate(tmp_path / ".venv") == []
    assert {name: (folder / name).read_bytes() for name in kept} == kept
    assert (folder / "mine").stat().st_mode & 0o777 == 0o750 and (folder / "link").is_symlink()


def test_make_calls_it_whenever_it_needs_the_environment():
    text = (Path(__file__).parents[1] / "Makefile").read_text()
    assert "-m workflow.relocate $(VENV)" in text.partition("\ninstall:")[2].partition("\n\n")[0]
