"""Small SVG charts for a page that must read on a phone, in the dark and offline.

A chart is a string of SVG without scripts or fonts of its own. Colours are CSS classes (`c0`, `c1`,
..., `axis`, `grid`), so the page decides them for light and dark (reporting/colours.py); a saved
chart gets the same style from `standalone`. Charts are 340 units wide, about the width of a phone,
so that their 12-unit letters stay legible there; a wide page sets several side by side. Marks
differ in shape or dash as well as in colour. Equal inputs give equal bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import numpy as np

from stages.reporting.formats import number

WIDTH = 340
DASHES = ("", "7 3", "2 3", "9 3 2 3")


@dataclass(frozen=True)
class Point:
    """A mark: place, optional vertical (scatter) or horizontal (intervals) range, colour number,
    hover text.
    """

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    colour: int = 0
    hollow: bool = False
    text: str = ""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that lie inside [low, high], about `count` of them."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, int(math.floor(high / step + 1e-9)) + 1)]


class Frame:
    """The plot area: scales, grid and labels. Coordinates outside are clipped by choosing the
    limits first.
    """

    def __init__(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        x_label: str,
        y_label: str,
        height: int,
        *,
        log_x: bool = False,
        whole_x: bool = False,
        floor: float | None = None,
        left: int = 46,
        top: int = 10,
    ):
        self.log, self.left, self.right, self.top, self.bottom = (
            log_x,
            left,
            WIDTH - 12,
            top,
            height - 38,
        )
        self.whole = whole_x
        xs = [math.log10(x) for x in xs] if log_x else list(xs)
        (self.x0, self.x1), (self.y0, self.y1) = (
            _limits(xs, 0.06 if log_x or whole_x else 0.0),
            _limits(ys, 0.06),
        )
        self.y0 = self.y0 if floor is None else floor
        self.parts: list[str] = []
        for y in ticks(self.y0, self.y1):
            at = self.y(y)
            self.parts += [
                f'<line class="grid" x1="{left}" x2="{self.right}" y1="{at:.1f}" y2="{at:.1f}"/>',
                _text(left - 6, at + 4, number(y), "end"),
            ]
        for x in self._x_ticks():
            self.parts.append(_text(self.x(x), self.bottom + 16, number(x), "middle"))
        base = self.bottom
        self.parts += [
            f'<line class="axis" x1="{left}" x2="{self.right}" y1="{base}" y2="{base}"/>',
            _text((left + self.right) / 2, height - 6, x_label, "middle"),
            f'<text transform="translate(11 {(self.top + self.bottom) / 2:.0f}) rotate(-90)" '
            f'text-anchor="middle">{escape(y_label)}</text>',
        ]

    def _x_ticks(self) -> list[float]:
        if not self.log:
            return [x for x in ticks(self.x0, self.x1) if not self.whole or x == int(x)]
        decades = range(math.floor(self.x0), math.ceil(self.x1) + 1)
        found = [m * 10.0**d for d in decades for m in (1, 2, 5)]
        found = [v for v in found if self.x0 <= math.log10(v) <= self.x1]
        return found if len(found) <= 6 else [v for v in found if f"{v:e}".startswith("1.")]

    def x(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return self.left + (value - self.x0) / (self.x1 - self.x0) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - (value - self.y0) / (self.y1 - self.y0) * (self.bottom - self.top)


def _limits(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low < 1e-12:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    pad = (high - low) * margin
    return low - pad, high + pad


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    cls = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{cls}>{escape(text)}</text>'


def _svg(parts: Sequence[str], height: int, title: str) -> str:
    size, title = f'viewBox="0 0 {WIDTH} {height}"', escape(title)
    head = f'<svg class="chart" {size} role="img" aria-label="{title}"><title>{title}</title>'
    return head + "".join(parts) + "</svg>"


def smooth(values: Sequence[float], share: float = 0.04) -> np.ndarray:
    """Centred mean over a window of `share` of the points, shrinking at both ends, so that the ends
    are not bent.
    """
    values = np.asarray(values, np.float64)
    half = int(len(values) * share / 2)
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(half, np.minimum(at, len(values) - 1 - at))
    return (total[at + reach + 1] - total[at - reach]) / (2 * reach + 1)


def curves(
    lines: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    title: str,
    x_label: str,
    y_label: str,
    colour: int = 0,
) -> str:
    """Lines (name, x, y) that belong together, such as the seeds of one run: smoothed, with the raw
    values faint.
    """
    lines = [(name, x, y) for name, x, y in lines if len(x)]
    if not lines:
        return ""
    smoothed = [smooth(y) for _, _, y in lines]
    height = 200
    # the first values are often far above the rest; what matters is where the curve goes
    rest = np.concatenate([s[max(1, len(s) // 50) :] if len(s) > 3 else s for s in smoothed])
    low, high = float(rest.min()), float(rest.max())
    frame = Frame([v for _, x, _ in lines for v in x], [low, high], x_label, y_label, height)
    for n, ((name, x, y), soft) in enumerate(zip(lines, smoothed, strict=True)):
        clip = frame.y0, frame.y1
        raw = " ".join(
            f"{frame.x(a):.1f},{frame.y(min(max(b, clip[0]), clip[1])):.1f}"
            for a, b in zip(x, y, strict=True)
        )
        path = " ".join(
            f"{frame.x(a):.1f},{frame.y(min(max(b, clip[0]), clip[1])):.1f}"
            for a, b in zip(x, soft, strict=True)
        )
        dash = f' stroke-dasharray="{DASHES[n % len(DASHES)]}"' if DASHES[n % len(DASHES)] else ""
        frame.parts += [
            f'<polyline class="faint c{colour}" points="{raw}"/>',
            f'<polyline class="line c{colour}"{dash} points="{path}">'
            f"<title>{escape(name)}</title></polyline>",
        ]
    return _svg(frame.parts, height, title)


def _mark(x: float, y: float, colour: int, hollow: bool, text: str) -> str:
    fill = f'fill="none" stroke-width="2" class="c{colour}"' if hollow else f'class="f{colour}"'
    shapes = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" {fill}>',
        f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9" {fill}>',
        f'<path d="M{x:.1f} {y - 6:.1f}l6 10.5h-12z" {fill}>',
        f'<path d="M{x:.1f} {y - 6.5:.1f}l6.5 6.5-6.5 6.5-6.5-6.5z" {fill}>',
    )
    shape = shapes[colour % len(shapes)]
    return f"{shape}<title>{escape(text)}</title></{shape[1:].split(' ', 1)[0]}>"


def scatter(points: Sequence[Point], title: str, x_label: str, y_label: str) -> str:
    """Quality against cost: marks with vertical ranges and their names beside them; the cost axis
    is logarithmic. Hollow marks that cost less than a tenth of the cheapest filled one stand at
    that tenth, or an untrained encoder would squeeze all others together.
    """
    points = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y) and p.x > 0]
    least = min((p.x for p in points if not p.hollow), default=0.0) / 10
    points = [replace(p, x=max(p.x, least)) for p in points]
    if not points:
        return ""
    height = 260
    ys = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    frame = Frame([p.x for p in points], ys, x_label, y_label, height, log_x=True)
    taken: list[tuple[float, float, float, float]] = []  # boxes that a name must not cover
    for p in points:
        x, y = frame.x(p.x), frame.y(p.y)
        taken.append((x - 7, x + 7, y - 6, y + 6))
        if p.low is not None and p.high is not None:
            taken.append((x - 2, x + 2, frame.y(p.high), frame.y(p.low)))
            frame.parts.append(
                f'<line class="range c{p.colour}" x1="{x:.1f}" x2="{x:.1f}" '
                f'y1="{frame.y(p.low):.1f}" y2="{frame.y(p.high):.1f}"/>'
            )
        frame.parts.append(_mark(x, y, p.colour, p.hollow, p.text or p.name))
    for p in points:
        x, y, wide = frame.x(p.x), frame.y(p.y), 7.2 * len(p.name)
        places = [
            (left, y + d)
            for d in (4, -8, 16, -20, 28, -32, 40)
            for left in (x + 10, x - 10 - wide)
            if left > frame.left and left + wide < WIDTH and frame.top < y + d < frame.bottom
        ]
        left, base = next(
            (
                (a, b)
                for a, b in places
                if all(
                    a > x1 or a + wide < x0 or b - 10 > y1 or b + 2 < y0 for x0, x1, y0, y1 in taken
                )
            ),
            places[0] if places else (x + 10, y + 4),
        )
        taken.append((left, left + wide, base - 10, base + 2))
        frame.parts.append(_text(left, base, p.name, "start", "strong"))
    return _svg(frame.parts, height, title)


def stages(
    lines: Sequence[tuple[str, int, Sequence[Point]]], title: str, x_label: str, y_label: str
) -> str:
    """Lines (name, colour, points) over whole numbers, the name at the first point: chains that
    start apart may end together. Ranges are vertical.
    """
    points = [p for _, _, line in lines for p in line]
    if not points:
        return ""
    height = 220
    frame = Frame(
        [p.x for p in points],
        [v for p in points for v in (p.y, p.low, p.high) if v is not None],
        x_label,
        y_label,
        height,
        whole_x=True,
    )
    for n, (name, colour, line) in enumerate(lines):
        dash = f' stroke-dasharray="{DASHES[n % len(DASHES)]}"' if DASHES[n % len(DASHES)] else ""
        path = " ".join(f"{frame.x(p.x):.1f},{frame.y(p.y):.1f}" for p in line)
        frame.parts.append(
            f'<polyline class="line c{colour}"{dash} points="{path}"><title>{escape(name)}</title>'
            "</polyline>"
        )
        for p in line:
            x = frame.x(p.x)
            if p.low is not None and p.high is not None:
                frame.parts.append(
                    f'<line class="range c{colour}" x1="{x:.1f}" x2="{x:.1f}" '
                    f'y1="{frame.y(p.low):.1f}" y2="{frame.y(p.high):.1f}"/>'
                )
            frame.parts.append(_mark(x, frame.y(p.y), colour, p.hollow, p.text or p.name))
        frame.parts.append(
            _text(frame.x(line[0].x) + 9, frame.y(line[0].y) - 9, name, "start", "strong")
        )
    return _svg(frame.parts, height, title)


def intervals(points: Sequence[Point], title: str, x_label: str) -> str:
    """One row per point: its name, a mark at x, a line over its range. What overlaps is seen at a
    glance.
    """
    if not points:
        return ""
    row, top, left = 26, 8, min(WIDTH * 3 // 5, 16 + int(8.4 * max(len(p.name) for p in points)))
    height, right = top + row * len(points) + 40, WIDTH - 16
    low, high = _limits([v for p in points for v in (p.x, p.low, p.high) if v is not None], 0.06)
    foot, parts = top + row * len(points), []

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    for tick in ticks(low, high):
        at = place(tick)
        parts += [
            f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{foot}"/>',
            _text(at, foot + 15, number(tick), "middle"),
        ]
    for n, p in enumerate(points):
        y = top + row * (n + 0.5)
        parts.append(_text(left - 12, y + 4, p.name, "end", "strong" if not p.hollow else ""))
        if p.low is not None and p.high is not None:
            parts.append(
                f'<line class="range c{p.colour}" x1="{place(p.low):.1f}" x2="{place(p.high):.1f}" '
                f'y1="{y:.1f}" y2="{y:.1f}"/>'
            )
        parts.append(_mark(place(p.x), y, p.colour, p.hollow, p.text or p.name))
    parts.append(_text((left + right) / 2, height - 6, x_label, "middle"))
    return _svg(parts, height, title)


def bars(values: Sequence[float], title: str, x_label: str, y_label: str, colour: int = 0) -> str:
    """Values in falling order as a filled outline (a codebook has too many entries for single
    bars).
    """
    values = sorted((float(v) for v in values), reverse=True)
    if not values or values[0] <= 0:
        return ""
    height = 200
    frame = Frame([0, len(values)], [0, values[0]], x_label, y_label, height, floor=0.0)
    steps = " ".join(
        f"{frame.x(n):.1f},{frame.y(v):.1f} {frame.x(n + 1):.1f},{frame.y(v):.1f}"
        for n, v in enumerate(values)
    )
    area = f"{frame.left},{frame.bottom} {steps} {frame.right},{frame.bottom}"
    frame.parts.append(f'<polygon class="f{colour}" opacity=".75" points="{area}"/>')
    return _svg(frame.parts, height, title)


def losses(folder: Path, name: str) -> tuple[str, list[float], list[float]]:
    """(name, epochs, losses) of a stage's history.jsonl, a line for `curves`; empty when there is
    none.
    """
    path = folder / "history.jsonl"
    rows = (
        [json.loads(line) for line in path.read_text().splitlines() if line]
        if path.is_file()
        else []
    )
    points = [
        (r.get("epoch", r["step"]), r["loss"])
        for r in rows
        if isinstance(r.get("loss"), (int, float)) and math.isfinite(r["loss"])
    ]
    return name, [a for a, _ in points], [b for _, b in points]
