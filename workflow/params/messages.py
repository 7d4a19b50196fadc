"""What pydantic and plug-ins object to, as "dotted.key: what is expected (found ...)"."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from pydantic import ValidationError

from workflow.messages import did_you_mean, nearest, shown

# pydantic names the member of a union that it tried; that is no key
UNION = re.compile(r"int|float|str|bool|none|\w+\[.*\]")


def listing(path: str, problems: list[str]) -> str:
    """All problems of a file, one a line, also where a key of the user's holds a line break."""
    problems = ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in p) for p in problems]
    head = f"{path}: {len(problems)} problems" if len(problems) > 1 else path
    return "\n".join([f"{head}:", *(f"  {p}" for p in problems)])


def sentences(
    error: ValidationError, where: Callable[[str], str], keys: Callable[[Iterable[str]], list[str]]
) -> list[str]:
    """One sentence for each key at fault.

    `where`: the dotted key of a field; `keys`: the keys that are allowed at a place.
    """
    found: dict[str, list[dict]] = {}
    for e in error.errors():
        first, *inner = (str(p) for p in e["loc"] if not UNION.fullmatch(str(p)))
        found.setdefault(".".join([where(first), *inner]), []).append(
            e | {"place": [first, *inner]}
        )
    # The best fitting member of a union is the one in which something deeper is wrong.
    deepest = {
        key: es
        for key, es in found.items()
        if not any(other.startswith(f"{key}.") for other in found)
    }
    return [_sentence(key, es, keys) for key, es in deepest.items()]


def _sentence(key: str, errors: list[dict], keys) -> str:
    error = errors[0]
    place, kind, value = error["place"], error["type"], shown(error["input"])
    if kind == "extra_forbidden":
        return f"{key}: unknown key (found {value}){nearest(place[-1], keys(place[:-1]))}"
    if kind == "missing":
        return f"{key}: required, but not given"
    if kind == "literal_error":
        expected = error["ctx"]["expected"]
        near = did_you_mean(error["input"], re.findall(r"'([^']*)'", expected))
        return f"{key}: must be {expected} (found {value}){near}"
    if kind == "string_pattern_mismatch":
        return f"{key}: must be auto, cpu, cuda or cuda:<number> (found {value})"
    if kind in ("model_type", "dict_type"):
        allowed = ", ".join(keys(place)) or "and values"
        return f"{key}: must be a section with keys {allowed} (found {value})"
    first, *others = (_expected(e["msg"]) for e in errors)  # several of a union
    expected = " or ".join([first, *(e.removeprefix("be ") for e in others)])
    return f"{key}: must {expected} (found {value})"


def _expected(message: str) -> str:
    """The verb and what follows of "Input should be ...", "List should have ... after validation,
    not 0".
    """
    rule = message.partition(" should ")[2].partition(" after validation")[0]
    return rule.replace("a valid array", "a list").replace("a valid string", "text")


def blame(error: Exception, key: str, values: dict, origin: dict[str, str]) -> str:
    """A plug-in's ValueError("field: why"), with the value that was given.

    The field is named as it stands in params.yaml: by `origin`, else below `key`.
    """
    field, colon, why = str(error).partition(":")
    if not colon or not re.fullmatch(r"\w+(\.\w+)*", field):
        return f"{key}: {error}"
    if "." in field:  # a key of another section, such as model.depth
        return f"{field}: {why.strip()} (for {key})"
    found = f" (found {values[field]!r})" if field in values and "found" not in why else ""
    return f"{origin.get(field, f'{key}.{field}')}: {why.strip()}{found}"
