"""Entry scripts of a virtual environment that find the Python beside them wherever it is moved.

    python -m workflow.relocate .venv

An installer writes whole paths: `snakemake`, `dvc` and `mlflow` begin with the place of their
Python, and `activate` holds that of the environment. Once a checkout is moved or copied they fail,
or, where the old one is still there, quietly use its packages. `make` calls this after each
installation, and with every command, since somebody may have installed more. Csh and fish cannot
know where a file that they read lies, or each version in its own way: their files get the present
place.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

# A script that sh and Python both read: to Python its first statement is a text. `realpath` follows
# a link to the script; where it is missing, the folder of the link is tried.
HEADER = b"""#!/bin/sh
'''exec' "$(dirname -- "$(realpath -- "$0" 2>/dev/null || printf %s "$0")")/python" "$0" "$@"
' '''
"""
# What installers write; the second where the path holds a space or is long.
PLAIN = re.compile(rb"#!(?P<python>[^\n]*/bin/python[\d.]*)\n")
LONG = re.compile(
    rb"#!/bin/sh\n'''exec' (?P<python>[^\n]*/bin/python[\d.]*\"?) \"\$0\" \"\$@\"\n' '''\n"
)
HERE = 'CDPATH= cd -- "$(dirname -- "${BASH_SOURCE:-$0}")/.." 2>/dev/null && [ -f bin/activate ]'
PLACES = {  # of the line that holds the environment's place
    "activate": re.compile(r"^( *(?:export )?VIRTUAL_ENV=)(?!\$\(cygpath)(.+)$", re.M),
    "activate.csh": re.compile(r"^(setenv VIRTUAL_ENV )(.+)$", re.M),
    "activate.fish": re.compile(r"^(set -gx VIRTUAL_ENV )(.+)$", re.M),
}


def relocate(venv: Path) -> list[Path]:
    """Rewrite the entry scripts and `activate` of an environment; those that were changed.

    Scripts of another Python stay as they are, and so do those that would be no Python any more.
    """
    folder, changed = venv / "bin", []
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_file():
            continue
        old = path.read_bytes()
        new = _activated(path.name, old, venv) if path.name in PLACES else _script(old, venv)
        if new != old:
            _replace(path, new)
            changed.append(path)
    return changed


def _script(old: bytes, venv: Path) -> bytes:
    found, names = PLAIN.match(old) or LONG.match(old), {venv.name, venv.resolve().name}
    if found is None or Path(os.fsdecode(found["python"]).strip('"')).parts[-3] not in names:
        return old
    new = HEADER + old[found.end() :]
    try:
        compile(new, "script", "exec")
    except (SyntaxError, ValueError):
        return old
    return new


def _activated(name: str, old: bytes, venv: Path) -> bytes:
    place = os.path.realpath(venv)
    quoted = {
        "activate": f'"$({HERE} && pwd || printf %s {shlex.quote(place)})"',
        "activate.csh": shlex.quote(place).replace("!", "\\!"),
        "activate.fish": "'" + place.replace("\\", "\\\\").replace("'", "\\'") + "'",
    }[name]
    text = PLACES[name].sub(lambda line: line[1] + quoted, os.fsdecode(old))
    return os.fsencode(text)


def _replace(path: Path, content: bytes) -> None:
    """Whole or not at all, with the old one's mode: another process may start it meanwhile."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


if __name__ == "__main__":
    relocate(Path(sys.argv[1]))
