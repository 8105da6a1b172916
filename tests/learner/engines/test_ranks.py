"""Two FSDP ranks compute, publish, save and refuse what one process does."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from paceline.configs.errors import ClusterError
from paceline.configs.schema.algorithm_parts import CriticConfig
from paceline.configs.vocabulary import TrainBatch
from paceline.weights_sync.shared_memory import read_weights
from tests.learner import ranks
from tests.learner.conftest import random_batch, random_group, rank_process
from tests.learner.test_worker import assert_same, spoil

pytestmark = pytest.mark.slow


def test_every_parameters_gradient_on_two_ranks_equals_that_of_one_process(on_ranks):
    batch = random_batch(num_samples=15, temperature=0.9)
    [(report, expected)] = on_ranks(1, ranks.gradients, batch)
    for sharded_report, found in on_ranks(2, ranks.gradients, batch):
        expected_metrics = ranks.of_training(report.metrics)
        found_metrics = ranks.of_training(sharded_report.metrics)
        assert found_metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-6)
        assert_same(found, expected, 1e-5)


def test_activation_checkpointing_on_two_ranks_changes_no_gradient(on_ranks):
    batch = random_batch(num_samples=15)
    [(_, expected)] = on_ranks(1, ranks.gradients, batch)
    [(_, found), _] = on_ranks(2, ranks.gradients, batch, activation_checkpointing=True)
    assert_same(found, expected, 1e-5)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_rank_without_samples_keeps_step_and_adds_nothing(on_ranks, num_samples):
    """One sample for two ranks; or a long one in two microbatches' worth of short ones."""
    generator = np.random.default_rng(0)
    shapes = [(10, 50), (10, 40), (10, 40)][:num_samples]
    batch = TrainBatch(0, tuple(random_group(generator, *shape) for shape in shapes))
    [(_, expected)] = on_ranks(1, ranks.gradients, batch)
    for report, found in on_ranks(2, ranks.gradients, batch):
        assert report.num_padding_tokens == 1
        assert_same(found, expected, 1e-5)


def test_training_on_two_ranks_follows_one_process_step_by_step(on_ranks):
    batches = [random_batch(seed=seed) for seed in range(3)]
    [(expected_reports, expected)] = on_ranks(1, ranks.train, batches)
    [(reports, found), (other_reports, _)] = on_ranks(2, ranks.train, batches)
    for (report, step), (other, other_step), (wanted, wanted_step) in zip(
        reports, other_reports, expected_reports, strict=True
    ):
        assert report.metrics == other.metrics
        assert step == other_step
        expected_metrics = ranks.of_training(wanted.metrics)
        assert ranks.of_training(report.metrics) == pytest.approx(
            expected_metrics, rel=1e-3, abs=1e-5
        )
        assert step == pytest.approx(wanted_step, rel=1e-3)
    # Adam divides by the gradient's magnitude, so rounding errors of tiny gradients become visible
    assert_same(found, expected, 1e-3)


@pytest.mark.parametrize(("saving", "loading"), [(1, 2), (2, 1), (2, 2)])
def test_a_checkpoint_resumes_on_any_number_of_ranks(on_ranks, tmp_path, saving, loading):
    batches = [random_batch(seed=seed) for seed in range(4)]
    folder = str(tmp_path / "checkpoint")
    [(_, expected)] = on_ranks(1, ranks.train, batches)
    on_ranks(saving, ranks.train_and_save, batches[:2], folder)
    for version, (_, resumed) in on_ranks(loading, ranks.load_and_train, folder, batches[2:]):
        assert version == 2
        assert_same(resumed, expected, 1e-3)


def test_two_ranks_publish_and_export_whole_weights(on_ranks, tmp_path):
    folder = tmp_path / "model"
    (expected, handle), (_, nothing) = on_ranks(
        2, ranks.train_and_publish, [random_batch()], str(folder)
    )
    assert nothing is None
    assert_same({name: tensor.numpy() for name, tensor in read_weights(handle)}, expected)
    exported = AutoModelForCausalLM.from_pretrained(folder)
    assert_same({n: p.detach().numpy() for n, p in exported.named_parameters()}, expected)


