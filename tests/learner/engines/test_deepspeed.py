"""DeepSpeed's ZeRO, whatever its stage, computes, publishes, saves and refuses what one process
does."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from paceline.configs.errors import NonFiniteError
from paceline.configs.schema.algorithm_parts import CriticConfig
from paceline.configs.schema.learner import OptimizerConfig
from paceline.learner.checkpoints.shards import boxes
from paceline.weights_sync.shared_memory import read_weights
from tests.learner import ranks
from tests.learner.conftest import REPOSITORY, RankProcesses, random_batch
from tests.learner.engines.test_ranks import relative_error
from tests.learner.test_worker import assert_same, spoil

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rank_processes():
    """Processes of their own: DeepSpeed leaves things behind in its process."""
    with RankProcesses() as processes:
        yield processes


EVERYTHING = OptimizerConfig(
    learning_rate=1e-2,
    warmup_steps=2,
    schedule="cosine",
    betas=(0.8, 0.9),
    epsilon=1e-6,
    weight_decay=0.1,
    max_grad_norm=0.05,
)
"""No setting at its default, and gradients that are always clipped."""


def zero(stage, **settings):
    return {"engine": "deepspeed", "deepspeed": {"stage": stage, **settings}}


# Programs of a rank


def gradients_of(engine):
    """Every parameter's gradient as the next step would see it; they are dropped."""
    from deepspeed.utils import safe_get_full_grad

    engine._finish_gradients()
    named = engine._policy.trained_parameters()
    found = {name: safe_get_full_grad(parameter).clone().numpy() for name, parameter in named}
    engine.drop_gradients()
    return found


def gradients(worker, *batches):
    """The last report and the gradients of all batches together."""
    for batch in batches:
        report = worker.forward_backward(batch, ranks.LOSS)
    return report, gradients_of(worker._models.policy)


def gradients_after_dropped_ones(worker, dropped, batch):
    worker.forward_backward(dropped, ranks.LOSS)
    worker._drop_gradients()
    assert not worker._models.policy.has_gradients()
    return gradients(worker, batch)


def train_with_everything(worker, batches):
    found = []
    for step, batch in enumerate(batches):
        report = worker.forward_backward(batch, ranks.LOSS)
        found.append(report.metrics | worker.optimizer_step(EVERYTHING, step, 6))
    return found, ranks.weights(worker)


def refused_step(worker, batches):
    """A step whose gradients are not finite, then healthy ones: whether it changed a weight."""
    engine = worker._models.policy
    before = ranks.weights(worker)
    healthy = engine.add_gradients

    def spoilt(microbatches, head, loss_of):
        healthy(microbatches, head, lambda *found: loss_of(*found) * float("nan"))

    with mock.patch.object(engine, "add_gradients", spoilt):
        worker.forward_backward(batches[0], ranks.LOSS)
    with pytest.raises(NonFiniteError, match="gradient norm of step 0 is not finite"):
        worker.optimizer_step(ranks.OPTIMIZER, 0, 100)
    unchanged = ranks.weights(worker)
    return before, unchanged, ranks.train(worker, batches)


def initial_weights(worker):
    return ranks.weights(worker), {t.dtype for t in worker._models.policy.state()["model"].values()}


def use_everything(worker, batch, folder):
    """What `test_worker.py` asks of a worker, on one."""
    with pytest.raises(AssertionError, match="needs a forward_backward"):
        worker.optimizer_step(ranks.OPTIMIZER, 0, 10)
    own = worker.logprobs(batch.samples)
    samples = zip(batch.samples, own, strict=True)
    fresh = replace(batch, samples=tuple(replace(s, logprobs=found) for s, found in samples))
    first = worker.forward_backward(fresh, ranks.LOSS).metrics
    worker._drop_gradients()
    ranks.train(worker, [fresh] * 3)
    after = worker.logprobs(batch.samples)
    gain = sum(
        sample.reward * float((new - old)[sample.loss_mask].sum())
        for sample, new, old in zip(batch.samples, after, own, strict=True)
    )
    handle = worker.publish(3)
    worker.export(folder)
    return first, gain, worker.version, after, ranks.weights(worker), handle


# Laws


