"""YAML as configurations use it: the core types of YAML 1.2, no duplicate keys, known lines.

PyYAML reads YAML 1.1, in which ``3e-4`` is a string, ``no`` is false and ``1:30`` is ninety; a
configuration that reads ``learning_rate: 3e-4`` means a number.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from paceline.configs.errors import ConfigError

KeyPath = tuple[str, ...]
_MAX_DEPTH = 32

_SCALARS = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "tag:yaml.org,2002:int": (
        r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)|0x[0-9a-fA-F]+",
        list("-+0123456789"),
    ),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value if isinstance(key_node, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}  # in place of YAML 1.1's, which are the base classes'
    for _tag, (_pattern, _first) in _SCALARS.items():
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)


@dataclass(frozen=True)
class Document:
    """A parsed mapping, and for every key path in it the place where it was written."""

    values: Mapping[str, Any]
    origins: Mapping[KeyPath, str]

    def origin(self, path: KeyPath) -> str:
        """Return where ``path``, or else the nearest section around it, was written."""
        while path not in self.origins and path:
            path = path[:-1]
        return self.origins.get(path, "")


def parse_document(text: str, source: str) -> Document:
    """Parse a whole file; ``source`` names it in errors and origins.

    Raises:
        ConfigError: not YAML, a duplicate key, or not a mapping; names the line.
    """
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        values = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{line}: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        line_number = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{source}:{line_number}: {error.reason}") from error
    finally:
        if loader is not None:
            loader.dispose()
    if node is None or not isinstance(values, dict):
        got = "nothing" if values is None else type(values).__name__
        raise ConfigError(f"{source}: expected sections (key: value), got {got}")
    origins: dict[KeyPath, str] = {(): source}
    _record_lines(node, (), source, origins)
    return Document(values, origins)


def parse_value(text: str) -> Any:
    """Parse one value, such as the right side of ``loop.num_steps=10``.

    Raises:
        yaml.YAMLError: not YAML.
    """
    return yaml.load(text, _Loader)


def dump_document(values: Mapping[str, Any]) -> str:
    """Return YAML text that :func:`parse_document` reads back as equal values."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, width=100)


def _record_lines(node: yaml.Node, path: KeyPath, source: str, origins: dict[KeyPath, str]) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    if len(path) > _MAX_DEPTH:  # an anchor that contains itself
        raise ConfigError(f"{source}: nested deeper than {_MAX_DEPTH} levels")
    for key_node, value_node in node.value:
        inner = (*path, str(key_node.value))
        origins[inner] = f"{source}:{key_node.start_mark.line + 1}"
        _record_lines(value_node, inner, source, origins)
