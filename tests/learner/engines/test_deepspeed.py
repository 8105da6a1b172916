"""DeepSpeed's ZeRO: its bfloat16, its optimiser's settings, its silence. Every law:
`test_conformance.py`."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from paceline.configs.schema.learner import OptimizerConfig
from paceline.learner.checkpoints.shards import boxes
from paceline.weights_sync.shared_memory import read_weights
from tests.learner import ranks
from tests.learner.conftest import REPOSITORY, random_batch, with_logprobs
from tests.learner.engines.comparisons import assert_same_metrics, relative_error
from tests.learner.engines.layouts import FIRST, STEPS, Run, refused_step, zero
from tests.learner.test_worker import assert_same

pytestmark = pytest.mark.slow

BFLOAT16 = {"precision": "bfloat16"}
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


def train_with_everything(worker, batches):
    found = []
    for step, batch in enumerate(batches):
        report = worker.forward_backward(batch, ranks.LOSS)
        found.append(report.metrics | worker.optimizer_step(EVERYTHING, step, 6))
    return found, ranks.weights(worker)


def use_everything(worker, batch, folder):
    """What `test_worker.py` asks of a worker, on one."""
    with pytest.raises(AssertionError, match="needs a forward_backward"):
        worker.optimizer_step(ranks.OPTIMIZER, 0, 10)
    own = worker.logprobs(batch.groups)
    fresh = with_logprobs(batch, own)
    first = worker.forward_backward(fresh, ranks.LOSS).metrics
    worker._drop_gradients()
    ranks.train(worker, [fresh] * 3)
    after = worker.logprobs(batch.groups)
    gain = sum(
        sample.reward * float((new - old).sum())
        for sample, new, old in zip(batch.samples, after, own, strict=True)
    )
    handle = worker.publish(3)
    worker.export(folder)
    return first, gain, worker.version, after, ranks.weights(worker), handle


@pytest.mark.parametrize(("stage", "offloads"), [(1, True), (2, False), (3, False), (3, True)])
def test_steps_with_every_setting_of_the_optimizer_equal_those_of_one_process(
    one_process, on_layout, stage, offloads
):
    program = (train_with_everything, [random_batch(seed=seed) for seed in range(3)])
    expected_metrics, expected = one_process(*program)
    assert all(metrics["grad_norm"] > 2 * EVERYTHING.max_grad_norm for metrics in expected_metrics)
    found = on_layout(zero(stage, offload_optimizer=offloads), *program)
    assert found[0][0] == found[1][0]
    assert_same_metrics([metrics for metrics, _ in found], expected_metrics, rel=1e-4, abs=1e-5)
    assert_same(ranks.merged(weights for _, weights in found), expected, 1e-4)


def test_a_checkpoint_resumes_under_another_stage_and_number_of_ranks(
    one_process, on_layout, tmp_path
):
    """Of which one divides no tensor evenly."""
    folder = str(tmp_path / "checkpoint")
    _, expected = one_process(ranks.train, STEPS)
    on_layout(zero(2, offload_optimizer=True), ranks.train_and_save, STEPS[:2], folder)
    resuming = zero(3, num_ranks=3, offload_optimizer=True)
    for version, (_, found) in on_layout(resuming, ranks.load_and_train, folder, STEPS[2:]):
        assert version == 2
        assert_same(found, expected, 1e-3)


def in_bfloat16(worker, batch, folder):
    """Everything in which precision matters, from the first weights to those that are saved."""
    state = worker._models.policy.state()["model"]
    dtypes, initial = {tensor.dtype for tensor in state.values()}, ranks.weights(worker)
    gradients = ranks.gradients(worker, batch)[1]
    _, trained = ranks.train(worker, STEPS[:2])
    handle = worker.publish(2)
    worker.export(f"{folder}/model")
    ranks.save_whole(worker, f"{folder}/checkpoint")
    _, after = ranks.train(worker, STEPS[2:], start=2)
    worker.load(f"{folder}/checkpoint")
    refused = refused_step(worker)
    _, again = ranks.train(worker, STEPS[2:], start=2)
    own = {"dtypes": dtypes, "initial": initial, "gradients": gradients, "handle": handle}
    return refused | own | {"trained": trained, "after": after, "again": again}


@pytest.fixture(scope="module", params=[1, 2, 3])
def bfloat16_run(request, on_layout, tmp_path_factory):
    """What the ranks of a stage did in bfloat16."""
    folder = str(tmp_path_factory.mktemp("bfloat16"))
    return Run(folder, on_layout(zero(request.param), in_bfloat16, FIRST, folder, **BFLOAT16))


def test_bfloat16_starts_from_unrounded_masters_and_computes_what_fsdp_does(
    bfloat16_run, one_process
):
    assert bfloat16_run["dtypes"] == [{torch.float32}] * 2
    assert_same(bfloat16_run.tensors("initial"), one_process(ranks.weights))
    _, expected = one_process(ranks.gradients, FIRST, **BFLOAT16)
    for name, gradient in bfloat16_run.tensors("gradients").items():
        assert relative_error(gradient, expected[name]) < 0.02, name


def test_a_bfloat16_gradient_that_is_not_finite_changes_nothing(bfloat16_run):
    assert all("gradient norm of step 0 is not finite" in said for said in bfloat16_run["refusal"])
    assert_same(bfloat16_run.tensors("unchanged"), bfloat16_run.tensors("trained"))


def test_bfloat16_weights_leave_as_the_rounded_masters(bfloat16_run):
    masters, handle = bfloat16_run.tensors("trained"), bfloat16_run["handle"][0]
    published = dict(read_weights(handle))
    exported = AutoModelForCausalLM.from_pretrained(f"{bfloat16_run.folder}/model")
    assert published.keys() == masters.keys() == dict(exported.named_parameters()).keys()
    for name, parameter in exported.named_parameters():
        rounded = torch.from_numpy(masters[name]).bfloat16()
        assert torch.equal(published[name], rounded)
        assert torch.equal(parameter, rounded)


def test_a_bfloat16_checkpoint_keeps_what_bfloat16_cannot_hold(bfloat16_run):
    """Nor does a step that was refused after loading leave anything."""
    assert_same(bfloat16_run.tensors("again"), bfloat16_run.tensors("after"))


def test_a_worker_does_what_one_without_deepspeed_does(one_process, on_layout, tmp_path):
    """On one rank."""
    program = (use_everything, random_batch(), str(tmp_path / "model"))
    expected, _, _, expected_logprobs, _, _ = one_process(*program)
    [(first, gain, version, logprobs, masters, handle)] = on_layout(zero(2, 1), *program)
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
    paths = os.pathsep.join([REPOSITORY, os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": paths, "TORCH_EXTENSIONS_DIR": str(extensions)}
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
