"""YAML as it is meant: 1e-3 is a number, and a key is a word that stands once.

A mistake is named with its line.
"""

from __future__ import annotations

import io
import os
import re
import stat
from pathlib import Path

import yaml

from workflow.messages import ParamsError, did_you_mean, shown

# Far beyond what an experiment needs, far below what a computer cannot take.
MOST_BYTES = 10**6
MOST_VALUES = 50_000  # with every alias written out
MOST_DEPTH = 30
MOST_DIGITS = 18
BRIEF = f"a number of at most {MOST_DIGITS} digits"
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

    def __init__(self, stream):
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # id of a node -> values in it; 0 while it is composed

    def compose_node(self, parent, index):
        """The same, but aliases that multiply and brackets within brackets come to an end."""
        mark = self.peek_event().start_mark
        at = f"{mark.name}, line {mark.line + 1}"
        alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise ParamsError(f"{at}: found more than {MOST_DEPTH} levels, expected fewer")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if alias and id(node) not in self._sizes:
            raise ParamsError(f"{at}: found an alias of what it stands in, expected one of another")
        children = node.value if isinstance(node, yaml.SequenceNode) else ()
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        self._sizes[id(node)] = size = 1 + sum(self._sizes[id(child)] for child in children)
        if size > MOST_VALUES:
            raise ParamsError(
                f"{at}: found more than {MOST_VALUES} values, with aliases written out, expected "
                "fewer"
            )
        return node

    def construct_object(self, node, deep=False):
        """The same, with the line of what YAML allows and Python cannot hold."""
        try:
            value = super().construct_object(node, deep)
            wrong = _beyond(value)
        except ParamsError:
            raise
        except (ValueError, OverflowError, TypeError, LookupError, AttributeError) as error:
            kind = node.tag.rpartition(":")[2]
            wrong = (
                f"{'a number' if kind in ('int', 'float') else 'quotes around a text'} ({error})"
            )
            if "limit" in wrong:  # Python's own, of 4300 digits
                wrong = BRIEF
        if wrong:
            at = f"{node.start_mark.name}, line {node.start_mark.line + 1}"
            raise ParamsError(f"{at}: found {shown(node.value)}, expected {wrong}")
        return value

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


def _beyond(value) -> str | None:
    """What is expected instead of a value that nothing could use."""
    if isinstance(value, int) and abs(value) >= 10**MOST_DIGITS:
        return BRIEF
    if isinstance(value, str) and ("\0" in value or not _encodable(value)):
        return "text without NUL and without halves of characters (surrogates)"
    return None


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


class _Named(io.StringIO):
    """A text with the name that messages give to it."""

    def __init__(self, text: str, name: str):
        super().__init__(text)
        self.name = name


def _text(path: Path) -> str:
    """What a file holds; ParamsError if that cannot be a params file."""
    with path.open("rb") as file:
        about = os.fstat(file.fileno())
        if stat.S_ISCHR(about.st_mode) or stat.S_ISBLK(about.st_mode):
            raise ParamsError(f"{path}: is a device, expected a file")
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        size = max(about.st_size, len(content))
        raise ParamsError(f"{path}: found {size} bytes, expected at most {MOST_BYTES}")
    return content.decode("utf-8-sig")


def read_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file; ParamsError if it is missing, empty, not YAML, or no mapping."""
    path = Path(path)
    try:
        content = yaml.load(_Named(_text(path), str(path)), _Loader)
    except FileNotFoundError:
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.y*ml")])
        raise ParamsError(f"{path}: no such file{near}") from None
    except ParamsError:
        raise
    except (OSError, ValueError) as error:  # such as a name with a NUL, and what is no UTF-8
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
