"""All sides of the learner's benchmark take the same step, and the table says what they took."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from paceline.controller.bench.harness.subprocesses import in_own_process
from paceline.controller.bench.learner import learner, memory
from paceline.controller.bench.learner.batch import BRIEF, LONG_TAILED
from paceline.controller.bench.learner.steps import (
    ALONE,
    algorithm,
    divided_steps,
    learner_worker,
    paceline_steps,
    plain_gradients,
    plain_steps,
)

MIB = 2**20
TINY = replace(BRIEF, layers=1, vocabulary=160, num_groups=2, num_prompt=8, longest=24)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return TINY.write_model(tmp_path / "model")


def test_the_batch_is_long_tailed_and_the_same_every_time() -> None:
    lengths = sorted(sample.num_tokens for sample in LONG_TAILED.batch().samples)
    assert lengths[-1] > 4 * lengths[len(lengths) // 2]
    one, other = (
        [s.completion.token_ids.tolist() for s in LONG_TAILED.batch().samples] for _ in range(2)
    )
    assert one == other


def test_the_plain_steps_gradient_is_the_learners(model: Path, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    plain_gradients(plain, TINY, microbatch_size=4)
    worker = learner_worker(TINY, model, str(tmp_path / "weights"))
    worker.forward_backward(TINY.batch(), algorithm(TINY))
    found = dict(worker._models.policy.parts[0].causal_lm.named_parameters())
    for name, parameter in plain.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(found[name].grad, parameter.grad, atol=1e-4 * scale, rtol=1e-4)


def test_every_side_takes_as_many_steps_as_it_is_asked_to(model: Path) -> None:
    assert len(paceline_steps(TINY, model, 2)) == 2
    assert len(plain_steps(TINY, model, 2, microbatch_size=4)) == 2


def test_ranks_are_processes_of_their_own_that_take_the_same_step(model: Path) -> None:
    assert len(divided_steps(TINY, model, 2, ALONE)) == 2


def test_speed_is_trained_tokens_over_the_median_of_a_sides_seconds() -> None:
    plan = replace(learner.QUICK, workload=TINY)
    figures = learner.step_figures(plan, learner.OURS, [1.0, 2.0, 9.0])
    assert figures["s/step"] == 2
    assert figures["trained tokens/s"] == TINY.batch().num_trained_tokens / 2
    assert 0 < figures["use of the matmul rate"] < 1


def test_the_longest_sequence_is_where_the_line_through_the_peaks_reaches_the_memory() -> None:
    peaks = {100: 200 * MIB, 200: 300 * MIB}
    assert memory.memory_figures(peaks, 1000 * MIB) == pytest.approx(
        {"longest": 900, "KiB a token": 1024, "MiB at 100": 200, "MiB at 200": 300}
    )
    assert memory.longest_within(150 * MIB, peaks) == 50


def test_a_peak_holds_weights_gradients_optimiser_and_what_a_longer_sequence_takes(
    tmp_path: Path,
) -> None:
    folder = memory.MODEL.write_model(tmp_path / "model")
    side = partial(memory.paceline_step, "chunks", 256)
    peaks = in_own_process(memory.peaks_of, side, folder, (16, 1024))
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert peaks[16] > 4 * weights
    assert peaks[1024] > peaks[16]
