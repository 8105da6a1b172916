"""Messages for a configuration that pydantic refused, one line a mistake."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from paceline.configs.fields import variants, walk
from paceline.configs.schema import RunConfig
from paceline.configs.schema.base import Section
from paceline.configs.yaml_text import KeyPath

RENAMED = {("rollout", "drafting", "traces"): "rollout.drafting.corpus"}
"""Keys of earlier versions, and what they are called now."""


def explain(error: ValidationError, origin: Callable[[KeyPath], str]) -> list[str]:
    """Return one line for every mistake: where it was written, its key path and what is wrong.

    ``origin`` gives the place where a key path was written.
    """
    lines = []
    for detail in error.errors(include_url=False):
        path, section = _locate(detail["loc"])
        where = ": ".join(part for part in (origin(path), ".".join(path)) if part)
        lines.append(_one_line(f"{where}: {_describe(detail, path, section)}"))
    return lines


def nearest(name: str, names: Iterable[str]) -> str:
    """Return `; did you mean …?` if one of ``names`` resembles ``name``, else an empty string."""
    matches = get_close_matches(name, list(names), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def _locate(location: tuple[int | str, ...]) -> tuple[KeyPath, type[Section] | None]:
    """Return pydantic's location as a key path, without the tags of unions, and the section that
    holds its last key (None inside free mappings and lists)."""
    path: list[str] = []
    holder: type[Section] | None = None
    section: type[Section] | None = RunConfig
    allowed: dict[str, type[Section]] = {}
    for part in location:
        if part in allowed and len(allowed) > 1:
            section, allowed = allowed[str(part)], {}
            continue
        if isinstance(part, int):  # a place in a list of sections
            path.append(str(part))
            continue
        holder = section
        field = section.model_fields.get(str(part)) if section else None
        allowed = variants(field.annotation) if field else {}
        section = next(iter(allowed.values())) if len(set(allowed.values())) == 1 else None
        if part != "[key]":
            path.append(str(part))
    return tuple(path), holder


def _describe(detail: ErrorDetails, path: KeyPath, section: type[Section] | None) -> str:
    got = _shorten(detail["input"])
    match detail["type"]:
        case "extra_forbidden":
            return f"unknown key (got {got}){_suggest(path, section)}"
        case "missing":
            return "required, but missing"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"expected a section (key: value), got {got}"
        case "union_tag_not_found":
            return f"its key type is missing; give one of {_tags(path, section)}"
        case "union_tag_invalid":
            tag = str(detail["ctx"]["tag"])
            known = _tags(path, section)
            return f"unknown type {tag!r}; give one of {known}{nearest(tag, known.split(', '))}"
        case "value_error":
            return str(detail["ctx"]["error"])
        case "literal_error":
            choices = str(detail["ctx"]["expected"]).replace("'", "").replace(" or ", ", ")
            hint = nearest(str(detail["input"]), choices.split(", "))
            return f"expected one of {choices}, got {got}{hint}"
        case _:
            message = detail["msg"].removeprefix("Input should be ").removeprefix("a valid ")
            message = message.replace("String should match", "text matching")
            return f"expected {message}, got {got}"


def _suggest(path: KeyPath, section: type[Section] | None) -> str:
    """Suggest a similar name of the same section, else the same name of another section."""
    if path in RENAMED:
        return f"; it is called {RENAMED[path]} now"
    names = list(section.model_fields) if section else []
    if hint := nearest(path[-1], names):
        return hint
    elsewhere = {".".join(field.path): None for field in walk() if field.path[-1] == path[-1]}
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    return f"; known are {', '.join(names)}"


def _tags(path: KeyPath, section: type[Section] | None) -> str:
    field = section.model_fields.get(path[-1]) if section and path else None
    return ", ".join(variants(field.annotation)) if field else ""


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _one_line(text: str) -> str:
    return " ".join(text.split())
