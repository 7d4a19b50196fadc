"""Colours for any number of runs, on a light and on a dark page.

The first eight are chosen by hand. Each further one is, of a fixed list of candidates, the one
farthest from all before it, as seen on the page where it is nearer to them. Distances are taken in
OKLab, where equal steps look equally large (Ottosson 2020).
"""

from __future__ import annotations

import math
from functools import lru_cache

LIGHT = ("#2f6db5", "#c2551b", "#2b8a5b", "#8a4fb0", "#9c7a10", "#bf3b6a", "#3a8f9c", "#6b6f76")
DARK = ("#7fb2f0", "#f0995f", "#6cc99a", "#c79be8", "#d9b84a", "#f088ab", "#74c7d4", "#a6abb3")
LIGHTNESS = ((0.36, 0.68), (0.48, 0.78), (0.60, 0.88))  # of a candidate on the two pages
CHROMA = (0.04, 0.10, 0.16)


@lru_cache
def colours(count: int) -> tuple[tuple[str, str], ...]:
    """`count` pairs of "#rrggbb", for the light and for the dark page; repeated where they end."""
    chosen, left = list(zip(LIGHT, DARK, strict=True)), candidates()
    places = [(lab(light), lab(dark)) for light, dark in chosen]
    near = {pair: min(apart(place, other) for other in places) for pair, place in left.items()}
    while len(chosen) < count and near:
        best = max(near, key=near.get)  # the first of equals
        chosen.append(best)
        near = {p: min(d, apart(left[p], left[best])) for p, d in near.items() if p != best}
    return tuple(chosen[number % len(chosen)] for number in range(count))


def candidates() -> dict[tuple[str, str], tuple]:
    """{(light, dark): their places in OKLab} of all that screens can show."""
    found = {}
    for hue in range(0, 360, 10):
        for chroma in CHROMA:
            a = chroma * math.cos(math.radians(hue))
            b = chroma * math.sin(math.radians(hue))
            for pair in LIGHTNESS:
                shown = tuple(hexadecimal(lightness, a, b) for lightness in pair)
                if None not in shown:
                    found[shown] = tuple(lab(colour) for colour in shown)
    return found


def apart(one: tuple, other: tuple) -> float:
    """How far two pairs are apart on the page where they are nearer, to six digits."""
    return round(min(math.dist(a, b) for a, b in zip(one, other, strict=True)), 6)


def lab(colour: str) -> tuple[float, float, float]:
    """ "#rrggbb" -> its place in OKLab."""
    values = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    r, g, b = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values)
    long = (0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b) ** (1 / 3)
    middle = (0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b) ** (1 / 3)
    short = (0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b) ** (1 / 3)
    return (
        0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * middle + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * middle - 0.8086757660 * short,
    )


def hexadecimal(lightness: float, a: float, b: float) -> str | None:
    """OKLab -> "#rrggbb", or None where no screen shows it."""
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
    )
    if not all(0 <= value <= 1 for value in linear):
        return None
    values = (12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055 for v in linear)
    return "#" + "".join(f"{round(value * 255):02x}" for value in values)


# ------------------------------------------------------------------------------------------- CSS


def style(count: int) -> str:
    """The CSS of the charts, for both colour schemes and `count` colours."""
    rules = [
        ".chart{width:100%;height:auto;display:block;font:12px system-ui,sans-serif}",
        ".chart text{fill:var(--ink2)}",
        ".chart .strong{fill:var(--ink);font-weight:600}",
        ".chart .grid{stroke:var(--line);stroke-width:1}",
        ".chart .axis{stroke:var(--ink3);stroke-width:1}",
        ".chart .faint{fill:none;stroke-width:1;opacity:.25}",
        ".chart .line{fill:none;stroke-width:2;stroke-linejoin:round}",
        ".chart .range{stroke-width:3;stroke-linecap:round;opacity:.45}",
    ]
    for n in range(count):
        rules.append(f".chart .c{n}{{stroke:var(--c{n})}}.chart .f{n}{{fill:var(--c{n})}}")
    return "".join(rules)


def palette(count: int, dark: bool) -> str:
    """CSS variables of one colour scheme."""
    ink = ("#1c2128", "#4d5560", "#7a828d", "#dfe3e8")
    if dark:
        ink = ("#e8eaed", "#b6bcc6", "#8b929d", "#333942")
    pairs = dict(zip(("--ink", "--ink2", "--ink3", "--line"), ink, strict=True))
    pairs |= {f"--c{n}": pair[dark] for n, pair in enumerate(colours(count))}
    return "".join(f"{name}:{value};" for name, value in pairs.items())


def standalone(svg: str, count: int) -> str:
    """A chart as a file of its own, on a background that follows the reader's colour scheme."""
    light = f"svg{{{palette(count, False)}background:#fff}}"
    dark = f"svg{{{palette(count, True)}background:#171b21}}"
    css = f"{light}@media(prefers-color-scheme:dark){{{dark}}}{style(count)}"
    head, tail = svg.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{css}</style>{tail}\n'
