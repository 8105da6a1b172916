"""Examples in docstrings and documents run, and give what they say they give."""

from __future__ import annotations

import doctest
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [file for link in (ROOT / "src" / "paceline").glob("*/") for file in link.rglob("*.py")]
WITH_EXAMPLES = {
    ".".join(file.relative_to(ROOT / "src").with_suffix("").parts): file
    for file in SOURCES
    if ">>> " in file.read_text()
}
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/*.md")]
BLOCKS = {
    f"{document.relative_to(ROOT)}:{number}": block
    for document in DOCUMENTS
    for number, block in enumerate(
        re.findall(r"^```python\n(.*?)^```$", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    )
}
"""Every block of Python, by document and position. Those that fetch a model are only compiled."""


@pytest.mark.parametrize("module", sorted(WITH_EXAMPLES))
def test_the_examples_in_docstrings_run(module: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(module))
    assert tried > 0, "`>>>` stands where doctest does not look"
    assert failed == 0


def test_every_example_in_a_docstring_is_written_so_that_it_can_be_run() -> None:
    """A block after `::` may draw; an example stands behind `>>>`."""
    drawn = [file for file in SOURCES if re.search(r"Example[^>\n]*::\n", file.read_text())]
    assert drawn == []


@pytest.mark.parametrize("block", sorted(BLOCKS))
def test_the_python_in_documents_runs(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = compile(BLOCKS[block], block, "exec")
    if "from_pretrained" not in BLOCKS[block]:
        module = ModuleType("example")
        monkeypatch.setitem(sys.modules, "example", module)  # where dataclasses look names up
        exec(code, module.__dict__)
