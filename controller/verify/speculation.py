"""Losslessness of drafting: all checks, on a model trained for them or on a user's own."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig

from paceline.configs.errors import ModelError
from paceline.controller.observe.files.versions import collect_versions
from paceline.controller.verify.checks.coupled import coupled_distribution, coupled_tokens
from paceline.controller.verify.checks.greedy import greedy_tokens, stops
from paceline.controller.verify.checks.sampling import (
    sampled_distribution,
    stopped_distribution,
    weight_swap,
)
from paceline.controller.verify.result import CheckResult, Verification
from paceline.controller.verify.subject import FULL, QUICK, Subject
from paceline.controller.verify.tiny_model import Language, train_tiny_model
from paceline.weights_sync.shared_folder import shared_folder

Check = Callable[[Subject], Iterator[CheckResult]]
"""Holds one law against every drafter it is for."""

CHECKS: Sequence[Check] = (
    greedy_tokens,
    stops,
    sampled_distribution,
    stopped_distribution,
    weight_swap,
    coupled_tokens,
    coupled_distribution,
)
"""In this order; each leaves the engines with version 0 of the weights and nothing to do."""

NUM_PROMPTS = 6
LONGEST_PROMPT = 9

KV_CACHE_MB, OWN_MODEL_KV_CACHE_MB = 32, 512


def verify_speculation(
    model: Path | None, *, seed: int, quick: bool, tell: Callable[[str], None]
) -> Verification:
    """Run every check; ``model`` is a folder in Hugging Face format, or None for a tiny model.

    ``tell`` is given each check's name when it begins.

    Raises:
        ModelError: the model cannot be served.
    """
    began = time.perf_counter()
    with subject_of(model, seed=seed, quick=quick) as subject:
        results: list[CheckResult] = []
        for check in CHECKS:
            tell(check.__name__.replace("_", " "))
            results += check(subject)
    figures = {
        "model": "tiny" if model is None else str(model),
        "seed": seed,
        "quick": quick,
        "seconds": time.perf_counter() - began,
        "versions": collect_versions(seed),
    }
    return Verification("speculation", results, figures)


@contextmanager
def subject_of(model: Path | None, *, seed: int, quick: bool) -> Iterator[Subject]:
    """Set up the model under verification with its engines; its files go when the block ends."""
    size = QUICK if quick else FULL
    with tempfile.TemporaryDirectory() as folder, shared_folder() as shared:
        if model is None:
            max_length = LONGEST_PROMPT + size.num_greedy_tokens
            train_tiny_model(folder, seed=seed, max_length=max_length)
            prompts, kv_cache_mb = _prompts_of_language(seed), KV_CACHE_MB
        else:
            folder, kv_cache_mb = str(model), OWN_MODEL_KV_CACHE_MB
            prompts = _any_prompts(_vocabulary(model), seed)
        yield Subject(
            folder, shared, prompts=prompts, size=size, seed=seed, kv_cache_mb=kv_cache_mb
        )


def _prompts_of_language(seed: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    texts = Language.of_seed(seed).texts(NUM_PROMPTS, LONGEST_PROMPT, generator).tolist()
    return [tuple(text[:length]) for text, length in zip(texts, _lengths(), strict=True)]


def _any_prompts(vocabulary: int, seed: int) -> list[tuple[int, ...]]:
    """Draw prompts that mean nothing: what is verified holds after any."""
    dice = random.Random(seed)
    return [tuple(dice.randrange(vocabulary) for _ in range(length)) for length in _lengths()]


def _lengths() -> list[int]:
    """Return lengths of the prompts, the longest first: rows of a batch are not alike."""
    return [LONGEST_PROMPT - index for index in range(NUM_PROMPTS)]


def _vocabulary(model: Path) -> int:
    try:
        return int(AutoConfig.from_pretrained(model).get_text_config().vocab_size)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{model} holds no readable config.json, expected a folder in Hugging Face format, for "
            "example runs/quickstart/final"
        ) from error
