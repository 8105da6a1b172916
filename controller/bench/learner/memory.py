"""How much memory a step on one sequence takes, by its length: ours in chunks and by layers, beside
what people write by hand, a transformers model with gradient checkpointing and whole logits.

The same model, optimiser (AdamW in float32, its state there before the step) and loss; every side
in a process of its own, whose peak is what the kernel counted, less what it held when all was
imported and nothing loaded: weights, gradients, optimiser and activations. Memory grows linearly
with the length; the longest sequence in a fixed memory is read off the line through what was
measured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from paceline.configs.schema.learner import Checkpointing, LearnerConfig
from paceline.configs.vocabulary import Group, Prompt, Sample, TrainBatch
from paceline.controller.bench.harness.resident_memory import (
    PAGES_AT_ONCE,
    environment,
    forget_peak,
    peak_bytes,
    resident_bytes,
)
from paceline.controller.bench.harness.result import Figures
from paceline.controller.bench.harness.subprocesses import side_by_side
from paceline.controller.bench.learner.batch import LearnerWorkload, evenly_sampled
from paceline.controller.bench.learner.steps import CLIP_HIGH, CLIP_LOW, OPTIMIZER, plain_loss

PLAIN, LAYERS, CHUNKS = "plain HF step, checkpointing", "paceline, layers", "paceline, chunks"
LONGEST = 2**17

MODEL = LearnerWorkload(layers=8, vocabulary=8192, num_groups=1, longest=LONGEST)
"""Vocabulary over hidden size is 32 and over layers times hidden size 4, between those of real
models (Qwen3-8B: 37 and 1; Qwen2.5-1.5B: 99 and 3.5; Qwen3-0.6B: 148 and 5.3)."""


Step = Callable[[TrainBatch], None]
Side = Callable[[Path, Path, int], Step]
"""From the model's folder, one for published weights, and the most tokens to a step."""


@dataclass(frozen=True)
class MemoryPlan:
    """Lengths at which each side is measured, and the memory, in bytes, that is to be filled."""

    lengths: Mapping[str, tuple[int, ...]]
    memory: int = 2**28
    tokens_per_chunk: int = 256


QUICK = MemoryPlan({PLAIN: (256, 768), CHUNKS: (1024, 2560)})
FULL = MemoryPlan(
    {PLAIN: (512, 1024, 2048), LAYERS: (1024, 2048, 4096), CHUNKS: (2048, 4096, 8192)}
)


def measure_memory(plan: MemoryPlan, output: Path) -> Mapping[str, Mapping[int, int]]:
    """Return peak bytes by side and length; the model is kept in ``output``."""
    model = MODEL.write_model(output / "learner-memory" / "model")
    sides: dict[str, Side] = {
        PLAIN: plain_step,
        LAYERS: partial(paceline_step, "layers", plan.tokens_per_chunk),
        CHUNKS: partial(paceline_step, "chunks", plan.tokens_per_chunk),
    }
    with environment({**PAGES_AT_ONCE, "OMP_NUM_THREADS": "1"}):
        measured = plan.lengths.items()
        found = side_by_side(
            [partial(peaks_of, sides[side], model, lengths) for side, lengths in measured]
        )
    return dict(zip(plan.lengths, found, strict=True))


def memory_figures(peaks: Mapping[int, int], memory: int) -> Figures:
    """Return the longest sequence within ``memory`` bytes, and the peaks that say so."""
    return {
        "longest": longest_within(memory, peaks),
        "KiB a token": line_through(peaks)[0] / 2**10,
        **{f"MiB at {length:,}": size / 2**20 for length, size in peaks.items()},
    }


def longest_within(memory: int, peaks: Mapping[int, int]) -> int:
    """Return the length at which the line through measured peaks reaches ``memory`` bytes."""
    per_token, fixed = line_through(peaks)
    return round((memory - fixed) / per_token)


def line_through(peaks: Mapping[int, int]) -> tuple[float, float]:
    """Fit bytes a token, and bytes whatever the length, by least squares."""
    per_token, fixed = np.polyfit(list(peaks), list(peaks.values()), 1)
    return float(per_token), float(fixed)


def peaks_of(side: Side, model: Path, lengths: Sequence[int]) -> dict[int, int]:
    """Measure the peak bytes of a side's step on a sequence of each length, in this process."""
    import torch
    from transformers import AutoModelForCausalLM  # noqa: F401  what is imported is no part of it

    from paceline.learner.worker import LearnerWorker  # noqa: F401

    torch.set_num_threads(1)
    base = resident_bytes()
    with tempfile.TemporaryDirectory() as weights:
        step = side(model, Path(weights), max(lengths))
        peaks = {}
        for length in lengths:
            forget_peak()
            step(sequence(length))
            peaks[length] = peak_bytes() - base
    return peaks


def paceline_step(
    checkpointing: Checkpointing, tokens_per_chunk: int, model: Path, weights: Path, longest: int
) -> Step:
    """Return the step of one learner rank."""
    from paceline.learner.objective.advantages import Outcome
    from paceline.learner.objective.losses.policy import Clip
    from paceline.learner.objective.objective import Objective
    from paceline.learner.worker import LearnerWorker

    clip = Clip(CLIP_LOW, CLIP_HIGH)
    algorithm = Objective(Outcome(), clip, "token_mean", max_tokens=longest)
    config = LearnerConfig(
        tokens_per_microbatch=longest,
        activation_checkpointing=checkpointing,
        tokens_per_chunk=tokens_per_chunk,
    )
    worker = LearnerWorker(
        str(model),
        MODEL.model_config(),
        config,
        rank=0,
        rendezvous=None,
        weights_folder=str(weights),
        seed=0,
    )

    def step(batch: TrainBatch) -> None:
        worker.forward_backward(batch, algorithm)
        worker.optimizer_step(OPTIMIZER, 0, 1)

    return step


def plain_step(model: Path, weights: Path, longest: int) -> Step:
    """Return the same step, by hand."""
    import torch
    from transformers import AutoModelForCausalLM

    from paceline.learner.batch.sequences import token_sequences
    from paceline.learner.engines.optimizer import build_optimizer, take_step

    causal_lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    causal_lm.gradient_checkpointing_enable()
    causal_lm.train()
    optimizer = build_optimizer(list(causal_lm.parameters()))

    def step(batch: TrainBatch) -> None:
        [sample] = batch.samples
        loss = plain_loss(
            causal_lm,
            token_sequences(batch.groups),
            [torch.from_numpy(sample.completion.logprobs)],
            torch.tensor([sample.reward]),
            batch.num_trained_tokens,
        )
        torch.autograd.backward(loss)
        take_step(optimizer, OPTIMIZER, 0, 1)

    return step


def sequence(length: int) -> TrainBatch:
    """Return one sequence of random tokens, all but the first trained."""
    tokens = np.random.default_rng(length).integers(1, MODEL.vocabulary, length, dtype=np.int32)
    sample = Sample(evenly_sampled(tokens[1:], MODEL.vocabulary), reward=1.0)
    return TrainBatch(0, (Group(0, Prompt("", "", (int(tokens[0]),)), (sample,)),))
