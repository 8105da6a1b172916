"""``paceline bench rollout``: epochs of rollouts with and without drafting, on stock vLLM.

Every mode has an engine in a process of its own. An epoch hands in the same prompts once, with the
same seeds and the same weights for every mode; the modes take turns epoch by epoch, so that a
machine that slows down slows all of them. A new version is served in every epoch, a few updates of
training after the last. What a mode learned of the prompts it learned in the epochs before.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np

from paceline.configs.schema.rollout import DraftingConfig, RolloutConfig
from paceline.configs.vocabulary import RolloutRequest, SamplingParameters
from paceline.controller.bench.harness.compare import Case, compare
from paceline.controller.bench.harness.result import BenchResult, Figures, Measured, Target
from paceline.controller.bench.rollout.engine import EngineProcess, EngineSettings, Epoch
from paceline.controller.bench.rollout.modes import (
    COUPLED,
    ORACLE,
    OURS,
    PEER,
    PLAIN,
    UNBUDGETED,
    Mode,
)
from paceline.controller.bench.rollout.task import spread_problems
from paceline.controller.bench.rollout.training import END_TOKEN, Training, encode
from paceline.controller.bench.rollout.weights import Published, publish_versions
from paceline.controller.bench.rollout.widened_model import WIDE, Shape

LATER_TARGETS = {1.0: 1.25, 0.6: 1.5}
"""Wanted of an epoch after the first, by temperature: times as fast as without drafting."""
FIRST_TARGET = 0.97
SPEED = "epochs/min"


@dataclass(frozen=True)
class Plan:
    """Rounds of all modes: from an engine that knows nothing, at every temperature,
    ``training.versions`` epochs of ``num_problems`` prompts with ``num_samples`` each."""

    modes: Sequence[Mode]
    temperatures: Sequence[float]
    num_rounds: int
    num_problems: int
    num_samples: int
    training: Training
    shape: Shape = WIDE
    seed: int = 0

    @property
    def installed(self) -> dict[str, Mode]:
        """Modes that can be run here, by name."""
        return {mode.name: mode for mode in self.modes if mode.is_installed}

    @property
    def epochs(self) -> dict[str, tuple[float, int]]:
        """Temperature and number, from 0, of every epoch of a round, in order."""
        return {
            f"T={temperature:g}, epoch {epoch + 1}": (temperature, epoch)
            for temperature in self.temperatures
            for epoch in range(self.training.versions)
        }


FULL = Plan(
    (PLAIN, PEER, OURS, UNBUDGETED, COUPLED, ORACLE),
    (1.0, 0.6),
    num_rounds=3,
    num_problems=6,
    num_samples=4,
    training=Training(num_steps=700),
)
QUICK = Plan(
    (PLAIN, PEER, OURS),
    (0.6,),
    num_rounds=1,
    num_problems=4,
    num_samples=4,
    training=Training(num_steps=60, max_length=192, max_tokens=128, versions=2),
    shape=Shape(256, 768, num_layers=6, num_heads=8, num_key_value_heads=4),
)


def bench_rollout(quick: bool, output: Path) -> BenchResult:
    """Measure all modes; where ``quick``, some of them once with a smaller model.

    Raises:
        BenchError: a run failed.
    """
    plan = QUICK if quick else FULL
    folder = output / f"rollout-{'quick' if quick else 'full'}"
    folder.mkdir(parents=True, exist_ok=True)
    # Published weights are large and made anew in seconds; the trained model is kept.
    with tempfile.TemporaryDirectory(dir=folder) as published, ExitStack() as stack:
        weights = publish_versions(plan.training, plan.shape, folder / "model", Path(published))
        engines = {
            name: stack.enter_context(closing(EngineProcess(folder / f"{index}.log")))
            for index, name in enumerate(plan.installed)
        }
        rollouts = Rollouts(plan, weights, engines)
        return compare(
            "rollout",
            cases_of(plan),
            rollouts.measure,
            targets_of(plan),
            ratios=[(SPEED, PLAIN.name)],
            seed=plan.seed,
            notes=lambda measured: [*_describe(plan, weights), rollouts.same_samples()],
        )


def cases_of(plan: Plan) -> dict[str, Case]:
    """Return the epochs; what replays an epoch of others is measured after them."""
    last = [name for name, mode in plan.installed.items() if mode.replays]
    return {case: Case(list(plan.installed), plan.num_rounds, last) for case in plan.epochs}


def targets_of(plan: Plan) -> list[Target]:
    """Return what is asked of drafting, epoch by epoch: times as fast as without, and as a peer."""

    def times(case: str, other: Mode, measured: Measured) -> list[float]:
        return measured.ratios(case, OURS.name, other.name, SPEED)

    targets = []
    for case, (temperature, epoch) in plan.epochs.items():
        wanted = LATER_TARGETS[temperature] if epoch else FIRST_TARGET
        plain, peer = partial(times, case, PLAIN), partial(times, case, PEER)
        targets.append(Target(f"{case}: times {PLAIN.name}", ">=", wanted, plain))
        targets.append(Target(f"{case}: times {PEER.name}", ">", 1.0, peer))
    return targets


class Rollouts:
    """Engines of all modes, and what they sampled: by case and round, then by mode."""

    def __init__(
        self, plan: Plan, weights: Published, engines: Mapping[str, EngineProcess]
    ) -> None:
        self._plan = plan
        self._weights = weights
        self._engines = engines
        self.epochs: dict[tuple[str, int], dict[str, Epoch]] = {}

    def measure(self, case: str, name: str, number: int) -> Figures:
        """Run an epoch of a mode, by a new engine where it is the first of its temperature."""
        temperature, index = self._plan.epochs[case]
        mode, engine = self._plan.installed[name], self._engines[name]
        if index == 0:
            engine.build(_settings(self._plan, self._weights, mode))
        found = self.epochs.setdefault((case, number), {})
        foretold = None if mode.replays is None else found[mode.replays]
        requests = _requests(self._plan, temperature, number, index)
        found[name] = engine.run(self._weights.handles[index], requests, foretold)
        return epoch_figures(found[name])

    def same_samples(self) -> str:
        """Say how many of all modes' samples are those sampled without drafting."""
        same = [
            np.array_equal(ours.token_ids, theirs.token_ids)
            for by_mode in self.epochs.values()
            for epoch in by_mode.values()
            for name, group in epoch.completions.items()
            for ours, theirs in zip(group, by_mode[PLAIN.name].completions[name], strict=True)
        ]
        return (
            f"{fmean(same):.1%} of the samples are those sampled without drafting, token for token."
        )


