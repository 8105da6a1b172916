"""From what a step consumed to the numbers that are recorded of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.configs.vocabulary import DRAFTED_FROM_HISTORY, DRAFTED_FROM_SIBLINGS, StepReport
from paceline.controller.groups.assembly import AssembledBatch
from paceline.controller.observe.files.records import Phase, SampleRecord, StepRecord
from paceline.controller.parts import StepView

Engines = Sequence[Mapping[str, float]]
"""Running totals of each rollout worker's engine."""


@dataclass
class RunTotals:
    """Running totals of a run, kept in its checkpoints."""

    groups_trained: int = 0
    groups_dropped: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    trained_tokens: int = 0
    max_age: int = 0

    def add(self, batch: AssembledBatch, report: StepReport) -> None:
        """Count one step. Tokens are those of trained groups."""
        self.groups_trained += len(batch.groups)
        self.groups_dropped += batch.dropped
        self.max_age = max(self.max_age, batch.max_age)
        self.completion_tokens += sum(sample.num_tokens for sample in batch.batch.samples)
        self.prompt_tokens += sum(len(g.prompt.token_ids) * len(g.samples) for g in batch.groups)
        self.trained_tokens += report.num_trained_tokens

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        # Not dataclasses.asdict: it rebuilds a Counter from pairs, and so counts the pairs.
        return {**vars(self), "groups_dropped": dict(self.groups_dropped)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunTotals:
        """Return the totals that `as_dict` wrote."""
        return cls(**{**values, "groups_dropped": Counter(values["groups_dropped"])})


class StepMeter:
    """Builds the record of each step of a phase from differences since the step before."""

    def __init__(self, phase: Phase, run_started: float) -> None:
        self._phase = phase
        self._run_started = run_started
        self.restart([])

    def restart(self, engines: Engines) -> None:
        """Count from now: what the engines did for an evaluation belongs to no step."""
        self._last_time = time.perf_counter()
        self._last_engines = summed(engines)

    def measure(self, step: StepView, engines: Engines) -> StepRecord:
        """Return the record of a step; ``engines`` are the rollout workers' running totals."""
        batch, report = step.batch, step.report
        now = time.perf_counter()
        elapsed, before = now - self._last_time, self._last_engines
        self.restart(engines)
        # A replaced worker counts from zero again: its step shows nothing rather than less.
        engine = {name: max(0.0, self._last_engines[name] - before[name]) for name in before}
        seconds = dict(step.seconds)
        if engines:
            seconds["generate"] = engine.get("busy_seconds", 0.0) / len(engines)
        seconds["step"] = elapsed
        sampled = bool(batch.ages)
        rewards = np.concatenate([group.rewards for group in batch.groups])
        lengths = [sample.num_tokens for sample in batch.batch.samples]
        metrics = dict(report.metrics)
        metrics["padding_fraction"] = report.num_padding_tokens / max(
            1, report.num_tokens + report.num_padding_tokens
        )
        metrics |= drafting_metrics(engine, self._last_engines)
        metrics["buffer_megabytes"] = step.num_bytes / 1e6
        return StepRecord(
            phase=self._phase,
            step=step.finished,
            seconds=now - self._run_started,
            reward=float(rewards.mean()) if sampled else None,
            reward_std=float(rewards.std()) if sampled else None,
            length_p50=float(np.percentile(lengths, 50)),
            length_p99=float(np.percentile(lengths, 99)),
            rollout_tokens_per_second=engine.get("num_tokens", 0.0) / elapsed if engines else None,
            learner_tokens_per_second=report.num_tokens / max(1e-9, seconds.get("train", 0.0)),
            samples_per_second=len(lengths) / elapsed,
            age_mean=float(np.mean(batch.ages)) if batch.ages else None,
            age_max=float(batch.max_age) if batch.ages else None,
            loss=metrics.pop("loss", None),
            metrics=metrics,
            time=seconds,
            dropped=dict(batch.dropped),
            buffer=dict(step.occupancy),
        )


def drafting_metrics(done: Mapping[str, float], totals: Mapping[str, float]) -> dict[str, float]:
    """Return how drafting went, from what engines ``done`` in a step and their totals after it.

    ``accepted_per_draft`` are tokens a round, ``draft_acceptance_…`` shares of what was drafted
    from a source, ``draft_cold`` the share of rounds in which nothing was known;
    ``draft_step_share`` is of all decoding steps; ``draft_seconds_saved`` is estimated by the
    engines' fitted step costs.
    """
    if not done.get("num_draft_steps"):
        return {}
    metrics = {
        "draft_step_share": done["num_drafting_steps"] / done["num_draft_steps"],
        "draft_seconds_saved": done["seconds_without_drafts"] - done["seconds_drafting_steps"],
        "draft_milliseconds_a_step": 1e3 * done["seconds_proposing"] / done["num_draft_steps"],
        "drafter_megabytes": totals["drafter_bytes"] / 1e6,
    }
    if rounds := done["num_rounds"]:
        accepted = done["num_accepted_siblings"] + done["num_accepted_history"]
        metrics["accepted_per_draft"] = accepted / rounds
        metrics["draft_cold"] = done["num_cold_rounds"] / (rounds + done["num_cold_rounds"])
    for source in ("siblings", "history"):
        if drafted := done[f"num_drafted_{source}"]:
            metrics[f"draft_acceptance_{source}"] = done[f"num_accepted_{source}"] / drafted
    return metrics


def drafted_tokens(sources: NDArray[np.uint8] | None) -> tuple[int, int] | None:
    """Return how many tokens of a sample came from drafts of siblings and of the history."""
    if sources is None:
        return None
    siblings, history = (
        int((sources == source).sum()) for source in (DRAFTED_FROM_SIBLINGS, DRAFTED_FROM_HISTORY)
    )
    return siblings, history


def summed(engines: Engines) -> Counter[str]:
    """Return running totals of all engines together."""
    totals: Counter[str] = Counter()
    for counters in engines:
        totals.update(counters)
    return totals


def sample_records(batch: AssembledBatch, count: int) -> list[SampleRecord]:
    """Return the first sample of each of ``count`` groups of a batch, spread over it."""
    chosen = np.linspace(0, len(batch.groups) - 1, min(count, len(batch.groups))).astype(int)
    step = batch.step
    records = []
    for group in (batch.groups[index] for index in chosen):
        sample, completion = group.samples[0], group.samples[0].completion
        oldest = sample.oldest_version
        records.append(
            SampleRecord(
                step=step + 1,
                prompt=group.prompt.text,
                completion=sample.text,
                reward=sample.reward,
                reference=group.prompt.reference,
                versions=tuple(span.version for span in completion.versions),
                age=None if oldest is None else step - oldest,
                finish_reason=completion.finish_reason,
                drafted=drafted_tokens(completion.draft_sources),
            )
        )
    return records
