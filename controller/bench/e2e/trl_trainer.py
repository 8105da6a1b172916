"""TRL's GRPOTrainer under a stopwatch: ``python -m paceline.controller.bench.e2e.trl_trainer JOB``.

Set up in the peer's favour where its settings leave a choice: no gradient checkpointing (its
default), no logging, saving or reporting, and the micro-batch size that was fastest. Its own code
is not changed; the three methods that are timed are only wrapped.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from paceline.controller.bench.e2e.trl_job import TRLJob


class TimedTrainer(GRPOTrainer):  # type: ignore[misc]
    """GRPOTrainer that adds up what each step spends and processes, in ``tally``.

    ``computed_tokens`` are positions of its padded training batches, ``real_tokens`` those that
    hold a token.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.tally: defaultdict[str, float] = defaultdict(float)
        super().__init__(*arguments, **keywords)

    def _generate_single_turn(self, *arguments: Any, **keywords: Any) -> Any:
        started = time.perf_counter()
        completions = super()._generate_single_turn(*arguments, **keywords)
        self.tally["generate"] += time.perf_counter() - started
        return completions

    def _prepare_inputs(self, *arguments: Any, **keywords: Any) -> Any:
        started = time.perf_counter()
        inputs = super()._prepare_inputs(*arguments, **keywords)
        self.tally["prepare"] += time.perf_counter() - started
        for name in ("prompt_mask", "completion_mask"):
            self.tally["computed_tokens"] += inputs[name].numel()
            self.tally["real_tokens"] += int(inputs[name].sum())
        self.tally["samples"] += len(inputs["completion_mask"])
        return inputs

    def training_step(self, *arguments: Any, **keywords: Any) -> Any:
        """Time forward and backward of a micro-batch; the first one generates before them."""
        started, prepared = time.perf_counter(), self.tally["prepare"]
        loss = super().training_step(*arguments, **keywords)
        self.training_step_ended = time.perf_counter()
        inside = self.tally["prepare"] - prepared
        self.tally["forward_backward"] += self.training_step_ended - started - inside
        return loss


class StepTimes(TrainerCallback):  # type: ignore[misc]
    """Tallies of all steps, each closed when its optimiser step is done."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.trainer: TimedTrainer | None = None
        self._started = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the first step."""
        self._started = time.perf_counter()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Add the seconds in which gradients were clipped and applied."""
        assert self.trainer is not None
        self.trainer.tally["optimizer"] += time.perf_counter() - self.trainer.training_step_ended

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Close the step and start the next."""
        assert self.trainer is not None
        now = time.perf_counter()
        self.steps.append({"seconds": now - self._started, **self.trainer.tally})
        self.trainer.tally.clear()
        self._started = now


def run(job: TRLJob) -> list[dict[str, float]]:
    """Train; return what each step spent, in seconds, and processed."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    tokenizer = AutoTokenizer.from_pretrained(job.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)

    def reward(
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        reference: Sequence[str],
        **_: Any,
    ) -> list[float]:
        """Give 1 to a finished completion that equals the reference, else 0."""
        ended = (ids[-1] == tokenizer.eos_token_id for ids in completion_ids)
        cases = zip(completions, reference, ended, strict=True)
        return [float(finished and text == wanted) for text, wanted, finished in cases]

    times = StepTimes()
    trainer = TimedTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward,
        args=settings(
            str(Path(job.answer_file).parent),
            job.groups_per_step * job.samples_per_group,
            job.microbatch_size,
            num_generations=job.samples_per_group,
            max_completion_length=job.max_tokens,
            temperature=job.temperature,
            max_steps=job.num_steps,
            learning_rate=job.learning_rate,
            adam_beta1=job.adam_betas[0],
            adam_beta2=job.adam_betas[1],
            weight_decay=0.0,
            max_grad_norm=job.max_grad_norm,
            epsilon=job.clip_low,
            epsilon_high=job.clip_high,
            seed=job.seed,
        ),
        train_dataset=Dataset.from_list([vars(problem) for problem in job.problems]),
        callbacks=[times],
    )
    times.trainer = trainer
    trainer.train()
    return times.steps


def settings(folder: str, samples_per_step: int, microbatch_size: int, **others: Any) -> GRPOConfig:
    """Return the settings that every benchmark gives the peer, with ``others`` of its own."""
    assert samples_per_step % microbatch_size == 0, "a step is whole micro-batches"
    return GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=microbatch_size,
        gradient_accumulation_steps=samples_per_step // microbatch_size,
        shuffle_dataset=False,
        lr_scheduler_type="constant",
        beta=0.0,
        loss_type="dapo",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **others,
    )


if __name__ == "__main__":
    asked = TRLJob.read(Path(sys.argv[1]))
    answer = {"steps": run(asked), "versions": {"trl": metadata.version("trl")}}
    Path(asked.answer_file).write_text(json.dumps(answer), encoding="utf-8")
