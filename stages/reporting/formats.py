"""Numbers as a reader wants them."""

from __future__ import annotations

from workflow.durations import duration

NOTHING = "–"


def number(value: float) -> str:
    """Short: 1500000 -> 1.5M, 0.25 -> 0.25."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def short(value) -> str:
    """A number as `number`, a text as it is, a dash for None."""
    if value is None:
        return NOTHING
    return number(value) if isinstance(value, (int, float)) else str(value)


def signed(text: str) -> str:
    """ "-1.2" with a real minus sign."""
    return text.replace("-", "\N{MINUS SIGN}")


def seconds(value: float | None) -> str:
    """12 s, 3 min 20 s, 5 h 12 min; a dash for None."""
    return NOTHING if value is None else duration(value)


def p_value(value: float | None) -> str:
    """p < 0.001, p = 0.034, p = 0.42."""
    if value is None:
        return "not tested"
    return "p < 0.001" if value < 0.001 else f"p = {value:.{3 if value < 0.1 else 2}f}"