def epoch_figures(epoch: Epoch) -> Figures:
    """Return the figures of an epoch.

    ``accepted`` are drafted tokens that were right, for each sequence and step; ``wasted`` those
    that were not, of all tokens computed; ``drafter`` is its share of the seconds. The three are
    None where nothing is drafted.
    """
    num_sequences = sum(step.num_sequences for step in epoch.steps)
    drafted, accepted = epoch.num_drafted, epoch.num_accepted
    return {
        SPEED: 60 / epoch.seconds,
        "s": epoch.seconds,
        "s busy": epoch.seconds_busy,
        "tokens": epoch.num_tokens,
        "longest": max(epoch.lengths),
        "nats/token": epoch.entropy,
        "steps": len(epoch.steps),
        "accepted": accepted / num_sequences if drafted else None,
        "wasted": (drafted - accepted) / (num_sequences + drafted) if drafted else None,
        "drafter": epoch.seconds_proposing / epoch.seconds if drafted else None,
    }


def _describe(plan: Plan, weights: Published) -> list[str]:
    training = plan.training
    return [
        f"Model: {weights.num_small / 1e6:.1f} million parameters, trained for "
        f"{training.num_steps} steps, then widened function-preservingly to "
        f"{weights.num_wide / 1e6:.0f} million, so that its steps cost what theirs cost; each "
        f"epoch serves the weights {training.steps_between} updates after the last.",
        f"Workload: {plan.num_problems} prompts x {plan.num_samples} samples an epoch, counting "
        "up in words, all handed in at once; every mode on one thread. Samples are coupled: "
        "every mode samples the same tokens.",
        *(
            f"{mode.name} is not installed and was left out: pip install {mode.package}"
            for mode in plan.modes
            if not mode.is_installed
        ),
    ]


def _settings(plan: Plan, weights: Published, mode: Mode) -> EngineSettings:
    config = RolloutConfig(
        max_num_seqs=plan.num_problems * plan.num_samples,
        kv_cache_mb=512,
        coupled_sampling=mode.guesses_noise,
        drafting=None if mode.drafting is None else DraftingConfig(**mode.drafting),
    )
    return EngineSettings(
        str(weights.model_folder), config, plan.training.max_length, mode.speculative
    )


def _requests(plan: Plan, temperature: float, number: int, epoch: int) -> list[RolloutRequest]:
    """Return all prompts; problems differ by round, seeds by epoch too."""
    sampling = SamplingParameters(
        temperature, max_tokens=plan.training.max_tokens, stop_token_ids=(END_TOKEN,)
    )
    problems = spread_problems(plan.num_problems, plan.seed + number)
    first = (number * plan.training.versions + epoch) * len(problems)
    return [
        RolloutRequest(
            f"{epoch}.{index}",
            tuple(encode(problem.prompt)),
            sampling,
            plan.num_samples,
            seed=plan.seed + (first + index) * plan.num_samples,
        )
        for index, problem in enumerate(problems)
    ]
