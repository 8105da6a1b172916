"""Messages that documents quote are messages of the code."""

from __future__ import annotations

import ast
import functools
import re

import pytest

from tests.house.checkout import PACKAGES, ROOT

HOLE = "\0"
NOT_OURS = {
    "operator torchvision::nms does not exist": "torchvision",
    "No space left on device": "the operating system",
}
QUOTED = [
    quote
    for row in re.findall(
        r"^\| (`.*?) \| ", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.MULTILINE
    )
    for quote in re.findall(r"`([^`]+)`", row)
    if " " in quote and quote not in NOT_OURS
]


@functools.cache
def messages() -> tuple[str, ...]:
    """Every string of the code but docstrings, its values as holes."""
    found: list[str] = []
    files = [file for package in (*PACKAGES, "scripts") for file in (ROOT / package).rglob("*.py")]
    for file in [*files, ROOT / "setup.py"]:
        tree = ast.parse(file.read_text())
        docstrings = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else HOLE for p in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and id(node) not in docstrings:
                found.append(re.sub(r"\{\w*\}", HOLE, str(node.value)))
    return tuple(found)


def pieces(quote: str) -> list[str]:
    """What a quoted message says literally, between its `…`."""
    return [piece for each in quote.split("…") if len(piece := each.strip(" :,;.()'?")) > 3]


@pytest.mark.parametrize("quote", QUOTED)
def test_a_quoted_message_is_one_of_the_codes(quote: str) -> None:
    """A message may be put together of several strings: each piece must stand in one of them."""
    assert pieces(quote), "nothing of it is literal"
    unknown = [piece for piece in pieces(quote) if not any(piece in text for text in messages())]
    assert unknown == [], "no message says this; write values as …"


def test_what_is_not_ours_is_still_quoted() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert [quote for quote in NOT_OURS if quote not in text] == []
