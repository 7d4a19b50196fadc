"""What a report says of a tokenizer's codes; kit/parts/tokens.py measures it."""

from __future__ import annotations

from collections.abc import Mapping

JUDGED = "The labels judge the codes; nothing was trained on them that a student learns from."


def said(tokens: Mapping[str, float]) -> list[tuple[str, str]]:
    """(term, text) of all that was measured; `tokens`: of health.json, perhaps empty."""
    lines = []
    if "agreement" in tokens:
        low, high = (f"{100 * tokens[f'excess_{end}']:.1f}" for end in ("low", "high"))
        lines += [
            ("codes of two crops agree", f"{tokens['agreement']:.1%} of the places that both see"),
            ("by chance", f"{tokens['agreement_chance']:.1%}"),
            ("difference", f"{low} to {high} points, over {tokens['agreement_images']} images"),
        ]
    if "probe" in tokens:
        span = f"{tokens['probe_low']:.1%} to {tokens['probe_high']:.1%}"
        lines.append(("linear probe of codes", f"{tokens['probe']:.1%} ({span})"))
        names = {
            "teacher": "of its upstream's features",
            "untrained": "of the untrained encoder",
            "chance": "chance, the largest class",
        }
        lines += [
            (text, f"{tokens[f'probe_{name}']:.1%}")
            for name, text in names.items()
            if f"probe_{name}" in tokens
        ]
        lines.append(("labels", f"{JUDGED} Judged on {tokens['probe_val']} validation images."))
    return lines
