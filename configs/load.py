"""Loading of a YAML file and command-line overrides into one frozen ``RunConfig``, and dumping
it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from paceline.configs.diagnose import explain, nearest
from paceline.configs.errors import ConfigError
from paceline.configs.schema import RunConfig
from paceline.configs.schema.base import overlaid
from paceline.configs.yaml_text import Document, KeyPath, dump_document, parse_document, parse_value


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration file, lay ``key.path=value`` overrides over it, and validate it.

    ``path`` may name a packaged recipe (``quickstart`` or ``configs/recipes/quickstart.yaml``)
    where no such file exists. A file may extend one other, named relative to it: ``extends:
    other.yaml``. Files and overrides are merged key by key; a section whose ``type`` changes is
    replaced whole.

    Raises:
        ConfigError: one line for every mistake: where it was written, the key, the value got.
    """
    document = _overlay(_read_extended(find_config(path)), _parse_overrides(overrides))
    try:
        return RunConfig.model_validate(document.values)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error, document.origin))) from error


def dump_config(config: RunConfig) -> str:
    """Return YAML text, every field written out, that loads back to an equal configuration."""
    return dump_document(config.model_dump())


def packaged_recipes() -> dict[str, Path]:
    """Return the recipes that ship with Paceline, by name."""
    folder = Path(str(resources.files("paceline.configs"))) / "recipes"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find_config(path: str | Path, relative_to: Path | None = None) -> Path:
    """Return the file that ``path`` names: the file itself, or else the packaged recipe of that
    name.

    Raises:
        ConfigError: there is neither.
    """
    wanted = Path(path).expanduser()
    file = wanted if relative_to is None else relative_to / wanted
    if file.is_file():
        return file
    recipes = packaged_recipes()
    name = wanted.name.removesuffix(".yaml")
    if wanted.parent in (Path(), Path("configs"), Path("configs/recipes")) and name in recipes:
        return recipes[name]
    problem = "is a folder" if file.is_dir() else "no such file"
    raise ConfigError(
        f"{file}: {problem}; give a YAML file or a packaged recipe ({', '.join(recipes)})"
        f"{nearest(name, recipes)}"
    )


def _read_extended(file: Path) -> Document:
    document = _read(file)
    base_name = document.values.get("extends")
    if base_name is None:
        return document
    where = document.origin(("extends",))
    if not isinstance(base_name, str):
        raise ConfigError(f"{where}: extends: expected one file name, got {base_name!r}")
    base_file = find_config(base_name, relative_to=file.parent)
    base = _read(base_file)
    if "extends" in base.values:
        raise ConfigError(
            f"{where}: extends: {base_file} extends another file itself; only one level is "
            f"allowed: copy what you need from one of them"
        )
    values = {key: value for key, value in document.values.items() if key != "extends"}
    return _overlay(base, Document(values, document.origins))


def _read(file: Path) -> Document:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{file}: cannot be read: {reason}") from error
    return parse_document(text, str(file))


def _parse_overrides(overrides: Sequence[str]) -> Document:
    """Merge the overrides into the file they amount to; a later one wins over an earlier one."""
    document = Document({}, {})
    for override in overrides:
        document = _overlay(document, _parse_override(override))
    return document


def _parse_override(override: str) -> Document:
    key, separator, text = override.partition("=")
    path: KeyPath = tuple(part.strip() for part in key.split("."))
    if not separator or not all(path):
        raise ConfigError(f"override {override!r}: expected key.path=value")
    try:
        value = parse_value(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "not YAML"
        raise ConfigError(f"override {override!r}: the value is not YAML: {problem}") from error
    values: dict[str, Any] = {path[-1]: value}
    for part in reversed(path[:-1]):
        values = {part: values}
    return Document(values, {path: f"override {override!r}"})


def _overlay(base: Document, top: Document) -> Document:
    return Document(overlaid(base.values, top.values), {**base.origins, **top.origins})
