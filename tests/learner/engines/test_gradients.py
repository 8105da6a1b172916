"""Layouts and settings that can change gradients and nothing else. Every law:
`test_conformance.py`."""

from __future__ import annotations

import pytest

from paceline.configs.schema.algorithm_parts import CriticConfig
from paceline.learner.objective.advantages import GeneralizedAdvantage
from paceline.learner.objective.losses.policy import Clip
from paceline.learner.objective.objective import Objective
from tests.learner import ranks
from tests.learner.conftest import random_batch
from tests.learner.engines.comparisons import assert_same_gradients, assert_same_metrics
from tests.learner.engines.layouts import FIRST, INTERLEAVED, LAYOUTS, Layout, divided, zero
from tests.learner.test_worker import assert_same

pytestmark = pytest.mark.slow

LAYERS = {"activation_checkpointing": "layers"}
CHUNKS = {"activation_checkpointing": "chunks", "tokens_per_chunk": 16}
NESTED = {
    "sequence_fsdp": divided(4, sequence=2),
    "tensor_sequence": divided(4, tensor=2, sequence=2),
    "pipeline of 4": divided(4, "deep", pipeline=4),
    "pipeline, untied": divided(2, "deep_untied", pipeline=2),
    "interleaved, tied": divided(2, "deep", **INTERLEAVED),
    "pipeline_tensor": divided(4, "deep", pipeline=2, tensor=2),
    "interleaved_fsdp": divided(4, "deep_untied", **INTERLEAVED),
    "interleaved_sequence": divided(4, "deep", **INTERLEAVED, sequence=2),
    "zero1_offload": zero(1, offload_optimizer=True),
}
CHECKPOINTED = [
    ("fsdp", LAYERS),
    ("tensor", LAYERS),
    ("pipeline", LAYERS),
    ("interleaved", CHUNKS),
    ("zero1", CHUNKS),
    ("zero2", CHUNKS),
    ("zero3", LAYERS),
]


@pytest.mark.parametrize("name", NESTED)
def test_what_divides_ranks_further_changes_nothing(on_layout, name):
    layout = NESTED[name]
    [expected] = on_layout(Layout(model=layout.model), ranks.gradients_and_logprobs, FIRST)
    assert_same_gradients(on_layout(layout, ranks.gradients_and_logprobs, FIRST), expected)


@pytest.mark.parametrize(("name", "settings"), CHECKPOINTED)
def test_activations_computed_twice_change_nothing(on_layout, name, settings):
    layout = LAYOUTS[name]
    [expected] = on_layout(Layout(model=layout.model), ranks.gradients_and_logprobs, FIRST)
    found = on_layout(layout, ranks.gradients_and_logprobs, FIRST, **settings)
    assert_same_gradients(found, expected)


def test_every_gradient_of_a_critic_in_a_pipeline_is_that_of_one_process(on_layout):
    """Of which the steps of an optimiser show the direction alone."""
    algorithm = Objective(GeneralizedAdvantage(), Clip(0.2, 0.28), "token_mean", max_tokens=64)
    program = (ranks.gradients, random_batch(num_samples=13), algorithm, "critic")
    critic = CriticConfig(backbone="separate", clip=0.2)
    [(report, expected)] = on_layout(Layout(model="deep"), *program, critic=critic)
    found = on_layout(LAYOUTS["pipeline"], *program, critic=critic)
    metrics = [[mine.metrics] for mine, _ in found]
    assert_same_metrics(metrics, [report.metrics], rel=1e-5, abs=1e-6)
    assert_same(ranks.merged(gradients for _, gradients in found), expected, 1e-5)
