"""TRL's GRPOTrainer on samples that are handed to it: its step without its generation."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from paceline.controller.bench.e2e.trl_trainer import StepTimes, TimedTrainer, settings
from paceline.controller.bench.learner.batch import LearnerWorkload
from paceline.controller.bench.learner.steps import CLIP_HIGH, CLIP_LOW, OPTIMIZER


class ReplayingTrainer(TimedTrainer):
    """GRPOTrainer whose completions are given."""

    def __init__(self, completion_ids: list[list[int]], **keywords: Any) -> None:
        self._given = completion_ids
        super().__init__(**keywords)

    def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
        assert len(prompt_ids) == len(self._given), "a step generates the whole batch at once"
        return self._given, None


def trl_steps(
    workload: LearnerWorkload, model: Path, num_steps: int, microbatch_size: int
) -> list[float]:
    """Time TRL's steps on the workload's batch, in seconds, after one that is not timed."""
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    batch = workload.batch()
    prompts = [tokenizer.decode(group.prompt.token_ids) for group in batch.groups]
    completions = [sample.completion.token_ids.tolist() for sample in batch.samples]
    rewards = [sample.reward for sample in batch.samples]
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        trainer = ReplayingTrainer(
            completions,
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            processing_class=tokenizer,
            reward_funcs=lambda completions, **_: rewards,
            args=settings(
                folder,
                workload.num_samples,
                microbatch_size,
                num_generations=workload.samples_per_group,
                max_completion_length=workload.longest,
                max_steps=num_steps + 1,
                learning_rate=OPTIMIZER.learning_rate,
                max_grad_norm=OPTIMIZER.max_grad_norm,
                epsilon=CLIP_LOW,
                epsilon_high=CLIP_HIGH,
                seed=workload.seed,
            ),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            callbacks=[times],
        )
        times.trainer = trainer
        trainer.train()
    lengths = [workload.num_prompt + sample.num_tokens for sample in batch.samples]
    for step in times.steps:
        assert step["real_tokens"] == sum(lengths), "the peer trained on something else"
    return [step["seconds"] for step in times.steps[1:]]