@pytest.mark.parametrize(
    ("num_ranks", "stage", "offloads"),
    [(1, 2, False), (2, 1, False), (2, 2, False), (2, 3, False), (2, 1, True), (2, 3, True)],
)
def test_every_parameters_gradient_equals_that_of_one_process(on_ranks, num_ranks, stage, offloads):
    batch = random_batch(num_samples=15, temperature=0.9)
    [(report, expected)] = on_ranks(1, ranks.gradients, batch)
    settings = zero(stage, offload_optimizer=offloads)
    for found_report, found in on_ranks(num_ranks, gradients, batch, **settings):
        expected_metrics = pytest.approx(ranks.of_training(report.metrics), rel=1e-5, abs=1e-6)
        assert ranks.of_training(found_report.metrics) == expected_metrics
        assert_same(found, expected, 1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_add_up_until_the_step_and_dropped_ones_are_forgotten(on_ranks, stage):
    """In one batch's microbatches as over several batches."""
    first, second = random_batch(seed=1, num_samples=30), random_batch(seed=2)
    [(_, one)] = on_ranks(1, ranks.gradients, first)
    [(_, two)] = on_ranks(1, ranks.gradients, second)
    for _, both in on_ranks(2, gradients, first, second, **zero(stage)):
        assert_same(both, {name: one[name] + two[name] for name in one}, 1e-5)
    for _, found in on_ranks(2, gradients_after_dropped_ones, first, second, **zero(stage)):
        assert_same(found, two, 1e-5)


@pytest.mark.parametrize(
    ("stage", "checkpointing"), [(1, "layers"), (3, "layers"), (1, "chunks"), (2, "chunks")]
)
def test_activation_checkpointing_changes_no_gradient(on_ranks, stage, checkpointing):
    batch = random_batch(num_samples=15)
    [(_, expected)] = on_ranks(1, ranks.gradients, batch)
    settings = zero(stage) | {"activation_checkpointing": checkpointing, "tokens_per_chunk": 16}
    [(_, found), _] = on_ranks(2, gradients, batch, **settings)
    assert_same(found, expected, 1e-5)


@pytest.mark.parametrize(
    ("stage", "offloads"), [(1, False), (2, False), (3, False), (1, True), (2, True), (3, True)]
)
def test_steps_with_every_setting_of_the_optimizer_equal_those_of_one_process(
    on_ranks, stage, offloads
):
    batches = [random_batch(seed=seed) for seed in range(3)]
    [(expected_metrics, expected)] = on_ranks(1, train_with_everything, batches)
    assert all(metrics["grad_norm"] > 2 * EVERYTHING.max_grad_norm for metrics in expected_metrics)
    settings = zero(stage, offload_optimizer=offloads)
    (metrics, found), (others, _) = on_ranks(2, train_with_everything, batches, **settings)
    assert metrics == others
    for mine, wanted in zip(metrics, expected_metrics, strict=True):
        assert ranks.of_training(mine) == pytest.approx(
            ranks.of_training(wanted), rel=1e-4, abs=1e-5
        )
    assert_same(found, expected, 1e-4)


def test_twenty_losses_of_zero_3_follow_those_of_one_process(on_ranks):
    batches = [random_batch(seed=seed) for seed in range(20)]
    [(expected, _)] = on_ranks(1, ranks.train, batches)
    [(found, _), _] = on_ranks(2, ranks.train, batches, **zero(3))
    losses = [report.metrics["loss"] for report, _ in found]
    assert losses == pytest.approx([r.metrics["loss"] for r, _ in expected], rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gradient_that_is_not_finite_changes_nothing_and_leaves_nothing(
    on_ranks, stage, precision
):
    batches = [random_batch(seed=seed) for seed in range(2)]
    settings = zero(stage) | {"precision": precision}
    [(_, expected), _] = on_ranks(2, ranks.train, batches, **settings)
    for before, unchanged, (_, found) in on_ranks(2, refused_step, batches, **settings):
        assert_same(unchanged, before)
        assert_same(found, expected)


def test_a_bad_number_fails_both_ranks_together_and_neither_hangs(on_ranks):
    batch = spoil(spoil(random_batch(), "reward", -1.0), "logprobs", -1e4)
    found = on_ranks(2, ranks.failing_step, batch, **zero(2))
    assert found == [("NonFiniteError", len(batch.samples))] * 2


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_starts_from_unrounded_masters_and_computes_what_fsdp_does(on_ranks, stage):
    batch = random_batch(num_samples=15)
    settings = zero(stage) | {"precision": "bfloat16"}
    [(exact, _)] = on_ranks(1, initial_weights)
    for found, dtypes in on_ranks(2, initial_weights, **settings):
        assert dtypes == {torch.float32}
        assert_same(found, exact)
    [(_, expected)] = on_ranks(1, ranks.gradients, batch, precision="bfloat16")
    [(_, found), _] = on_ranks(2, gradients, batch, **settings)
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 0.02, name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_published_and_exported_weights_are_the_masters_in_the_models_precision(
    on_ranks, tmp_path, stage, precision
):
    folder = tmp_path / "model"
    settings = zero(stage) | {"precision": precision}
    (masters, handle), _ = on_ranks(
        2, ranks.train_and_publish, [random_batch()], str(folder), **settings
    )
    published = dict(read_weights(handle))
    exported = AutoModelForCausalLM.from_pretrained(folder)
    assert published.keys() == masters.keys() == dict(exported.named_parameters()).keys()
    for name, parameter in exported.named_parameters():
        rounded = torch.from_numpy(masters[name]).to(getattr(torch, precision))
        assert torch.equal(published[name], rounded)
        assert torch.equal(parameter, rounded)


@pytest.mark.parametrize("stage", [2, 3])
def test_looking_at_weights_between_gradient_and_update_leaves_nothing_stale(on_ranks, stage):
    batch = random_batch()
    [(_, _, expected)] = on_ranks(1, ranks.logprobs_between_steps, batch)
    for before, unchanged, after in on_ranks(2, ranks.logprobs_between_steps, batch, **zero(stage)):
        for index in range(len(batch.samples)):
            np.testing.assert_array_equal(before[index], unchanged[index])
            np.testing.assert_allclose(after[index], expected[index], atol=2e-4)


ONE, HYBRID = (1, {}), (4, {"parallel": {"replicate": 2}})


@pytest.mark.parametrize(
    ("saving", "loading"),
    [
        (HYBRID, (2, zero(3))),
        ((2, zero(3)), ONE),
        (ONE, (2, zero(1))),
        ((2, zero(1)), (1, zero(2))),
        ((2, zero(2, offload_optimizer=True)), (3, zero(3, offload_optimizer=True))),
        ((3, zero(3)), HYBRID),
    ],
)
def test_a_checkpoint_resumes_under_any_engine_stage_and_number_of_ranks(
    on_ranks, tmp_path, saving, loading
):
    batches = [random_batch(seed=seed) for seed in range(4)]
    folder = str(tmp_path / "checkpoint")
    [(_, expected)] = on_ranks(1, ranks.train, batches)
    on_ranks(saving[0], ranks.train_and_save, batches[:2], folder, **saving[1])
    resumed = on_ranks(loading[0], ranks.load_and_train, folder, batches[2:], **loading[1])
    for version, (_, found) in resumed:
        assert version == 2
        assert_same(found, expected, 1e-3)


def test_a_bfloat16_checkpoint_keeps_what_bfloat16_cannot_hold(on_ranks, tmp_path):
    batches = [random_batch(seed=seed) for seed in range(4)]
    folder = str(tmp_path / "checkpoint")
    settings = zero(3) | {"precision": "bfloat16"}
    [(_, expected), _] = on_ranks(2, ranks.train, batches, **settings)
    on_ranks(2, ranks.train_and_save, batches[:2], folder, **settings)
    for _, (_, found) in on_ranks(2, ranks.load_and_train, folder, batches[2:], **settings):
        assert_same(found, expected)


@pytest.mark.parametrize("backbone", ["separate", "shared"])
@pytest.mark.parametrize("stage", [2, 3])
def test_critic_and_reference_do_what_they_do_in_one_process(
    on_ranks, model_folder, stage, backbone
):
    batches = [random_batch(seed=seed, num_samples=13) for seed in range(3)]
    arguments = (batches, ranks.ACTOR_CRITIC, model_folder)
    critic = CriticConfig(clip=0.2, backbone=backbone)
    [(reports, policy, values)] = on_ranks(1, ranks.train_roles, *arguments, critic=critic)
    for found in on_ranks(2, ranks.train_roles, *arguments, critic=critic, **zero(stage)):
        for mine, theirs in zip(found[0], reports, strict=True):
            assert ranks.of_training(mine) == pytest.approx(
                ranks.of_training(theirs), rel=1e-3, abs=1e-4
            )
        assert_same(found[1], policy, 1e-3)
        assert_same(found[2], values, 1e-3)


def test_a_worker_does_what_one_without_deepspeed_does(on_ranks, tmp_path):
    batch = random_batch()
    folder = tmp_path / "model"
    arguments = (use_everything, batch, str(folder))
    [(expected, _, _, expected_logprobs, _, _)] = on_ranks(1, *arguments)
    [(first, gain, version, logprobs, masters, handle)] = on_ranks(1, *arguments, **zero(2))
    assert first == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert first["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert gain > 0
    assert version == 3
    for found, wanted in zip(logprobs, expected_logprobs, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-3)
    assert_same({name: tensor.numpy() for name, tensor in read_weights(handle)}, masters)


def test_it_compiles_nothing_and_says_nothing(model_folder, tmp_path):
    """In bfloat16 and stage 1, where DeepSpeed says most."""
    program = (
        "from tests.learner import ranks; from tests.learner.conftest import random_batch; "
        "worker = ranks.make_worker({!r}, {!r}, precision='bfloat16', engine='deepspeed', "
        "deepspeed={{'stage': 1}}); ranks.train(worker, [random_batch()]); worker.close()"
    ).format(model_folder, str(tmp_path / "weights"))
    extensions = tmp_path / "extensions"
    environment = {"PYTHONPATH": REPOSITORY, "TORCH_EXTENSIONS_DIR": str(extensions)}
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert not extensions.exists()


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_a_run_of_elements_is_cut_into_boxes_in_order(shape, data):
    whole = np.arange(np.prod(shape)).reshape(shape)
    start = data.draw(st.integers(0, whole.size))
    size = data.draw(st.integers(0, whole.size - start))
    cut = list(boxes(tuple(shape), start, size))
    assert [whole[box].size for box, _ in cut] == [count for _, count in cut]
    found = np.concatenate([np.zeros(0, int), *(whole[box].ravel() for box, _ in cut)])
    np.testing.assert_array_equal(found, np.arange(start, start + size))
