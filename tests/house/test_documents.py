"""What documents, docstrings and comments name is there: files, links, commands, settings."""

from __future__ import annotations

import re
import runpy
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from paceline.configs.fields import walk
from paceline.configs.load import packaged_recipes
from paceline.controller.bench.harness.registry import BENCHES
from paceline.controller.cli import app
from tests.house.checkout import PACKAGES, ROOT

FILES = set(
    subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
)
"""Files of the repository, as it is checked out."""
NAMES = {Path(file).name for file in FILES}
DOCUMENTS = sorted(file for file in FILES if file.endswith(".md"))
SOURCES = sorted(
    f for f in FILES if f.endswith(".py") and f.split("/")[0] in {*PACKAGES, "scripts"}
)
SETTINGS = {".".join(field.path[:n]) for field in walk() for n in range(1, len(field.path) + 1)}
SECTIONS = {setting.split(".")[0] for setting in SETTINGS}
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
YOURS = {"my_grader.py", "my_source.py", "best_of_group.py", "mine.yaml", "config.yaml"}
"""Files that readers write, or that runs do."""
COMPILED = {"spec/_native"}
"""Built from `spec/native/`."""


def text_of(file: str) -> str:
    return (ROOT / file).read_text()


def code_in(document: str) -> Iterator[str]:
    """Lines of code blocks, continued ones joined, and what stands between backticks."""
    text = text_of(document)
    for block in re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        yield from re.sub(r"\\\n\s*", " ", block).splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M))


def words_in(source: str) -> str:
    """Docstrings and comments of a module."""
    with (ROOT / source).open("rb") as file:
        tokens = list(tokenize.tokenize(file.readline))
    kinds = (tokenize.COMMENT, tokenize.STRING)
    return "\n".join(token.string for token in tokens if token.type in kinds)


def missing_files(text: str) -> list[str]:
    """Paths from the root, and names of Python files alone, that are no files here."""
    folders = "|".join((*PACKAGES, "docs", "tests", "scripts", "deploy", "src"))
    paths = re.findall(rf"(?<![\w./~-])(?:{folders})/[\w./-]*\w", text)
    named = re.findall(r"`([\w-]+\.(?:py|md|yaml|cpp))`", text)
    folders_here = {str(parent) for file in FILES for parent in Path(file).parents}
    gone = [path for path in paths if path not in FILES | folders_here | COMPILED]
    return [*gone, *(name for name in named if name not in NAMES | YOURS)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_a_document_names_are_there(document: str) -> None:
    assert missing_files(text_of(document)) == []


def test_files_that_docstrings_and_comments_name_are_there() -> None:
    gone = {source: missing_files(words_in(source)) for source in SOURCES}
    assert {source: files for source, files in gone.items() if files} == {}


def anchors(document: Path) -> set[str]:
    """Names under which GitHub finds the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {name.replace(" ", "-") for name in plain}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)|src(?:set)?=\"([^\"]+)\"", text_of(document)):
        link = "".join(target)
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists(), f"{document} links to {link}"
        assert not anchor or anchor in anchors(file), f"{document} links to {link}: no heading"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_that_a_document_shows_are_ours(document: str) -> None:
    for line in code_in(document):
        for name, rest in re.findall(r"(?:^|[\s/])paceline ([a-z]\w*)((?: [^|&#`]*)?)", line):
            assert name in COMMANDS, f"{document}: {line}"
            command = COMMANDS[name]
            options = {option for parameter in command.params for option in parameter.opts}
            for option in re.findall(r"(?<=\s)--[a-z][\w-]*", rest):
                assert option in {*options, "--help"}, f"{document}: {line}"
            arguments = [word for word in rest.split() if re.fullmatch(r"[a-z][\w.]*", word)]
            if name == "bench" and arguments:
                assert arguments[0] in BENCHES, f"{document}: {line}"
            if name in ("train", "check") and arguments:
                assert arguments[0] in {*packaged_recipes(), *YOURS}, f"{document}: {line}"
            for key in re.findall(r"(?<=\s)([a-z][\w.]*)=", rest):
                assert key in SETTINGS, f"{document}: {line}"


@pytest.mark.parametrize("document", sorted({*DOCUMENTS} - {"CHANGELOG.md"}))
def test_settings_that_a_document_names_are_in_the_schema(document: str) -> None:
    modules = {".".join(Path(file).with_suffix("").parts) for file in SOURCES}
    for code in code_in(document):
        for key in re.findall(r"^([a-z]\w*(?:\.[a-z]\w*)+)(?::.*)?$", code):
            is_file = key in NAMES or any(module.startswith(key) for module in modules)
            if key.split(".")[0] in SECTIONS and not is_file:
                assert key in SETTINGS, f"{document} names {key}"


def test_settings_in_blocks_of_yaml_are_in_the_schema() -> None:
    for document in DOCUMENTS:
        for block in re.findall(r"^```yaml\n(.*?)^```$", text_of(document), flags=re.S | re.M):
            for key in keys_of(yaml.safe_load(block)):
                if key.split(".")[0] in SECTIONS:
                    assert key in SETTINGS, f"{document} sets {key}"


def keys_of(values: object, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Dotted keys of a document, down to what is a value of the schema."""
    if path:
        yield ".".join(path)
    is_section = not path or any(key.startswith(f"{'.'.join(path)}.") for key in SETTINGS)
    if isinstance(values, dict) and is_section:
        for key, value in values.items():
            yield from keys_of(value, (*path, str(key)))


def test_the_drawing_is_what_its_source_draws() -> None:
    source = ROOT / "docs" / "images" / "architecture.py"
    drawn = runpy.run_path(str(source))["drawing"]()
    assert source.with_suffix(".svg").read_text() == drawn, "python docs/images/architecture.py"


def test_the_map_has_every_folder_of_the_packages_once() -> None:
    (block,) = re.findall(r"^```\n(configs/ .*?)^```$", text_of("ARCHITECTURE.md"), re.S | re.M)
    mapped: list[str] = []
    for indent, name in re.findall(r"^((?:  )*)(\w+)/ ", block, flags=re.MULTILINE):
        above = mapped[-1].split("/")[: len(indent) // 2] if mapped else []
        mapped.append("/".join([*above, name]))
    code = {str(Path(file).parent) for file in SOURCES} | {"configs/recipes", "spec/native"}
    assert len(mapped) == len(set(mapped))
    assert code <= set(mapped), "folders that the map lacks"
    assert all((ROOT / folder).is_dir() for folder in mapped)
