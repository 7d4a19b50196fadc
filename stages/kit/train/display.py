"""What a person sees of a running training: a bar on a terminal, else a line every ten seconds,
both on stderr, and a record for `python -m workflow.watch`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tqdm import tqdm

from workflow import progress
from workflow.durations import duration

INTERVAL = 10.0  # seconds between lines when stderr is a file
NOTED = 2.0  # seconds between records


class Display:
    """Shows step, loss, images/s, time left, and FLOP/s (with the share of the device's matrix rate
    where that is known). `work`: the job's work folder, for the record.
    """

    def __init__(
        self,
        label: str,
        steps: int,
        start: int,
        images_per_step: int,
        peak: float | None,
        shown: bool = True,
        work: Path | None = None,
    ):
        self.label, self.steps, self.images = label, steps, images_per_step
        self.peak, self.shown, self.work = peak, shown, work
        self.flops_per_image = 0.0
        self._window = self._noted = (time.perf_counter(), start)
        self._rate: float | None = None
        self.bar = None
        if shown and sys.stderr.isatty():
            self.bar = tqdm(
                total=steps,
                initial=start,
                desc=label,
                unit="step",
                mininterval=0.5,
                dynamic_ncols=True,
            )

    def update(self, done: int, loss: float | None) -> None:
        """`done` steps are finished; `loss` is the newest logged mean, if any."""
        if not self.shown:
            return
        now = time.perf_counter()
        self._note(done, loss, now)
        since, first = self._window
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
            if now - since >= 2.0:
                self.bar.set_postfix_str(", ".join(self._facts(done - first, now - since, loss)))
                self._window = (now, done)
        elif now - since >= INTERVAL:
            rate = (done - first) / (now - since)
            facts = [f"step {done}/{self.steps}", *self._facts(done - first, now - since, loss)]
            if rate:
                facts.append(f"{duration((self.steps - done) / rate)} left")
            print(f"{self.label}: " + ", ".join(facts), file=sys.stderr, flush=True)
            self._window = (now, done)

    def _note(self, done: int, loss: float | None, now: float) -> None:
        since, first = self._noted
        if self.work is None or (now - since < NOTED and done < self.steps):
            return
        rate = max(done - first, 1e-9) / max(now - since, 1e-9)  # steps/s
        if self._rate is not None:  # a few seconds alone would let the time left jump
            rate = 0.8 * self._rate + 0.2 * rate
        facts = {"step": done, "steps": self.steps, "images_per_s": rate * self.images}
        progress.note(self.work, **facts, left_s=(self.steps - done) / rate, loss=loss)
        self._noted, self._rate = (now, done), rate

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _facts(self, steps: int, seconds: float, loss: float | None) -> list[str]:
        images = steps * self.images / seconds
        facts = [] if loss is None else [f"loss {loss:.4g}"]
        facts.append(f"{images:.4g} images/s")
        flops = images * self.flops_per_image
        if flops:
            share = f" ({flops / self.peak:.0%} of peak)" if self.peak else ""
            facts.append(f"{flops / 1e12:.3g} TFLOP/s{share}")
        return facts