def test_looking_at_weights_between_gradient_and_update_leaves_nothing_stale(on_ranks):
    batch = random_batch()
    [(_, _, expected)] = on_ranks(1, ranks.logprobs_between_steps, batch)
    for before, unchanged, after in on_ranks(2, ranks.logprobs_between_steps, batch):
        for index in range(len(batch.samples)):
            np.testing.assert_array_equal(before[index], unchanged[index])
            np.testing.assert_allclose(after[index], expected[index], atol=2e-4)


def test_greedy_mismatches_are_counted_over_both_ranks(on_ranks):
    groups = random_batch().groups
    [one] = on_ranks(1, ranks.greedy_mismatches, groups, 1e-4)
    assert on_ranks(2, ranks.greedy_mismatches, groups, 1e-4) == [one, one]
    assert one > 0


@pytest.mark.parametrize(("name", "value"), [("reward", float("nan")), ("logprobs", -1e4)])
def test_a_bad_number_fails_both_ranks_together_and_neither_hangs(on_ranks, name, value):
    batch = random_batch()
    batch = spoil(spoil(batch, "reward", -1.0), name, value)
    assert on_ranks(2, ranks.failing_step, batch) == [("NonFiniteError", len(batch.samples))] * 2


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_bfloat16_runs_the_same_arithmetic_on_one_and_two_ranks(on_ranks):
    batch = random_batch()
    [(exact, exact_gradients)] = on_ranks(1, ranks.gradients, batch)
    [(one, found)] = on_ranks(1, ranks.gradients, batch, precision="bfloat16")
    [(two, found_on_two), _] = on_ranks(2, ranks.gradients, batch, precision="bfloat16")
    assert one.metrics["loss"] == pytest.approx(exact.metrics["loss"], rel=0.05)
    assert one.metrics != exact.metrics
    assert two.metrics["entropy"] == pytest.approx(one.metrics["entropy"], rel=1e-3)
    for name, gradient in exact_gradients.items():
        assert found[name].dtype == np.float32
        assert relative_error(found[name], gradient) < 0.1, name
        assert relative_error(found_on_two[name], found[name]) < 0.02, name


def test_bfloat16_trains_float32_masters_and_publishes_bfloat16(on_ranks, tmp_path):
    folder = tmp_path / "model"
    [(masters, handle)] = on_ranks(
        1, ranks.train_and_publish, [random_batch()], str(folder), precision="bfloat16"
    )
    assert {values.dtype for values in masters.values()} == {np.dtype(np.float32)}
    published = dict(read_weights(handle))
    exported = AutoModelForCausalLM.from_pretrained(folder)
    assert exported.dtype == torch.bfloat16
    for name, parameter in exported.named_parameters():
        rounded = torch.from_numpy(masters[name]).bfloat16()
        assert torch.equal(published[name], rounded)
        assert torch.equal(parameter, rounded)


def test_a_rank_that_waits_in_vain_names_the_rendezvous(model_folder, tmp_path):
    """In a process of its own: one that failed to meet the others counts its groups differently."""
    port = ranks.free_port()
    with rank_process("forkserver") as alone, pytest.raises(ClusterError) as error:
        alone.submit(
            ranks.make_worker,
            model_folder,
            tmp_path / "weights",
            num_ranks=2,
            port=port,
            collective_timeout_seconds=1,
        ).result(timeout=120)
    assert re.search(rf"rank 0 of 2 did not meet .*:{port} within 1 s", str(error.value))


def test_critic_and_reference_on_two_ranks_do_what_they_do_on_one(on_ranks, model_folder):
    batches = [random_batch(seed=seed, num_samples=13) for seed in range(3)]
    arguments = (batches, ranks.ACTOR_CRITIC, model_folder)
    critic = CriticConfig(clip=0.2)
    [(reports, policy, values)] = on_ranks(1, ranks.train_roles, *arguments, critic=critic)
    for found in on_ranks(2, ranks.train_roles, *arguments, critic=critic):
        for mine, theirs in zip(found[0], reports, strict=True):
            expected = pytest.approx(ranks.of_training(theirs), rel=1e-3, abs=1e-4)
            assert ranks.of_training(mine) == expected
        assert_same(found[1], policy, 1e-3)
        assert_same(found[2], values, 1e-3)
