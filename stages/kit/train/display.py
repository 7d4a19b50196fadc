"""What a person sees of a running training: a bar on a terminal, else a line every ten seconds,
both on stderr.
"""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from stages.kit.durations import duration

INTERVAL = 10.0  # seconds between lines when stderr is a file


class Display:
    """Shows step, loss, images/s, time left, and FLOP/s (with the share of the device's matrix rate
    where that is known).
    """

    def __init__(
        self,
        label: str,
        steps: int,
        start: int,
        images_per_step: int,
        peak: float | None,
        shown: bool = True,
    ):
        self.label, self.steps, self.images = label, steps, images_per_step
        self.peak, self.shown = peak, shown
        self.flops_per_image = 0.0
        self._window = (time.perf_counter(), start)
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
