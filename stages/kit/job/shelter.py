"""The work folder of a job in a temporary workspace, which vanishes with all that lies in it.

`dvc exp run --temp` and its queue copy the project into `.dvc/tmp/exps/<name>` and delete that
folder in the end, also when a job was killed. There a job's work folder is a link to
`work/exp-<fingerprint>` of the project around it. So the courier finds the history, and the next
experiment with the identical job continues from its checkpoint.

Several experiments may do the identical job at a time. The first has the folder; the others use one
of their own, in their workspace, and say so.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from pathlib import Path

from stages.kit.job.device import locked
from stages.kit.job.track import home


@contextlib.contextmanager
def sheltered(work: Path):
    """Inside, `work` leads out of a temporary workspace, if it lies in one."""
    project = work.parent.parent.resolve()
    around = home(project)
    if around == project:
        yield
        return
    place = around / "work" / f"exp-{work.name}"
    locks = around / "work" / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        if (file := locked(locks / f"{place.name}.lock")) is None:
            if work.is_symlink():  # of an attempt before
                work.unlink()
            print(
                f"another experiment does the same job: if this one is killed, its checkpoint and "
                f"what it has not sent to MLflow yet are lost ({work})",
                file=sys.stderr,
            )
        else:
            held.enter_context(file)
            place.mkdir(exist_ok=True)
            work.parent.mkdir(parents=True, exist_ok=True)
            if not work.exists():
                work.unlink(missing_ok=True)
                work.symlink_to(place)
        yield


def remove(work: Path) -> None:
    """Delete a work folder, wherever it leads."""
    if work.is_symlink():
        shutil.rmtree(work.resolve(), ignore_errors=True)
        work.unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)
