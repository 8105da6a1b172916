"""Where prompts come from: data sets and sources of users (reasoning-gym's is in ``reward/``)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from paceline.configs.errors import ConfigError, DataError
from paceline.configs.imports import build_imported
from paceline.configs.schema.data import DatasetSource
from paceline.configs.vocabulary import Record

_FILE_FORMATS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}


class PromptSource(Protocol):
    """Records by index, for ever: index ``i`` gives the same record in every process and run.

    ``num_records`` is how many different records there are; after so many indices they come again,
    in another order. None: without end.
    """

    num_records: int | None

    def record(self, index: int) -> Record:
        """Return the record with this index, from 0."""
        ...


class DatasetPromptSource:
    """The rows of a Hugging Face dataset or of local files, in an order of its own each epoch.

    A record's fields are the row's columns, with ``question`` and ``answer`` as the configuration
    names them.
    """

    def __init__(self, source: DatasetSource, split: str, seed: int) -> None:
        """Load ``split`` of the dataset.

        Raises:
            DataError: the dataset cannot be loaded, or is empty.
            ConfigError: a column that the configuration names is missing, or
                `answer_pattern` is no regular expression with a group.
        """
        self._source, self._split, self._seed = source, split, seed
        self._pattern = _compile_pattern(source.answer_pattern)
        self._rows = _load_rows(source, split)
        self.num_records: int | None = len(self._rows)
        self._epoch, self._order = 0, self._order_of(0)
        self._require_columns()

    def record(self, index: int) -> Record:
        """Return the row at this place of the endless sequence of shuffled epochs.

        Raises:
            DataError: the row has no question, or `answer_pattern` finds nothing in its answer.
        """
        epoch, position = divmod(index, len(self._rows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._order_of(epoch)
        return self._record_of_row(int(self._order[position]))

    def _order_of(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))

    def _record_of_row(self, row: int) -> Record:
        record_id = f"{Path(self._source.path).name}/{self._split}/{row}"
        fields: dict[str, Any] = dict(self._rows[row])
        question = fields[self._source.question_field]
        if question is None:
            raise DataError(
                f"record {record_id}: column {self._source.question_field} is empty; remove the row"
            )
        answer_field = self._source.answer_field
        answer = None if answer_field is None else fields[answer_field]
        # Empty columns are left out: a template that needs one fails instead of saying None.
        fields = {key: value for key, value in fields.items() if value is not None}
        fields["question"] = question
        if answer is None:
            return Record(record_id, fields)
        fields["answer"] = answer
        return Record(record_id, fields, self._reference(record_id, str(answer)))

    def _reference(self, record_id: str, answer: str) -> str:
        if self._pattern is None:
            return answer
        match = self._pattern.search(answer)
        if match is None or match[1] is None:
            raise DataError(
                f"record {record_id}: data.source.answer_pattern {self._pattern.pattern!r} finds "
                f"nothing in {answer[-60:]!r}; correct the pattern or remove the row"
            )
        return match[1].strip()

    def _require_columns(self) -> None:
        columns = list(self._rows.column_names)
        for key in ("question_field", "answer_field"):
            column = getattr(self._source, key)
            if column is not None and column not in columns:
                raise ConfigError(
                    f"data.source.{key}: {self._source.path} has no column {column!r}; "
                    f"it has {', '.join(columns)}"
                )


def load_imported_source(import_path: str, parameters: Mapping[str, Any]) -> PromptSource:
    """Build the source that `data.source.import_path` names.

    Raises:
        ConfigError: it cannot be imported or built, or is not a :class:`PromptSource`.
    """
    key = "data.source.import_path"
    source: PromptSource = build_imported(key, import_path, parameters, "record")
    if not hasattr(source, "num_records"):
        raise ConfigError(
            f"{key}: {import_path} must have an attribute num_records: how many different records "
            f"it has, or None"
        )
    return source


def _compile_pattern(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"data.source.answer_pattern: {pattern!r} is not a pattern: {error}"
        ) from error
    if not compiled.groups:
        raise ConfigError(f"data.source.answer_pattern: {pattern!r} has no group: put () around it")
    return compiled


def _load_rows(source: DatasetSource, split: str) -> Any:
    import datasets

    path = Path(source.path).expanduser()
    if not path.exists() and _means_a_file(source.path):
        raise DataError(f"data.source.path: {source.path}: no such file or folder")
    if path.is_file() and path.suffix not in _FILE_FORMATS:
        raise DataError(
            f"data.source.path: {source.path}: expected one of {', '.join(_FILE_FORMATS)}, "
            f"got {path.suffix or 'no ending'}"
        )
    datasets.disable_progress_bars()
    try:
        if path.is_file():
            rows = datasets.load_dataset(
                _FILE_FORMATS[path.suffix], data_files=str(path), split=split
            )
        else:
            name = str(path) if path.is_dir() else source.path
            rows = datasets.load_dataset(name, source.name, split=split)
    except Exception as error:
        # Anything may come out of reading foreign files or asking a hub.
        reason = " ".join(f"{type(error).__name__}: {error.__cause__ or error}".split())[:300]
        what = "cannot be read" if path.exists() else "cannot be had from the hub"
        raise DataError(
            f"data.source: {source.path}, split {split}, {what} ({reason}); "
            f"correct data.source, or give the path of a local file or folder"
        ) from error
    if len(rows) == 0:
        raise DataError(f"data.source: {source.path}, split {split}, has no rows")
    return rows


def _means_a_file(path: str) -> bool:
    return path.startswith(("/", "./", "../", "~")) or Path(path).suffix in _FILE_FORMATS
