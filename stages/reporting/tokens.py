"""What a report says of a tokenizer's codes; kit/parts/tokens.py measures it."""

from __future__ import annotations

from collections.abc import Mapping

JUDGED = "The labels judge the codes; nothing was trained on them that a student learns from."
FEATURES = "The labels judge the features."
LABELLED = "It was trained on labels, too, so this says nothing of learning without them."


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
    return lines + probed(tokens, "codes", JUDGED)


def probed(numbers: Mapping[str, float], what: str, judged: str) -> list[tuple[str, str]]:
    """(term, text) of the probes of kit/parts/probes.py; judged: what the labels were for."""
    if "probe" not in numbers:
        return []
    span = f"{numbers['probe_low']:.1%} to {numbers['probe_high']:.1%}"
    names = {
        "teacher": "of its upstream's features",
        "untrained": "of the untrained encoder",
        "chance": "chance, the largest class",
    }
    others = [
        (text, f"{numbers[f'probe_{name}']:.1%}")
        for name, text in names.items()
        if f"probe_{name}" in numbers
    ]
    said = f"{judged} Judged on {numbers['probe_val']} validation images."
    first = f"linear probe of {what}", f"{numbers['probe']:.1%} ({span})"
    return [first, *others, ("labels", said)]
