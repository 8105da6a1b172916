"""Critic and reference, whatever divides the ranks, do what they do in one process."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paceline.configs.schema.algorithm_parts import CriticConfig
from tests.learner import ranks
from tests.learner.conftest import random_batch
from tests.learner.engines.comparisons import assert_same_metrics
from tests.learner.engines.layouts import LAYOUTS, Layout
from tests.learner.test_worker import assert_same

pytestmark = pytest.mark.slow

ACTOR_CRITIC = replace(ranks.ACTOR_CRITIC, entropy_coefficient=0.1)


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("fsdp", "separate"),
        ("tensor", "shared"),
        ("tensor_fsdp", "separate"),
        ("sequence", "separate"),
        ("pipeline", "shared"),
        ("interleaved", "separate"),
        ("zero2", "separate"),
        ("zero2", "shared"),
        ("zero3", "separate"),
        ("zero3", "shared"),
    ],
)
def test_critic_and_reference_do_what_they_do_in_one_process(
    on_layout, model_folders, name, backbone
):
    layout = LAYOUTS[name]
    batches = [random_batch(seed=seed, num_samples=13) for seed in range(2)]
    program = (train_roles, batches, model_folders[layout.model])
    critic = CriticConfig(backbone=backbone, clip=0.2)
    [alone] = on_layout(Layout(model=layout.model), *program, critic=critic)
    found = on_layout(layout, *program, critic=critic)
    assert_same_metrics([metrics for metrics, *_ in found], alone[0], rel=1e-3, abs=1e-4)
    for index in (1, 2):
        assert_same(ranks.merged(rank[index] for rank in found), alone[index], 1e-3)


def train_roles(worker, batches, reference_folder):
    return ranks.train_roles(worker, batches, ACTOR_CRITIC, reference_folder)
