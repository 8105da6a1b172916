"""From the timed epochs of the rollout benchmark to its targets, figures and tables."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np

from paceline.controller.bench.harness.result import BenchResult, BenchTable, Spread, Target
from paceline.controller.bench.rollout.engine import Epoch, Step
from paceline.controller.bench.rollout.modes import ORACLE, OURS, PEER, PLAIN
from paceline.controller.bench.rollout.oracle import NUM_TOKENS
from paceline.controller.observe.files.versions import collect_versions

Round = Mapping[float, Mapping[str, Sequence[Epoch]]]
"""Epochs, in order, by temperature and mode."""

LATER_TARGETS = {1.0: 1.25, 0.6: 1.5}
"""Wanted of an epoch after the first, by temperature: times as fast as without drafting."""
FIRST_TARGET = 0.97
UNMEASURED = Spread(float("nan"), float("nan"), float("nan"))
BATCHES = ((1, 1), (2, 3), (4, 7), (8, 15), (16, 64))
"""Sequences in a step, from and to, that a line of costs is fitted for."""
FEWEST_STEPS = 20


@dataclass(frozen=True)
class Setting:
    """What was run, for the tables: ``model`` and ``workload`` are sentences."""

    model: str
    workload: str
    seed: int
    missing: Sequence[str] = ()


def report(setting: Setting, rounds: Sequence[Round], load_before: float) -> BenchResult:
    """Targets, figures and tables; ``load_before`` is the machine's load average at the start."""
    temperatures = list(rounds[0])
    costs = step_costs(rounds)
    notes = [
        setting.model,
        setting.workload,
        "An epoch's ratio is seconds without drafting over a mode's, in the same round; median "
        "(range) of rounds. The other columns are of later epochs. accepted: drafted tokens that "
        "were right, for each sequence and step; wasted: those that were not, of all tokens "
        "computed; drafter: its share of the seconds; of oracle: seconds saved over those that "
        f"drafts of {NUM_TOKENS} right tokens would save.",
        f"{same_samples(rounds):.1%} of the samples are those sampled without drafting, token for "
        "token.",
        *setting.missing,
        f"Load average when it began: {load_before:.1f} on {os.cpu_count()} CPUs.",
    ]
    return BenchResult(
        bench="rollout",
        targets=targets_of(rounds),
        figures={
            "rounds": [
                {
                    str(temperature): {
                        mode: [_figures(epoch) for epoch in epochs]
                        for mode, epochs in by_mode.items()
                    }
                    for temperature, by_mode in a_round.items()
                }
                for a_round in rounds
            ],
            "step_costs": [cost.as_dict() for cost in costs],
            "load_average_before": load_before,
        },
        seeds={"run": setting.seed},
        versions=collect_versions(setting.seed),
        tables=[*(_table(rounds, each) for each in temperatures), _cost_table(costs)],
        notes=notes,
    )


def targets_of(rounds: Sequence[Round]) -> dict[str, Target]:
    """What is asked of drafting, epoch by epoch; what could not be measured is not met."""
    targets = {}
    for temperature, by_mode in rounds[0].items():
        for epoch in range(len(by_mode[PLAIN.name])):
            where = f"T={temperature:g}, epoch {epoch + 1}"
            wanted = LATER_TARGETS[temperature] if epoch else FIRST_TARGET
            over_plain = speed_up(rounds, temperature, epoch, OURS.name, PLAIN.name)
            over_peer = speed_up(rounds, temperature, epoch, OURS.name, PEER.name)
            targets[f"{where}: times no drafting"] = Target(over_plain, ">=", wanted)
            targets[f"{where}: times {PEER.name}"] = Target(over_peer, ">", 1.0)
    return targets


def speed_up(
    rounds: Sequence[Round], temperature: float, epoch: int, mode: str, other: str
) -> Spread:
    """Seconds that ``other`` took for an epoch over those of ``mode``, in the same round."""
    if any(name not in rounds[0][temperature] for name in (mode, other)):
        return UNMEASURED
    return Spread.of(
        each[temperature][other][epoch].seconds / each[temperature][mode][epoch].seconds
        for each in rounds
    )


