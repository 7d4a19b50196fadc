"""YAML as it is meant: 1e-3 is a number, and a key is a word that stands once.

A mistake is named with its line.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from workflow.messages import ParamsError, did_you_mean

STRING, MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
HINTS = {  # what PyYAML says -> what to do
    r"'\t'": "; indent with spaces, not with tabs",
    "mapping values are not allowed here": "; is a space missing after a colon, or are quotes "
    "around a text with a colon?",
}


class _Loader(yaml.SafeLoader):
    """The safe loader, with numbers as in YAML 1.2 (DVC reads them so) and keys as written."""

    def scan_plain(self):
        token = super().scan_plain()
        # YAML allows it, but not the C parser with which DVC reads params.yaml
        if self.flow_level and ":" in token.value:
            at = f"{token.start_mark.name}, line {token.start_mark.line + 1}"
            raise ParamsError(
                f"{at}: found {token.value} within brackets, expected quotes around a text with "
                "a colon"
            )
        return token

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        lines = {}
        for key, _ in node.value:
            at = f"{key.start_mark.name}, line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise ParamsError(
                    f"{at}: found brackets as a key, expected a word (quote a text that begins "
                    "with one)"
                )
            if key.tag == MERGE:
                continue
            if key.value in lines:
                raise ParamsError(
                    f"{at}: key {key.value!r} is given twice (first in line {lines[key.value]})"
                )
            lines[key.value], key.tag = key.start_mark.line + 1, STRING
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file; ParamsError if it is missing, empty, not YAML, or no mapping."""
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, _Loader)
    except FileNotFoundError:
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.y*ml")])
        raise ParamsError(f"{path}: no such file{near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path}: cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark, said = error.problem_mark, ", ".join(filter(None, [error.context, error.problem]))
        hint = "".join(hint for words, hint in HINTS.items() if words in said)
        raise ParamsError(
            f"{path}, line {mark.line + 1}, column {mark.column + 1}: is not YAML: {said}{hint}"
        ) from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        raise ParamsError(
            f"{path}: is empty; expected sections such as data, model, train, methods, tasks, grid"
        )
    if not isinstance(content, dict):
        raise ParamsError(
            f"{path}: holds a {type(content).__name__}, expected sections: data, model, train, ..."
        )
    return content
