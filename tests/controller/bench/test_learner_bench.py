"""All sides of the learner's benchmark take the same step, and the table says what they took."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from paceline.controller.bench.learner import learner
from paceline.controller.bench.learner.batch import BRIEF, LONG_TAILED
from paceline.controller.bench.learner.memory import CHUNKS, PLAIN, SequenceMemory
from paceline.controller.bench.learner.steps import (
    algorithm,
    divided_steps,
    learner_worker,
    paceline_steps,
    plain_gradients,
    plain_steps,
)

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


@pytest.mark.slow
def test_ranks_take_the_step_together(model: Path) -> None:
    config = learner.ON_TWO_RANKS["tensor"]
    assert len(divided_steps(TINY, model, 2, config)) == 2


@pytest.mark.slow
def test_the_peer_trains_on_what_it_is_handed(model: Path) -> None:
    pytest.importorskip("trl")
    from paceline.controller.bench.learner.peer import trl_steps

    assert len(trl_steps(TINY, model, 2, microbatch_size=8)) == 2


def test_figures_are_ratios_of_medians_in_each_round() -> None:
    plan = learner.Plan(TINY, num_rounds=2, num_steps=1, meshes=["tensor"])
    sides = learner.OURS, learner.PLAIN, learner.PEER, "tensor"
    rounds = [
        learner.Round(dict(zip(sides, seconds, strict=True)), 1e9)
        for seconds in [(1.0, 2.0, 3.0, 0.5), (2.0, 2.0, 4.0, 2.0)]
    ]
    memory = SequenceMemory(
        {PLAIN: {1: 200, 2: 300}, CHUNKS: {1: 110, 2: 120}}, 400, {PLAIN: 3, CHUNKS: 30}
    )
    result = learner.report(plan, rounds, memory)
    speed, length = result.targets.values()
    assert (speed.measured.low, speed.measured.median, speed.measured.high) == (2.0, 2.5, 3.0)
    assert length.measured.median == 10
    assert speed.met and length.met
    assert result.tables[1].rows == [("tensor", "1.5 (1-2)")]
