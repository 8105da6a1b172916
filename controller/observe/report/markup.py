"""HTML and SVG that cannot be injected into: every text is escaped unless it came from ``tag``."""

from __future__ import annotations

import html
from collections.abc import Iterable

from paceline.controller.observe.view.text import printable


class Markup(str):
    """Finished HTML. Made by ``tag`` and ``join``, and from this package's constants only."""


Child = str | Markup | None | Iterable["Child"]

VOID = frozenset({"br", "hr", "meta", "circle", "line", "path", "polygon", "polyline", "rect"})


def tag(name: str, /, *children: Child, **attributes: str | float | None) -> Markup:
    """One element. Children that are plain strings are escaped; ``None`` is nothing.

    Underscores in attribute names become hyphens and a trailing one is dropped; attributes that
    are ``None`` are left out.

    >>> tag("p", "1 < 2", class_="note")
    '<p class="note">1 &lt; 2</p>'
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_attribute(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        assert not children, f"<{name}> has no content"
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Markup:
    """The children one after another, escaped where they are plain strings."""
    return Markup("".join(_child(child) for child in children))


def escape(text: str) -> Markup:
    """Text as it reads, control characters and lone surrogates spelled out."""
    return Markup(html.escape(printable(text), quote=True))


def _child(child: Child) -> Markup:
    if child is None:
        return Markup()
    if isinstance(child, Markup):
        return child
    return escape(child) if isinstance(child, str) else join(child)


def _attribute(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.5g}"
