"""Whatever the mesh, ranks compute, publish, save and load what one process does."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from paceline.configs.schema.algorithm_parts import CriticConfig
from paceline.weights_sync.shared_memory import read_weights
from tests.learner import ranks
from tests.learner.conftest import random_batch
from tests.learner.test_worker import assert_same

pytestmark = pytest.mark.slow

MESHES = {
    "hsdp": (4, {"replicate": 2}),
    "tensor": (2, {"tensor": 2}),
    "tensor_fsdp": (4, {"tensor": 2}),
    "sequence": (2, {"sequence": 2}),
    "sequence_fsdp": (4, {"sequence": 2}),
    "tensor_sequence": (4, {"tensor": 2, "sequence": 2}),
}
"""Number of ranks and what they divide; what is left shards the weights."""


def on_meshes(*names):
    return pytest.mark.parametrize(
        ("num_ranks", "parallel"), [MESHES[name] for name in names], ids=names
    )


each_mesh = on_meshes(*MESHES)
each_mixture = on_meshes("hsdp", "tensor_fsdp", "sequence_fsdp", "tensor_sequence")
ACTOR_CRITIC = replace(ranks.ACTOR_CRITIC, entropy_coefficient=0.1)
LONG_ROWS = {"tokens_per_microbatch": 256}
"""A rank's share in one row, where many passes are made: tensor ranks take their time for each.
That several rows add up, the gradients and the first three steps show."""


@each_mesh
def test_every_gradient_metric_and_logprob_is_that_of_one_process(on_ranks, num_ranks, parallel):
    batch = random_batch(num_samples=15, temperature=0.9)
    [(report, expected, logprobs)] = on_ranks(1, ranks.gradients_and_logprobs, batch)
    for found in on_ranks(num_ranks, ranks.gradients_and_logprobs, batch, parallel=parallel):
        expected_metrics = ranks.of_training(report.metrics)
        assert ranks.of_training(found[0].metrics) == pytest.approx(
            expected_metrics, rel=1e-5, abs=1e-6
        )
        assert_same(found[1], expected, 1e-5)
        for mine, theirs in zip(found[2], logprobs, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=2e-5)


@each_mixture
def test_training_follows_one_process_step_by_step(on_ranks, num_ranks, parallel):
    """With gradients that are clipped."""
    batches = [random_batch(seed=seed) for seed in range(3)]
    [(expected_reports, expected)] = on_ranks(1, ranks.train, batches)
    for reports, found in on_ranks(num_ranks, ranks.train, batches, parallel=parallel):
        for (report, step), (wanted, wanted_step) in zip(reports, expected_reports, strict=True):
            assert wanted_step["grad_norm"] > ranks.OPTIMIZER.max_grad_norm
            expected_metrics = ranks.of_training(wanted.metrics)
            assert ranks.of_training(report.metrics) == pytest.approx(
                expected_metrics, rel=1e-3, abs=1e-5
            )
            assert step == pytest.approx(wanted_step, rel=1e-3)
        assert_same(found, expected, 1e-3)


@on_meshes("tensor_sequence")
def test_losses_of_twenty_steps_are_those_of_one_process(on_ranks, num_ranks, parallel):
    batches = [random_batch(seed=seed, num_samples=8) for seed in range(20)]
    [(expected, _)] = on_ranks(1, ranks.train, batches)
    losses = [report.metrics["loss"] for report, _ in expected]
    settings = {"parallel": parallel, **LONG_ROWS}
    for reports, _ in on_ranks(num_ranks, ranks.train, batches, **settings):
        found = [report.metrics["loss"] for report, _ in reports]
        assert found == pytest.approx(losses, rel=1e-2, abs=1e-3)


@each_mixture
def test_pieces_tile_every_tensor_once_and_make_up_what_is_published(
    on_ranks, tmp_path, num_ranks, parallel
):
    folder = tmp_path / "model"
    results = on_ranks(
        num_ranks, ranks.publish_pieces, [random_batch()], str(folder), parallel=parallel
    )
    (expected, handle), *_ = (result[:2] for result in results)
    published = {name: tensor.numpy().copy() for name, tensor in read_weights(handle)}
    assert_same(published, expected)
    exported = AutoModelForCausalLM.from_pretrained(folder)
    assert_same({n: p.detach().numpy() for n, p in exported.named_parameters()}, expected)
    covered = {name: np.zeros(tensor.shape, int) for name, tensor in expected.items()}
    for name, index in itertools.chain.from_iterable(result[2] for result in results):
        covered[name][index] += 1
    assert all((times == 1).all() for times in covered.values())


@on_meshes("tensor_fsdp", "tensor_sequence")
@pytest.mark.parametrize("saves", [True, False])
def test_a_checkpoint_moves_between_this_mesh_and_two_fsdp_ranks(
    on_ranks, tmp_path, num_ranks, parallel, saves
):
    batches = [random_batch(seed=seed) for seed in range(4)]
    folder = str(tmp_path / "checkpoint")
    meshes = [(num_ranks, {"parallel": parallel, **LONG_ROWS}), (2, LONG_ROWS)]
    saving, loading = meshes if saves else reversed(meshes)
    [(_, expected)] = on_ranks(1, ranks.train, batches)
    on_ranks(saving[0], ranks.train_and_save, batches[:2], folder, **saving[1])
    resumed = on_ranks(loading[0], ranks.load_and_train, folder, batches[2:], **loading[1])
    for version, (_, found) in resumed:
        assert version == 2
        assert_same(found, expected, 1e-3)


@pytest.mark.parametrize(
    ("mesh", "backbone"),
    [("tensor_fsdp", "separate"), ("sequence_fsdp", "separate"), ("tensor_sequence", "shared")],
)
def test_critic_and_reference_do_what_they_do_in_one_process(
    on_ranks, model_folder, mesh, backbone
):
    num_ranks, parallel = MESHES[mesh]
    batches = [random_batch(seed=seed, num_samples=13) for seed in range(2)]
    arguments = (batches, ACTOR_CRITIC, model_folder)
    critic = CriticConfig(backbone=backbone, clip=0.2)
    [(reports, *expected)] = on_ranks(1, ranks.train_roles, *arguments, critic=critic)
    settings = {"critic": critic, "parallel": parallel, **LONG_ROWS}
    for mine, *found in on_ranks(num_ranks, ranks.train_roles, *arguments, **settings):
        for report, wanted in zip(mine, reports, strict=True):
            assert ranks.of_training(report) == pytest.approx(
                ranks.of_training(wanted), rel=1e-3, abs=1e-4
            )
        for weights, wanted in zip(found, expected, strict=True):
            assert_same(weights, wanted, 1e-3)


@on_meshes("tensor_sequence")
def test_greedy_mismatches_are_counted_once(on_ranks, num_ranks, parallel):
    groups = random_batch().groups
    [one] = on_ranks(1, ranks.greedy_mismatches, groups, 1e-4)
    found = on_ranks(num_ranks, ranks.greedy_mismatches, groups, 1e-4, parallel=parallel)
    assert found == [one] * num_ranks
    assert one > 0
