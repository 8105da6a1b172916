"""Training of the small model of ``paceline bench rollout``, whose last versions are kept."""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from paceline.controller.bench.harness.compare import progress
from paceline.controller.bench.rollout.task import draw_problem
from paceline.controller.bench.rollout.widened_model import SMALL, Shape, build

VOCABULARY_SIZE = 128
END_TOKEN = 1
"""As in the ``characters`` tokenizer: a character's id is its ASCII code."""
WARMUP_STEPS = 30
POOL_EXAMPLES = 250
IGNORED = -100


@dataclass(frozen=True)
class Training:
    """Training of the small model; ``batch_tokens`` counts padding.

    The last ``versions`` weights, ``steps_between`` updates apart at ``final_rate``, stand for what
    engines serve in one epoch after the other.
    """

    num_steps: int
    learning_rate: float = 5e-3
    final_rate: float = 1e-4
    batch_tokens: int = 2560
    max_length: int = 512
    max_tokens: int = 448
    versions: int = 4
    steps_between: int = 10
    shape: Shape = SMALL
    seed: int = 0

    def rate(self, step: int) -> float:
        """Return the learning rate of a step: a short warm-up, then linear to ``final_rate``."""
        decayed = self.learning_rate * (1 - step / max(1, self.num_steps))
        return max(self.final_rate, decayed) * min(1.0, (step + 1) / WARMUP_STEPS)


Example = tuple[list[int], list[int]]
"""Tokens of a prompt and of its answer."""


def encode(text: str) -> list[int]:
    """Return the token ids of a text: its ASCII codes."""
    return list(text.encode("ascii"))


def trained_versions(training: Training, folder: Path) -> list[Path]:
    """Return folders of the versions, in Hugging Face format; train what ``folder`` lacks."""
    finished = folder / "finished"
    paths = [folder / f"version-{version}" for version in range(training.versions)]
    if not finished.exists() or finished.read_text(encoding="utf-8") != repr(training):
        progress(f"training the model first, for {training.num_steps} steps: {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        _train(training, paths)
        finished.write_text(repr(training), encoding="utf-8")
    return paths


def load(path: Path) -> PreTrainedModel:
    """Load a saved version in float32."""
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def save(model: PreTrainedModel, path: Path) -> None:
    """Write a model in Hugging Face format."""
    transformers_logging.disable_progress_bar()
    # Saving lets accelerate import deepspeed, which warns on every machine without a GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    model.save_pretrained(path)


def _train(training: Training, paths: Sequence[Path]) -> None:
    config = training.shape.config(VOCABULARY_SIZE, training.max_length, END_TOKEN)
    model = build(config, training.seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    saved_after = {
        training.num_steps + index * training.steps_between: path
        for index, path in enumerate(paths)
    }
    batches = _batches(training)
    for step in itertools.count():
        if step in saved_after:
            save(model, saved_after.pop(step))
        if not saved_after:
            return
        for group in optimizer.param_groups:
            group["lr"] = training.rate(step)
        inputs, labels = next(batches)
        logits = model(inputs, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def _batches(training: Training) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and labels int64 [B, L] for ever; examples of a batch are about as long."""
    random = np.random.default_rng(training.seed)
    while True:
        examples = [_example(training, random) for _ in range(POOL_EXAMPLES)]
        examples.sort(key=_length)
        batches = list(_within(examples, training.batch_tokens))
        for index in random.permutation(len(batches)):
            yield _padded(batches[index])


def _example(training: Training, random: np.random.Generator) -> Example:
    problem = draw_problem(random)
    answer = [*encode(problem.answer(random)), END_TOKEN]
    return encode(problem.prompt), answer[: training.max_tokens]


def _within(examples: Sequence[Example], num_tokens: int) -> Iterator[list[Example]]:
    """Yield examples in order, as many at a time as fit when padded to the last, the longest."""
    batch: list[Example] = []
    for example in examples:
        if batch and _length(example) * (len(batch) + 1) > num_tokens:
            yield batch
            batch = []
        batch.append(example)
    yield batch


def _padded(batch: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Return inputs, and as labels the token after each where it is one of the answer."""
    width = max(map(_length, batch))
    inputs = torch.zeros(len(batch), width, dtype=torch.int64)
    labels = torch.full_like(inputs, IGNORED)
    for row, (prompt, answer) in enumerate(batch):
        inputs[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) - 1 : len(prompt) + len(answer) - 1] = torch.tensor(answer)
    return inputs, labels


def _length(example: Example) -> int:
    return len(example[0]) + len(example[1])
