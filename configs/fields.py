"""The configuration schema as data: every section, every key, every default."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from paceline.configs.schema import RunConfig
from paceline.configs.schema.base import Section


@dataclass(frozen=True)
class SectionField:
    """One key of the schema: where it stands, in which section, and what pydantic knows of it."""

    path: tuple[str, ...]
    section: type[Section]
    info: FieldInfo


def walk(section: type[Section] = RunConfig, path: tuple[str, ...] = ()) -> Iterator[SectionField]:
    """Yield every key of ``section`` and of the sections in it, of every variant of a union."""
    for name, info in section.model_fields.items():
        yield SectionField((*path, name), section, info)
        for variant in sections(info.annotation):
            yield from walk(variant, (*path, name))


def variants(annotation: Any) -> dict[str, type[Section]]:
    """Return the sections an annotation allows, by their `type` values or their class name."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return dict.fromkeys(type_values(annotation) or (annotation.__name__,), annotation)
    if get_origin(annotation) in (Annotated, Union, UnionType, tuple):
        found: dict[str, type[Section]] = {}
        for argument in get_args(annotation):
            found.update(variants(argument))
        return found
    return {}


def sections(annotation: Any) -> list[type[Section]]:
    """Return the sections an annotation allows, each once."""
    return list(dict.fromkeys(variants(annotation).values()))


def type_values(section: type[Section]) -> tuple[str, ...]:
    """Return the values of the section's `type` key, which tells the variants of a union apart."""
    field = section.model_fields.get("type")
    return tuple(map(str, get_args(field.annotation))) if field else ()


def reference_markdown() -> str:
    """Render the schema as Markdown: one table a section, one row a key."""
    lines = [
        "# Configuration reference",
        "",
        "Written from the schema by `python -m paceline.configs.fields`. Every key can be set in "
        "the YAML file or on the command line as `section.key=value`; unknown keys are refused.",
    ]
    for path, section in _sections():
        lines += ["", f"## {_heading(path, section)}", "", (section.__doc__ or "").strip(), ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        lines += [_row(name, info) for name, info in section.model_fields.items()]
    return "\n".join(lines) + "\n"


def _sections() -> list[tuple[tuple[str, ...], type[Section]]]:
    found: list[tuple[tuple[str, ...], type[Section]]] = [((), RunConfig)]
    for field in walk():
        found += [(field.path, section) for section in sections(field.info.annotation)]
    return found


def _heading(path: tuple[str, ...], section: type[Section]) -> str:
    if not path:
        return "Top level"
    names = ", ".join(f"`{name}`" for name in type_values(section))
    return f"`{'.'.join(path)}`" + (f" with `type` {names}" if names else "")


def _row(name: str, info: FieldInfo) -> str:
    meaning = " ".join((info.description or "").split())
    cells = (f"`{name}`", _type_name(info.annotation), _default(info), meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type_name(annotation: Any) -> str:
    if variants(annotation):
        if get_origin(annotation) is tuple:
            return "list of sections"
        optional = type(None) in get_args(annotation)
        return "section or null" if optional else "section"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_type_name(argument) for argument in arguments)
    if annotation is type(None):
        return "null"
    if origin is tuple:
        count = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        return f"list of {count}{_type_name(arguments[0])}"
    if origin is dict or annotation is dict:
        return "mapping"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
        annotation.__name__, annotation.__name__
    )


def _default(info: FieldInfo) -> str:
    default = info.default
    if isinstance(info.json_schema_extra, dict) and "default_by" in info.json_schema_extra:
        return f"by `{info.json_schema_extra['default_by']}`"
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, Section):
        return "see below"
    if default is None or isinstance(default, bool):
        return f"`{str(default).lower() if default is not None else 'null'}`"
    return f"`{list(default) if isinstance(default, tuple) else default}`"


if __name__ == "__main__":
    sys.stdout.write(reference_markdown())
