"""Records survive JSON; what cannot be measured or read is None, never an error."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.controller.observe.files.records import (
    EvaluationRecord,
    ExampleRecord,
    Generation,
    StepRecord,
    standard_error,
)

finite = st.floats(allow_nan=False, allow_infinity=False)
maybe = st.none() | finite
mapping = st.dictionaries(st.text(max_size=8), maybe, max_size=4)
step_records = st.builds(
    StepRecord,
    phase=st.sampled_from(["warm_start", "train"]),
    step=st.integers(0, 10**9),
    seconds=finite,
    reward=maybe,
    age_max=maybe,
    loss=maybe,
    metrics=mapping,
    time=mapping,
    dropped=mapping,
    buffer=mapping,
)


@given(step_records)
def test_a_step_record_reads_back_what_it_wrote(record: StepRecord) -> None:
    assert StepRecord.from_dict(json.loads(json.dumps(record.as_dict()))) == record


def test_an_evaluation_and_an_example_read_back_what_they_wrote() -> None:
    evaluation = EvaluationRecord.measured("during", 40, 61.5, 0.75, None, 256)
    assert EvaluationRecord.from_dict(json.loads(json.dumps(evaluation.as_dict()))) == evaluation
    example = ExampleRecord("ab=", "ba", Generation("b", 0.0), None)
    assert ExampleRecord.from_dict(json.loads(json.dumps(example.as_dict()))) == example


def test_numbers_that_are_not_finite_are_written_as_null() -> None:
    record = StepRecord("train", 1, 0.5, loss=math.nan, metrics={"kl": math.inf, "entropy": 1.0})
    line = json.loads(json.dumps(record.as_dict(), allow_nan=False))
    assert line["loss"] is None
    assert line["metrics"] == {"kl": None, "entropy": 1.0}


def test_numpy_scalars_are_written_as_plain_numbers() -> None:
    record = StepRecord("train", 1, 0.5, loss=np.float32(0.5), age_max=np.int64(3))  # type: ignore[arg-type]
    line = json.loads(json.dumps(record.as_dict()))
    assert (line["loss"], line["age_max"]) == (0.5, 3)


@pytest.mark.parametrize(
    "line",
    [
        {},
        {"phase": "train"},
        {"phase": "train", "step": "many"},
        {"phase": "evaluation", "step": 1},
        {"phase": "evaluation", "label": "whenever"},
    ],
)
def test_a_foreign_line_is_no_record(line: dict[str, object]) -> None:
    assert StepRecord.from_dict(line) is None
    assert EvaluationRecord.from_dict(line) is None


def test_values_of_the_wrong_type_are_not_measured() -> None:
    record = StepRecord.from_dict({"phase": "train", "step": 3, "reward": "high", "time": [1]})
    assert record == StepRecord("train", 3, 0.0)


def test_standard_error_is_binomial() -> None:
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    assert standard_error(1.0, 100) == 0.0
    assert standard_error(0.5, 0) == 0.0
