"""The base of every configuration section: frozen, closed, documented under every field."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen section that refuses unknown keys and documents fields by the strings under them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
