"""The table of laws is true: its snippets, its tests and its page are there (`make mutants`)."""

from __future__ import annotations

import runpy
from dataclasses import replace

import pytest

from tests.house.checkout import ROOT

TABLE = runpy.run_path(str(ROOT / "scripts" / "mutations.py"))
MUTATIONS = TABLE["all_mutations"]()


def test_every_snippet_occurs_once_and_every_test_is_there() -> None:
    assert list(TABLE["problems"](MUTATIONS)) == []


def test_the_page_is_what_the_table_says() -> None:
    page = (ROOT / TABLE["PAGE"]).read_text()
    assert page == TABLE["page"](TABLE["sections"]()), "scripts/mutants.py --table > docs/laws.md"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"snippet": "no such code"}, "occurs 0 times"),
        ({"snippet": "e"}, "times in"),
        ({"file": "no_such_file.py"}, "No such file"),
        ({"tests": ("tests/house/test_laws.py::test_no_such",)}, "there is no test"),
        ({"tests": ()}, "no test is named"),
    ],
)
def test_a_row_that_is_wrong_is_named(change: dict[str, object], said: str) -> None:
    first = MUTATIONS[0]
    unharmed = replace(first, name="other")
    assert list(TABLE["problems"]([first, unharmed])) == []
    assert said in "\n".join(TABLE["problems"]([replace(first, **change)]))
    assert list(TABLE["problems"]([first, first])) == [f"{first.name}: named twice"]
