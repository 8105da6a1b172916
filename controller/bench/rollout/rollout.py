"""``paceline bench rollout``: epochs of rollouts with and without drafting, on stock vLLM.

Every mode has an engine in a process of its own. An epoch hands in the same prompts once, with the
same seeds and the same weights for every mode; the modes take turns epoch by epoch, so that a
machine that slows down slows all of them. A new version is served in every epoch, a few updates of
training after the last. What a mode learned of the prompts it learned in the epochs before.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from paceline.configs.schema.rollout import DraftingConfig, RolloutConfig
from paceline.configs.vocabulary import RolloutRequest, SamplingParameters
from paceline.controller.bench.harness.result import BenchResult
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
from paceline.controller.bench.rollout.report import Round, Setting, report
from paceline.controller.bench.rollout.task import spread_problems
from paceline.controller.bench.rollout.training import END_TOKEN, Training, encode
from paceline.controller.bench.rollout.weights import Published, publish_versions
from paceline.controller.bench.rollout.widened_model import WIDE, Shape


@dataclass(frozen=True)
class Plan:
    """What is run: in every round every mode, from an engine that knows nothing, at every
    temperature, ``training.versions`` epochs of ``num_problems`` prompts with ``num_samples``."""

    modes: Sequence[Mode]
    temperatures: Sequence[float]
    num_rounds: int
    num_problems: int
    num_samples: int
    training: Training
    shape: Shape = WIDE
    seed: int = 0


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
    load_before = os.getloadavg()[0]
    folder = output / f"rollout-{'quick' if quick else 'full'}"
    folder.mkdir(parents=True, exist_ok=True)
    # Published weights are large and made anew in seconds; the trained model is kept.
    with tempfile.TemporaryDirectory(dir=folder) as published:
        weights = publish_versions(plan.training, plan.shape, folder / "model", Path(published))
        rounds = _measure(plan, weights, folder)
    return report(_setting(plan, weights), rounds, load_before)


def _setting(plan: Plan, weights: Published) -> Setting:
    training = plan.training
    return Setting(
        f"Model: {weights.num_small / 1e6:.1f} million parameters, trained for "
        f"{training.num_steps} steps, then widened function-preservingly to "
        f"{weights.num_wide / 1e6:.0f} million, so that its steps cost what theirs cost; each "
        f"epoch serves the weights {training.steps_between} updates after the last.",
        f"Workload: {plan.num_problems} prompts x {plan.num_samples} samples an epoch, counting "
        "up in words, all handed in at once; every mode on one thread. Samples are coupled: "
        "every mode samples the same tokens.",
        plan.seed,
        [
            f"{mode.name} is not installed and was left out: pip install {mode.package}"
            for mode in plan.modes
            if not mode.is_installed
        ],
    )


def _measure(plan: Plan, weights: Published, folder: Path) -> list[Round]:
    modes = [mode for mode in plan.modes if mode.is_installed]
    measured: list[Round] = []
    with ExitStack() as stack:
        processes = {
            mode.name: stack.enter_context(closing(EngineProcess(folder / f"{index}.log")))
            for index, mode in enumerate(modes)
        }
        for number in range(plan.num_rounds):
            order = _in_turn(modes, number)
            measured.append(
                {
                    temperature: _measure_once(plan, weights, processes, order, temperature, number)
                    for temperature in plan.temperatures
                }
            )
    return measured


def _measure_once(
    plan: Plan,
    weights: Published,
    processes: Mapping[str, EngineProcess],
    order: Sequence[Mode],
    temperature: float,
    number: int,
) -> Mapping[str, list[Epoch]]:
    for mode in order:
        processes[mode.name].build(_settings(plan, weights, mode))
    epochs: dict[str, list[Epoch]] = {mode.name: [] for mode in order}
    for index, handle in enumerate(weights.handles):
        requests = _requests(plan, temperature, number, index)
        for mode in order:
            foretold = None if mode.replays is None else epochs[mode.replays][-1]
            epochs[mode.name].append(processes[mode.name].run(handle, requests, foretold))
    return {name: epochs[name] for name in processes}


def _in_turn(modes: Sequence[Mode], number: int) -> list[Mode]:
    """Every round begins with another one; those that replay come after the others."""
    first = [mode for mode in modes if mode.replays is None]
    start = number % len(first)
    return [*first[start:], *first[:start], *(mode for mode in modes if mode.replays)]


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
    """All prompts; problems are other ones in every round, seeds in every epoch too."""
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
