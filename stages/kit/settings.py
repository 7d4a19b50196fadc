"""Parameters of jobs beside each other."""

from __future__ import annotations

import json

HEADS = ("method.config.", "train.", "model.config.")  # of settings; a column needs them not


def flat(value, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists stay one value."""
    if not isinstance(value, dict) or not value:
        return {prefix: value} if prefix else {}
    found = {}
    for key, inner in value.items():
        found |= flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


def differing(params: dict, others: list[dict]) -> dict:
    """The settings of a pretraining that some of the others have, too, with another value.

    {name: value}, with the short name that a column has room for.
    """
    known, found = [flat(other) for other in others], {}
    trains = params.get("method", {}).get("trains", True)
    for key, value in flat(params).items():
        head = next((head for head in HEADS if key.startswith(head)), None)
        if head is None or (head == "train." and not trains):
            continue
        if len({json.dumps(other[key]) for other in known if key in other}) > 1:
            name = key.removeprefix(head)
            found[key if name in found else name] = value
    return found
