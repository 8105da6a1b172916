"""One rank: what a step computes, what it reports, what is written to disk, what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from paceline.configs.errors import BatchError, CheckpointError, ClusterError, NonFiniteError
from paceline.configs.vocabulary import TrainBatch
from paceline.controller.wiring.algorithms import imitation
from paceline.learner.model.model import write_initial_model
from paceline.weights_sync.shared_memory import read_weights
from tests.learner.conftest import VOCAB_SIZE, model_config, random_batch, random_sample
from tests.learner.ranks import (
    LOSS,
    OPTIMIZER,
    gradients,
    load_and_train,
    make_worker,
    train,
    train_and_save,
    weights,
)


@pytest.fixture
def new_worker(model_folder, tmp_path):
    return partial(make_worker, model_folder, tmp_path / "weights")


def assert_same(found, expected, tolerance=0.0):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        bound = tolerance * np.abs(values).max()
        np.testing.assert_allclose(found[name], values, atol=bound, rtol=0, err_msg=name)


def reference_logprobs(folder, sample, temperature):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokens = torch.from_numpy(sample.token_ids).long()
    logits = model(tokens[None]).logits[0, :-1] / temperature
    chosen = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    return model, chosen[torch.from_numpy(sample.loss_mask[1:])]


def test_loss_and_gradient_are_the_token_mean_of_the_whole_batch(new_worker, model_folder):
    batch = random_batch(num_samples=3, temperature=0.8)
    report, found = gradients(new_worker(), batch, imitation()[1])
    model = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="eager")
    total = torch.zeros(())
    for sample in batch.samples:
        tokens = torch.from_numpy(sample.token_ids).long()
        logprobs = (model(tokens[None]).logits[0, :-1] / 0.8).log_softmax(-1)
        chosen = logprobs.gather(1, tokens[1:, None])[:, 0]
        total = total - chosen[torch.from_numpy(sample.loss_mask[1:])].sum()
    mean = total / batch.num_trained_tokens
    mean.backward()
    assert report.metrics["loss"] == pytest.approx(mean.item(), rel=1e-6)
    assert_same(found, {n: p.grad.numpy() for n, p in model.named_parameters()}, 1e-5)


def test_how_a_batch_is_split_into_microbatches_changes_nothing(new_worker):
    batch = random_batch(num_samples=20)
    whole_report, whole_gradients = gradients(new_worker(tokens_per_microbatch=4096), batch)
    for capacity in (23, 64):
        report, split_gradients = gradients(new_worker(tokens_per_microbatch=capacity), batch)
        assert report.metrics == pytest.approx(whole_report.metrics, rel=1e-5)
        assert report.metrics["loss"] == pytest.approx(whole_report.metrics["loss"], abs=1e-6)
        for name, values in whole_gradients.items():
            np.testing.assert_allclose(split_gradients[name], values, atol=1e-6, rtol=0)


def test_the_order_of_samples_changes_nothing(new_worker):
    batch = random_batch(num_samples=10)
    worker = new_worker()
    _, forwards = gradients(worker, batch)
    _, backwards = gradients(worker, replace(batch, samples=batch.samples[::-1]))
    assert_same(backwards, forwards, 1e-5)


def test_gradients_of_two_batches_add_up_until_the_step(new_worker):
    worker = new_worker()
    first, second = random_batch(seed=1), random_batch(seed=2)
    (_, one), (_, two) = gradients(worker, first), gradients(worker, second)
    worker.forward_backward(first, LOSS)
    _, both = gradients(worker, second)
    assert_same(both, {name: one[name] + two[name] for name in one}, 1e-5)


def test_the_report_counts_tokens_and_carries_the_losses_metrics(new_worker):
    batch = random_batch()
    report = new_worker().forward_backward(batch, LOSS)
    assert report.version == 0
    assert report.num_tokens == sum(len(sample.token_ids) for sample in batch.samples)
    assert report.num_trained_tokens == batch.num_trained_tokens
    assert report.num_padding_tokens == 0
    assert set(report.metrics) == {
        "loss", "ratio", "ratio_max", "clip_fraction", "masked_fraction", "correction_weight",
        "entropy", "kl", "ess", "mismatch", "mismatch_max", "mismatch_fresh", "fresh_fraction",
        "rank_imbalance",
    }  # fmt: skip


def test_log_probabilities_are_those_of_the_model_at_the_sampling_temperature(
    new_worker, model_folder
):
    batch = random_batch(num_samples=4)
    for sample, found in zip(
        batch.samples, new_worker().logprobs(batch.samples, temperature=0.7), strict=True
    ):
        _, expected = reference_logprobs(model_folder, sample, 0.7)
        np.testing.assert_allclose(found[sample.loss_mask], expected.detach(), atol=1e-5)
        assert not found[~sample.loss_mask].any()


def test_trained_tokens_may_be_scattered_and_samples_may_have_none(new_worker, model_folder):
    """Several turns: what the environment said in between, or at the end, is read, not trained."""
    generator = np.random.default_rng(0)
    sample = random_sample(generator, 3, 9)
    mask = sample.loss_mask & (np.arange(12) % 3 == 0)
    scattered = replace(sample, loss_mask=mask)
    untrained = replace(sample, loss_mask=np.zeros(12, dtype=bool))
    worker = new_worker()
    found, nothing = worker.logprobs([scattered, untrained])
    _, expected = reference_logprobs(model_folder, scattered, 1.0)
    np.testing.assert_allclose(found[mask], expected.detach(), atol=1e-5)
    assert not nothing.any()
    report = worker.forward_backward(TrainBatch(0, (0,), (scattered,)), LOSS)
    assert report.num_trained_tokens == mask.sum() == 3
    with pytest.raises(BatchError, match="step 0: sample 1 of group 7 has no trained token"):
        worker.forward_backward(TrainBatch(0, (7,), (scattered, untrained)), LOSS)


def test_behaviour_of_the_current_weights_has_ratio_one_and_no_divergence(new_worker):
    worker = new_worker()
    batch = random_batch()
    own = worker.logprobs(batch.samples)
    samples = tuple(
        replace(sample, logprobs=found) for sample, found in zip(batch.samples, own, strict=True)
    )
    metrics = worker.forward_backward(replace(batch, samples=samples), LOSS).metrics
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["clip_fraction"] == 0.0
    assert metrics["mismatch_max"] < 1e-5


def test_training_on_one_batch_raises_the_reward_weighted_likelihood(new_worker):
    worker = new_worker()
    batch = random_batch()
    before = worker.logprobs(batch.samples)
    samples = tuple(
        replace(sample, logprobs=found) for sample, found in zip(batch.samples, before, strict=True)
    )
    train(worker, [replace(batch, samples=samples)] * 3)
    after = worker.logprobs(batch.samples)
    gain = sum(
        s.reward * float((a - b)[s.loss_mask].sum())
        for s, a, b in zip(batch.samples, after, before, strict=True)
    )
    assert gain > 0
    assert worker.version == 3


def test_greedy_mismatches_count_completion_tokens_that_are_not_the_argmax(
    new_worker, model_folder
):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    prompt = torch.tensor([[5, 9, 3]])
    tokens = model.generate(
        prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0
    )[0]
    greedy = tokens.numpy().astype(np.int32)
    wrong = greedy.copy()
    wrong[-1] = (wrong[-1] + 1) % VOCAB_SIZE
    worker = new_worker()
    assert worker.greedy_mismatches([(greedy, 3)], tolerance=1e-4) == 0
    assert worker.greedy_mismatches([(greedy, 3), (wrong, 3), (wrong, 3)], tolerance=1e-4) == 2
    assert worker.greedy_mismatches([(wrong, 3)], tolerance=1e4) == 0


def test_published_weights_are_the_current_ones_in_the_layouts_precision(new_worker):
    worker = new_worker()
    for version in (1, 2):
        _, expected = train(worker, [random_batch(seed=version)], start=version - 1)
        handle = worker.publish(version)
        assert handle.version == version
        assert_same({n: t.numpy() for n, t in read_weights(handle)}, expected)


def test_an_exported_folder_gives_the_same_logits_in_transformers(new_worker, tmp_path):
    worker = new_worker()
    batch = random_batch(num_samples=3)
    folder = tmp_path / "model"
    worker.export(str(folder))
    train(worker, [batch])
    worker.export(str(folder))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("model")] == ["model"]
    for sample, found in zip(batch.samples, worker.logprobs(batch.samples), strict=True):
        model, expected = reference_logprobs(folder, sample, 1.0)
        assert model.dtype == torch.float32
        np.testing.assert_allclose(found[sample.loss_mask], expected.detach(), atol=1e-5)


@pytest.mark.parametrize("num_steps_before", [0, 2])
def test_training_resumed_from_a_checkpoint_equals_training_on(
    new_worker, tmp_path, num_steps_before
):
    batches = [random_batch(seed=seed) for seed in range(4)]
    before, after = batches[:num_steps_before], batches[num_steps_before:]
    _, expected = train(new_worker(), batches)
    folder = str(tmp_path / "checkpoint")
    train_and_save(new_worker(), before, folder)
    version, (_, resumed) = load_and_train(new_worker(), folder, after)
    assert version == num_steps_before
    assert_same(resumed, expected)


def test_a_missing_or_foreign_checkpoint_is_refused(new_worker, tmp_path):
    with pytest.raises(CheckpointError, match="no complete learner checkpoint"):
        new_worker().load(str(tmp_path / "missing"))
    train_and_save(new_worker(), [], str(tmp_path / "checkpoint"))
    other = str(tmp_path / "other")
    write_initial_model(model_config(intermediate_size=96), VOCAB_SIZE, 1, 0, other)
    worker = make_worker(other, tmp_path / "weights")
    with pytest.raises(CheckpointError, match="belongs to another model"):
        worker.load(str(tmp_path / "checkpoint"))


def spoil(batch, name, value):
    """The batch with another reward, or another number at the last token, of its last sample."""
    last = batch.samples[-1]
    values = value
    if name != "reward":
        values = getattr(last, name).copy()
        values[-1] = value
    return replace(batch, samples=(*batch.samples[:-1], replace(last, **{name: values})))


@pytest.mark.parametrize(("name", "said"), [("reward", "reward"), ("logprobs", "log-probability")])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_non_finite_number_in_the_batch_is_named_before_any_weight_changes(
    new_worker, name, said, value
):
    worker = new_worker()
    before = weights(worker)
    batch = random_batch(num_samples=5)
    with pytest.raises(NonFiniteError, match=rf"step 0: sample \d of group \d has {said} -?[ni]"):
        worker.forward_backward(spoil(batch, name, value), LOSS)
    assert_same(weights(worker), before)


def test_a_non_finite_loss_is_named_and_its_gradients_are_dropped(new_worker):
    worker = new_worker()
    batch = random_batch(num_samples=5)
    _, expected = gradients(worker, batch)
    # a token the behaviour policy thought impossible: the ratio overflows float32
    unlikely = spoil(batch, "logprobs", -1e4)
    unlikely = spoil(unlikely, "reward", -1.0)
    with pytest.raises(NonFiniteError, match="loss of step 0 is inf"):
        worker.forward_backward(unlikely, LOSS)
    _, found = gradients(worker, batch)
    assert_same(found, expected)


def test_a_step_without_gradients_is_a_bug_of_the_caller(new_worker):
    with pytest.raises(AssertionError, match="needs a forward_backward"):
        new_worker().optimizer_step(OPTIMIZER, 0, 10)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_asking_for_a_gpu_that_is_not_there_is_refused(new_worker):
    with pytest.raises(ClusterError, match="gpus_per_rank is 1 but torch sees no GPU"):
        new_worker(gpus_per_rank=1)


@pytest.mark.parametrize("activation_checkpointing", ["none", "layers"])
def test_a_prompt_computed_once_for_its_samples_changes_no_gradient(
    new_worker, activation_checkpointing
):
    batch = random_batch(num_samples=16)
    settings = {"activation_checkpointing": activation_checkpointing}
    report, expected = gradients(new_worker(share_prompts=False, **settings), batch)
    shared_report, found = gradients(new_worker(**settings), batch)
    assert shared_report.metrics == pytest.approx(report.metrics, rel=1e-4, abs=1e-6)
    assert_same(found, expected, 1e-5)


@pytest.fixture
def determinism():
    """What a worker may set for its whole process, put back."""
    yield
    torch.use_deterministic_algorithms(False)


def test_with_deterministic_kernels_alone_two_runs_are_equal_to_the_bit(new_worker, determinism):
    batches = [random_batch(seed) for seed in range(3)]
    _, one = train(new_worker(deterministic=True), batches)
    assert torch.are_deterministic_algorithms_enabled()
    _, other = train(new_worker(deterministic=True), batches)
    assert_same(one, other)
