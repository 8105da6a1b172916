"""Docstrings begin with a verb (functions) or a noun (classes); processes are no persons."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.checkout import PACKAGES, ROOT

VERBS = frozenset(Path(__file__).with_name("verbs.txt").read_text().split())
"""How a function may begin. Add one to the file where it is missing."""

NO_NOUN = {
    "as",
    "at",
    "beside",
    "between",
    "by",
    "for",
    "from",
    "how",
    "in",
    "into",
    "its",
    "nobody",
    "nothing",
    "of",
    "on",
    "somebody",
    "that",
    "those",
    "what",
    "whatever",
    "when",
    "where",
    "whether",
    "which",
    "who",
    "whoever",
    "whom",
    "whose",
    "why",
    "with",
}
"""How a class or a property may not begin."""

PERSONS = re.compile(r"\b(?:any|every|no|some)body\b|\bwhoever\b", flags=re.IGNORECASE)

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def modules() -> Iterator[Path]:
    for package in (*PACKAGES, "scripts"):
        yield from sorted((ROOT / package).rglob("*.py"))


def first_word(docstring: str) -> str:
    return re.sub(r"^\W*", "", docstring).split(maxsplit=1)[0].rstrip(".,:;").lower()


def is_property(node: Definition) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def faults(name: str, text: str) -> Iterator[str]:
    """Docstrings of a module that begin otherwise, each with its place."""
    for number, line in enumerate(text.splitlines(), start=1):
        if person := PERSONS.search(line):
            yield f"{name}:{number}: a process is no person: {person[0]}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, Definition) and (docstring := ast.get_docstring(node)):
            word, where = first_word(docstring), f"{name}:{node.lineno}"
            if isinstance(node, ast.ClassDef) or is_property(node):
                if word in NO_NOUN:
                    yield f"{where}: begin with a noun: {docstring[:50]}"
            elif word not in VERBS:
                yield f"{where}: begin with a verb: {docstring[:50]}"


def test_functions_begin_with_a_verb_and_classes_with_a_noun() -> None:
    wrong = [
        fault
        for file in modules()
        for fault in faults(str(file.relative_to(ROOT)), file.read_text())
    ]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "text",
    [
        'def size():\n    """What it weighs."""',
        'async def size():\n    """Whether it is large."""',
        'class Box:\n    """Where things are."""',
        'class Box:\n    @property\n    def size(self):\n        """Of the lid."""',
        "# nobody waits for it",
    ],
)
def test_the_rule_finds_what_it_is_for(text: str) -> None:
    assert len(list(faults("module.py", text))) == 1
    assert not list(faults("module.py", 'class Box:\n    """Things."""\n    def size(self):\n'
                                        '        """Return its size in litres."""'))  # fmt: skip
