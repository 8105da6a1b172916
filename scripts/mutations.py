"""The table of laws: the tests that hold each, and what is broken on purpose to see them fail.

The data is in ``tests/mutations/*.toml``; ``docs/laws.md`` shows it. ``scripts/mutants.py`` breaks
one thing after the other.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "tests/mutations"
PAGE = "docs/laws.md"

HEAD = """\
# Laws, and what happens where they are broken

`make mutants` breaks the code on purpose, one place at a time, in a copy of the checkout, and \
runs the tests that are to notice. Each row below is one such break: the law, the tests that hold \
it (every one of them must fail), and what is broken. A break that no test notices fails the \
target; `make mutants ONLY=name` runs those whose names contain a word. They are written down in \
`{folder}/`, and `python scripts/mutants.py --table` makes this page of it. What each law \
promises is in [ARCHITECTURE.md](../ARCHITECTURE.md#laws-and-the-tests-that-hold-them).

There are {count}.
"""


@dataclass(frozen=True)
class Mutation:
    """One break: ``snippet``, which occurs once in ``file``, becomes ``replacement``.

    ``tests`` are the node ids that must fail then, without parameters all of them together.
    ``broken`` says it in words.
    """

    name: str
    law: str
    broken: str
    file: str
    snippet: str
    replacement: str
    tests: tuple[str, ...]

    @property
    def is_native(self) -> bool:
        """True where the compiled extension is to be built again."""
        return self.file.startswith("spec/native/")

    def applied(self, text: str) -> str:
        """Return the text of ``file`` as it is broken.

        Raises:
            ValueError: the snippet does not occur exactly once.
        """
        if (count := text.count(self.snippet)) != 1:
            raise ValueError(f"{self.name}: the snippet occurs {count} times in {self.file}")
        return text.replace(self.snippet, self.replacement)


@dataclass(frozen=True)
class Section:
    """Mutations of one part of the program."""

    title: str
    mutations: tuple[Mutation, ...]


def sections(root: Path = ROOT) -> list[Section]:
    """Read the table, a section a file."""
    found = []
    for path in sorted((root / FOLDER).glob("*.toml")):
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        rows = (Mutation(**row | {"tests": tuple(row["tests"])}) for row in content["mutation"])
        found.append(Section(content["title"], tuple(rows)))
    return found


def all_mutations(root: Path = ROOT) -> list[Mutation]:
    """Return the mutations of all sections."""
    return [mutation for section in sections(root) for mutation in section.mutations]


def problems(mutations: Sequence[Mutation], root: Path = ROOT) -> Iterator[str]:
    """Yield what is wrong with the table itself: names, snippets and tests that are not there."""
    names = [mutation.name for mutation in mutations]
    yield from (f"{name}: named twice" for name in sorted({n for n in names if names.count(n) > 1}))
    for mutation in mutations:
        try:
            mutation.applied((root / mutation.file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            yield str(error)
        if mutation.snippet == mutation.replacement:
            yield f"{mutation.name}: nothing is broken"
        if not mutation.tests:
            yield f"{mutation.name}: no test is named"
        for test in mutation.tests:
            file, _, function = test.partition("::")
            path = root / file
            pattern = rf"^(?:async )?def {re.escape(function.partition('[')[0])}\("
            if not path.is_file() or not re.search(pattern, path.read_text(), re.MULTILINE):
                yield f"{mutation.name}: there is no test {test}"


def page(found: Sequence[Section]) -> str:
    """Write ``docs/laws.md``."""
    count = sum(len(section.mutations) for section in found)
    parts = [HEAD.format(folder=FOLDER, count=count)]
    for section in found:
        rows = [
            f"| {m.law} | {'<br>'.join(_in_words(test) for test in m.tests)} | {m.broken} "
            f"(`{m.file}`) |"
            for m in section.mutations
        ]
        head = [f"\n## {section.title}\n", "| law | held by | broken on purpose |", "|---|---|---|"]
        parts.append("\n".join([*head, *rows]) + "\n")
    return "".join(parts)


def _in_words(test: str) -> str:
    file, _, name = test.partition("::")
    function, _, parameter = name.partition("[")
    words = function.removeprefix("test_").replace("_", " ")
    return f"{words}{f' [{parameter}' if parameter else ''} (`{file}`)"