def same_samples(rounds: Sequence[Round]) -> float:
    """Share of all modes' samples that are token for token those sampled without drafting."""
    same = [
        np.array_equal(ours.token_ids, theirs.token_ids)
        for a_round in rounds
        for by_mode in a_round.values()
        for epochs in by_mode.values()
        for epoch, plain in zip(epochs, by_mode[PLAIN.name], strict=True)
        for name, group in epoch.completions.items()
        for ours, theirs in zip(group, plain.completions[name], strict=True)
    ]
    return fmean(same)


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step with so many sequences: ``base + token`` times the tokens it computes."""

    fewest: int
    most: int
    drafted: bool
    num_steps: int
    base: float
    token: float
    median: float

    def as_dict(self) -> dict[str, Any]:
        """The line as JSON."""
        return {**vars(self)}


def step_costs(rounds: Sequence[Round]) -> list[StepCost]:
    """Lines through all steps but those that read prompts, by sequences and with or without drafts.

    Without drafts a step computes one token a sequence, so the line is through sequences.
    """
    steps = [
        step
        for a_round in rounds
        for by_mode in a_round.values()
        for epochs in by_mode.values()
        for epoch in epochs
        for step in epoch.steps[1:]
    ]
    lines = []
    for fewest, most in BATCHES:
        within = [step for step in steps if fewest <= step.num_sequences <= most]
        for drafted in (False, True):
            chosen = [s for s in within if (s.num_tokens > s.num_sequences) == drafted]
            if len(chosen) >= FEWEST_STEPS:
                lines.append(_line(fewest, most, drafted, chosen))
    return lines


def _line(fewest: int, most: int, drafted: bool, steps: Sequence[Step]) -> StepCost:
    """Least squares through the medians for each number of tokens: outliers weigh nothing."""
    by_tokens: dict[int, list[float]] = {}
    for step in steps:
        by_tokens.setdefault(step.num_tokens, []).append(step.seconds)
    tokens = np.array(list(by_tokens), dtype=np.float64)
    seconds = np.array([median(values) for values in by_tokens.values()])
    weights = np.sqrt([len(values) for values in by_tokens.values()])
    if len(tokens) > 1:
        slope, base = np.polyfit(tokens, seconds, 1, w=weights)
    else:
        slope, base = 0.0, seconds[0]
    middle = median(step.seconds for step in steps)
    return StepCost(fewest, most, drafted, len(steps), float(base), float(slope), middle)


def _table(rounds: Sequence[Round], temperature: float) -> BenchTable:
    modes = rounds[0][temperature]
    num_epochs = len(modes[PLAIN.name])
    plain = [e for r in rounds for e in r[temperature][PLAIN.name]]
    lengths = sorted(length for epoch in plain for length in epoch.lengths)
    title = (
        f"T={temperature:g}: {len(plain[0].lengths)} samples an epoch of {lengths[0]} to "
        f"{lengths[-1]} tokens, median {median(lengths):.0f}; "
        f"{fmean(epoch.entropy for epoch in plain):.2f} nats a token; {len(rounds)} rounds"
    )
    columns = ["mode", *(f"epoch {index + 1}" for index in range(num_epochs))]
    columns += ["tokens/s", "accepted", "wasted", "drafter", "of oracle"]
    rows = [
        (
            mode,
            *(_epoch_cell(rounds, temperature, index, mode) for index in range(num_epochs)),
            *_later_cells([_later(r[temperature][mode]) for r in rounds]),
            _saved_cell([r[temperature] for r in rounds], mode),
        )
        for mode in modes
    ]
    return BenchTable(title, columns, rows)


def _epoch_cell(rounds: Sequence[Round], temperature: float, epoch: int, mode: str) -> str:
    if mode == PLAIN.name:
        return f"{median(each[temperature][mode][epoch].seconds for each in rounds):.2f} s"
    return f"x {speed_up(rounds, temperature, epoch, mode, PLAIN.name)}"


def _later_cells(rounds: Sequence[Sequence[Epoch]]) -> tuple[str, ...]:
    """Of the epochs after the first."""
    epochs = [epoch for a_round in rounds for epoch in a_round]
    rate = median(_total(e.num_tokens for e in r) / _total(e.seconds for e in r) for r in rounds)
    if not any(epoch.num_drafted for epoch in epochs):
        return (f"{rate:.0f}", "", "", "")
    sequences = sum(step.num_sequences for epoch in epochs for step in epoch.steps)
    drafted, accepted = (sum(e.num_drafted for e in epochs), sum(e.num_accepted for e in epochs))
    proposing = sum(e.seconds_proposing for e in epochs) / sum(e.seconds for e in epochs)
    return (
        f"{rate:.0f}",
        f"{accepted / sequences:.2f}",
        f"{(drafted - accepted) / (sequences + drafted):.0%}",
        f"{proposing:.1%}",
    )


def _later(epochs: Sequence[Epoch]) -> Sequence[Epoch]:
    """Those after the first, if there are any."""
    return epochs[1:] or epochs


def _saved_cell(rounds: Sequence[Mapping[str, Sequence[Epoch]]], mode: str) -> str:
    """Seconds that a mode saves over those that the oracle does."""
    if mode == PLAIN.name or ORACLE.name not in rounds[0]:
        return ""
    seconds = [
        {name: _total(e.seconds for e in _later(epochs)) for name, epochs in by_mode.items()}
        for by_mode in rounds
    ]
    saved = [(s[PLAIN.name] - s[mode]) / (s[PLAIN.name] - s[ORACLE.name]) for s in seconds]
    return f"{median(saved):.0%}"


def _total(values: Iterable[float]) -> float:
    return float(sum(values))


def _cost_table(costs: Sequence[StepCost]) -> BenchTable:
    rows = [
        (
            f"{cost.fewest}" if cost.fewest == cost.most else f"{cost.fewest}-{cost.most}",
            "drafted" if cost.drafted else "plain",
            str(cost.num_steps),
            f"{1e3 * cost.median:.1f}",
            f"{1e3 * cost.base:.1f} + {1e3 * cost.token:.2f} n",
        )
        for cost in costs
    ]
    columns = ("sequences", "steps", "count", "median, ms", "ms of n tokens")
    return BenchTable("Cost of a step", columns, rows)


def _figures(epoch: Epoch) -> dict[str, Any]:
    return {
        "seconds": epoch.seconds,
        "seconds_busy": epoch.seconds_busy,
        "seconds_proposing": epoch.seconds_proposing,
        "num_steps": len(epoch.steps),
        "num_tokens": epoch.num_tokens,
        "longest": max(epoch.lengths),
        "num_drafted": epoch.num_drafted,
        "num_accepted": epoch.num_accepted,
        "entropy": epoch.entropy,
    }
