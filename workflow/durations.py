"""Durations as people read them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """4.2 s, 12 s, 3 min 20 s, 5 h 12 min."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
