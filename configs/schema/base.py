"""The base of every configuration section: frozen, closed, documented under every field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen section that refuses unknown keys and documents fields by the strings under them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def overlaid(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Lay ``top`` over ``base`` key by key; a section whose ``type`` changes is replaced whole."""
    if "type" in base and "type" in top and base["type"] != top["type"]:
        return dict(top)
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = overlaid(below, value)
        else:
            merged[key] = value
    return merged
