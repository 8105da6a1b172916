"""A step or an evaluation in one plain line, for logs."""

from __future__ import annotations

from collections.abc import Mapping

from paceline.controller.observe.files.records import EvaluationRecord, StepRecord
from paceline.controller.observe.view.state import ViewState
from paceline.controller.observe.view.text import count, duration, number, percent

PHASE_WORDS: Mapping[str, str] = {"warm_start": "warm start", "train": "train"}


def step_line(record: StepRecord, state: ViewState) -> str:
    """Return ``[train 40/240] reward 0.52 | length 9/12 | age 0.8/1 of 1 | …``; ASCII only.

    ``state`` already knows the record. What was not measured is left out.
    """
    head = f"[{PHASE_WORDS[record.phase]} {record.step}/{state.plan.total(record.phase)}]"
    parts = [
        _part("reward", number(record.reward, ".3f", "")),
        _part("loss", number(record.loss, ".4f", "")),
        _part("entropy", number(record.metrics.get("entropy"), ".3g", "")),
        _part("length p50/p99", _pair(record.length_p50, record.length_p99)),
        _part("age mean/max", _age(record, state.plan.max_lag)),
        _part("rollout tok/s", count(record.rollout_tokens_per_second, "")),
        _part("learner tok/s", count(record.learner_tokens_per_second, "")),
        _part("dropped", ", ".join(f"{k}={count(v)}" for k, v in record.dropped.items() if v)),
        _part("s/step", number(state.seconds_per_step, ".2f", "")),
        _part("eta", duration(state.seconds_left, "")),
    ]
    return f"{head} {' | '.join(part for part in parts if part)}"


def evaluation_line(record: EvaluationRecord) -> str:
    """Return ``[held-out, before, step 0] greedy 37.1% +-3.0 | T=1 … | 256 prompts``, in ASCII."""
    parts = [
        _part("greedy", _with_error(record.greedy, record.standard_error)),
        _part("T=1", _with_error(record.sampled, record.sampled_standard_error)),
        f"{record.num_prompts} prompts",
    ]
    where = record.label if record.label == "validation" else f"held-out, {record.label}"
    where = f"{where.replace('_', ' ')}, step {record.step}"
    return f"[{where}] {' | '.join(part for part in parts if part)}"


def _part(name: str, value: str) -> str:
    return f"{name} {value}" if value else ""


def _pair(first: float | None, second: float | None) -> str:
    if first is None and second is None:
        return ""
    return f"{number(first)}/{number(second)}"


def _age(record: StepRecord, max_lag: int) -> str:
    pair = _pair(record.age_mean, record.age_max)
    return f"{pair} of {max_lag}" if pair else ""


def _with_error(accuracy: float | None, error: float | None) -> str:
    if accuracy is None:
        return ""
    return percent(accuracy) + ("" if error is None else f" +-{100 * error:.1f}")
