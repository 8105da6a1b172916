"""Rollouts to draft from and for: streams that copy themselves, and what a model once sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]

RECORDING = Path(__file__).with_name("suffix_rollouts.npz")
COPIED = 0.6
MEAN_PIECE = 40
VOCABULARY = 32_000


@dataclass(frozen=True)
class Rollouts:
    """Samples: ``tokens[generation][problem]`` are those of one group, int32 [C] each.

    Every generation samples every problem. ``prompts`` are the problems' own tokens. The first
    ``num_known`` generations are what drafters know, the others what they draft for.
    """

    prompts: Sequence[Tokens]
    tokens: Sequence[Sequence[Sequence[Tokens]]]
    num_known: int

    @property
    def num_generations(self) -> int:
        """Weight versions that sampled."""
        return len(self.tokens)

    @property
    def num_problems(self) -> int:
        """Prompts that each version sampled from."""
        return len(self.prompts)


def synthetic(
    num_problems: int, num_generations: int, num_samples: int, length: int, seed: int = 0
) -> Rollouts:
    """Draw samples of ``length`` tokens, about 60% of them copied from their problem's past.

    A sample is made of pieces of 40 tokens on average. A piece is copied from a place in what the
    problem has got so far (earlier generations, siblings before it, the sample itself), any place
    as likely as another, or it is noise: Zipf-distributed tokens (exponent 1.2), as frequent ones
    are in text. Problems share nothing but that distribution.
    """
    of_problems = [
        _one_problem(np.random.default_rng([seed, problem]), num_generations * num_samples * length)
        for problem in range(num_problems)
    ]
    shape = (num_generations, num_samples, length)
    return Rollouts(
        [np.zeros(0, np.int32)] * num_problems,
        [
            [list(text.reshape(shape)[generation]) for text in of_problems]
            for generation in range(num_generations)
        ],
        num_known=num_generations - 1,
    )


def _one_problem(random: np.random.Generator, num_tokens: int) -> Tokens:
    text = np.minimum(random.zipf(1.2, num_tokens), VOCABULARY - 1).astype(np.int32)
    at = 0
    while at < num_tokens:
        size = min(int(random.geometric(1 / MEAN_PIECE)), num_tokens - at)
        if at >= size and random.random() < COPIED:
            start = int(random.integers(0, at - size + 1))
            text[at : at + size] = text[start : start + size]
        at += size
    return text


def recorded() -> Rollouts:
    """Load what a run of Paceline sampled: 8 epochs of 24 problems in groups of 8, a version each.

    The quick start's small model of characters, after a warm start on the labelled digits of
    ``bench e2e`` (``transcripts.py``) and 40 steps of reinforcement learning on these problems, at
    temperature 1: answers of up to 160 tokens, half of them below 50, most with some digit wrong.
    """
    with np.load(RECORDING) as file:
        prompts = np.split(file["prompts"].astype(np.int32), np.cumsum(file["prompt_lengths"])[:-1])
        lengths = file["lengths"]  # [generations, problems, samples]
        samples = iter(np.split(file["tokens"].astype(np.int32), np.cumsum(lengths)[:-1]))
    tokens = [[[next(samples) for _ in group] for group in of] for of in lengths]
    return Rollouts(prompts, tokens, num_known=len(tokens) // 2)
