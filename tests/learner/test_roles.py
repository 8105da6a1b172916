"""Critic, reference policy and several updates a step, on one rank and on two."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from paceline.configs.errors import BatchError, CheckpointError
from paceline.configs.schema.algorithm_parts import CriticConfig
from paceline.configs.vocabulary import TrainBatch
from paceline.controller.wiring.algorithms import imitation, preferences
from paceline.learner.objective.advantages import GeneralizedAdvantage, Outcome, TeacherGap
from paceline.learner.objective.losses.corrections import SecondMoment
from paceline.learner.objective.losses.policy import Clip, SequenceClip
from paceline.learner.objective.objective import Objective, ReferencePenalty
from tests.learner.conftest import continue_prompt, random_batch
from tests.learner.ranks import LOSS, OPTIMIZER, gradients, make_worker, weights
from tests.learner.test_worker import assert_same

PPO = Objective(GeneralizedAdvantage(normalize=False), Clip(0.2, 0.28), "token_mean", 64)
SEPARATE = CriticConfig(backbone="separate", clip=None, optimizer=OPTIMIZER)
SHARED = CriticConfig(backbone="shared", clip=None)


@pytest.fixture
def new_worker(model_folder, tmp_path):
    return partial(make_worker, model_folder, tmp_path / "weights")


def steps(worker, batches, algorithm):
    reports = []
    for step, batch in enumerate(batches):
        report = worker.forward_backward(batch, algorithm)
        reports.append(report.metrics | worker.optimizer_step(OPTIMIZER, step, 100))
    return reports


def critic_weights(worker):
    model = worker._models.value_model.parts[0]
    return {n: p.detach().clone().numpy() for n, p in model.trained_parameters()}


def test_a_fresh_critic_expects_nothing_so_advantages_are_outcomes(new_worker):
    batch = random_batch(num_samples=6)
    _, expected = gradients(new_worker(), batch)
    report, found = gradients(new_worker(critic=SEPARATE), batch, PPO)
    assert_same(found, expected)
    assert report.metrics["value_mean"] == 0.0
    rewards = np.concatenate([np.full(s.loss_mask.sum(), s.reward) for s in batch.samples])
    assert report.metrics["value_loss"] == pytest.approx((rewards**2).mean() / 2, rel=1e-5)


@pytest.mark.parametrize("critic", [SEPARATE, SHARED])
def test_a_critic_learns_what_to_expect(new_worker, critic):
    batch = random_batch(num_samples=6)
    reports = steps(new_worker(critic=critic), [batch] * 30, PPO)
    assert reports[-1]["value_loss"] < 0.5 * reports[0]["value_loss"]
    assert reports[-1]["explained_variance"] > 0.5


def test_values_are_of_the_state_before_the_token(new_worker):
    """They cannot see the token that they judge: other last tokens, same values."""
    worker = new_worker(critic=SEPARATE)
    batch = random_batch(num_samples=4)
    steps(worker, [batch], PPO)
    sample = batch.samples[0]
    other = sample.token_ids.copy()
    other[-1] = (other[-1] + 1) % 40
    one, two = worker._models.values([sample, replace(sample, token_ids=other)])
    np.testing.assert_allclose(one, two, atol=1e-6)
    assert np.abs(one).max() > 0


def test_a_shared_backbone_feels_the_value_loss_and_a_separate_one_does_not(new_worker):
    batch = random_batch(num_samples=6)
    _, plain = gradients(new_worker(), batch)
    worker = new_worker(critic=SHARED)
    # a head of zeros passes nothing on
    torch.nn.init.ones_(worker._models.policy.parts[0].value_head.weight)
    no_advantage = replace(PPO, policy_loss=Clip(0.2, 0.28))
    _, shared = gradients(worker, batch, no_advantage)
    assert any(np.abs(shared[name] - plain[name]).max() > 1e-3 for name in plain)


def test_a_warm_start_leaves_the_critic_alone(new_worker):
    worker = new_worker(critic=SEPARATE)
    before = critic_weights(worker)
    [report] = steps(worker, [random_batch()], imitation()[1])
    assert_same(critic_weights(worker), before)
    assert "critic_grad_norm" not in report


@pytest.mark.parametrize("critic", [SEPARATE, SHARED])
def test_policy_and_critic_resume_from_a_checkpoint(new_worker, tmp_path, critic):
    batches = [random_batch(seed=seed) for seed in range(3)]
    whole = new_worker(critic=critic)
    steps(whole, batches, PPO)
    first = new_worker(critic=critic)
    steps(first, batches[:2], PPO)
    folder = str(tmp_path / "checkpoint")
    first.save(folder)
    first.finish_save()
    second = new_worker(critic=critic)
    second.load(folder)
    steps(second, batches[2:], PPO)
    assert_same(weights(second), weights(whole), 1e-6)
    assert_same(critic_weights(second), critic_weights(whole), 1e-6)
    if critic is SEPARATE:
        new_worker().load(folder)  # what is not asked for is not missed
        alone = new_worker()
        alone.save(str(tmp_path / "without"))
        alone.finish_save()
        with pytest.raises(CheckpointError, match="of the critic.*another model or algorithm"):
            second.load(str(tmp_path / "without"))


def test_several_updates_are_steps_on_the_parts_with_advantages_of_the_whole(new_worker):
    batch = random_batch(num_samples=9)
    twice = new_worker()
    [report] = steps(twice, [batch], replace(LOSS, num_updates=2))
    by_hand = new_worker()
    num_groups = len(batch.group_ids)
    for groups in np.array_split(np.arange(num_groups), 2):
        part = [replace(s, group=s.group - groups[0]) for s in batch.samples if s.group in groups]
        ids = tuple(batch.group_ids[g] for g in groups)
        by_hand.forward_backward(TrainBatch(0, ids, tuple(part)), LOSS)
        by_hand.optimizer_step(OPTIMIZER, 0, 100)
    assert_same(weights(twice), weights(by_hand), 1e-6)
    assert {"loss", "ratio", "grad_norm", "learning_rate"} <= report.keys()


def test_a_later_update_is_relative_to_the_weights_at_the_start_of_the_step(new_worker):
    algorithm = replace(LOSS, num_updates=2, old_policy="recomputed")
    assert algorithm.passes == {"proximal"}
    worker = new_worker()
    batch = random_batch(num_samples=8)
    worker.forward_backward(batch, algorithm)
    proximal = np.concatenate(worker._models.logprobs(worker._models.policy, batch.samples, 1.0))
    np.testing.assert_allclose(worker._step._columns["proximal_logprobs"], proximal, atol=1e-5)
    worker.optimizer_step(OPTIMIZER, 0, 100)


def test_the_reference_is_frozen_and_the_policy_moves_away_from_it(new_worker, model_folder):
    worker = new_worker()
    worker.load_reference(model_folder)
    algorithm = replace(LOSS, reference=ReferencePenalty(0.0))
    reports = steps(worker, [random_batch(seed=seed) for seed in range(4)], algorithm)
    assert reports[0]["reference_kl"] == pytest.approx(0, abs=1e-6)
    assert reports[-1]["reference_kl"] > 1e-3


def test_a_penalty_keeps_the_policy_closer_to_its_reference(new_worker, model_folder):
    away = {}
    for coefficient in (0.0, 5.0):
        worker = new_worker()
        worker.load_reference(model_folder)
        algorithm = replace(LOSS, reference=ReferencePenalty(coefficient, "k2", "loss"))
        reports = steps(worker, [random_batch(seed=1)] * 8, algorithm)
        away[coefficient] = reports[-1]["reference_kl"]
    assert away[5.0] < 0.5 * away[0.0]


def test_an_offloaded_reference_says_the_same(new_worker, model_folder):
    found = []
    for offload in (False, True):
        worker = new_worker()
        worker.load_reference(model_folder, offload)
        found.append(worker._models.reference_logprobs(random_batch().samples, 1.0))
    for one, two in zip(*found, strict=True):
        np.testing.assert_array_equal(one, two)


def preference_batch(seed=0, num_pairs=4):
    generator = np.random.default_rng(seed)
    samples = []
    for group in range(num_pairs):
        prompt = generator.integers(2, 40, 4)
        for reward in (1.0, 0.0):
            drawn = continue_prompt(generator, prompt, generator.integers(2, 8), group)
            samples.append(replace(drawn, reward=reward, logprobs=np.zeros_like(drawn.logprobs)))
    return TrainBatch(0, tuple(range(num_pairs)), tuple(samples))


def test_preferences_have_the_gradient_of_the_dpo_loss(new_worker, model_folder):
    """Against the loss written down directly, sums of log-probabilities and all."""
    batch, beta = preference_batch(), 0.5
    worker = new_worker(tokens_per_microbatch=24)
    worker.load_reference(model_folder)
    # away from the reference, where all pairs would pull alike
    steps(worker, [random_batch(seed=3)], LOSS)
    reference = worker._models.reference_logprobs(batch.samples, 1.0)
    report, found = gradients(worker, batch, preferences(beta, 64))

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="eager")
    model.load_state_dict({n: torch.tensor(w) for n, w in weights(worker).items()}, strict=False)
    sums = []
    for sample, ref in zip(batch.samples, reference, strict=True):
        tokens = torch.from_numpy(sample.token_ids).long()
        logprobs = model(tokens[None]).logits[0, :-1].log_softmax(-1)
        chosen = logprobs.gather(1, tokens[1:, None])[:, 0][sample.loss_mask[1:]]
        sums.append(chosen.sum() - float(ref.sum()))
    margins = beta * torch.stack([sums[i] - sums[i + 1] for i in range(0, len(sums), 2)])
    loss = -torch.nn.functional.logsigmoid(margins).mean()
    loss.backward()
    assert report.metrics["preference_loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = {n: p.grad.numpy() for n, p in model.named_parameters()}
    assert_same(found, expected, 1e-5)


def test_training_on_preferences_widens_the_margin(new_worker, model_folder):
    worker = new_worker()
    worker.load_reference(model_folder)
    reports = steps(worker, [preference_batch()] * 10, preferences(0.1, 64))
    assert reports[0]["preference_loss"] == pytest.approx(np.log(2))
    assert reports[-1]["preference_accuracy"] == 1.0
    assert reports[-1]["preference_margin"] > reports[1]["preference_margin"]


def test_gspo_and_m2po_do_not_depend_on_how_a_batch_is_split(new_worker):
    batch = random_batch(num_samples=15)
    own = new_worker().logprobs(batch.samples)
    generator = np.random.default_rng(0)
    # near the current policy, so that some tokens are kept and some are not
    samples = tuple(
        replace(s, logprobs=(o + generator.normal(0, 0.2, len(o))).astype(np.float32))
        for s, o in zip(batch.samples, own, strict=True)
    )
    batch = replace(batch, samples=samples)
    algorithm = Objective(
        Outcome(), SequenceClip(0.3, 0.3), "sequence_mean", 64, second_moment=SecondMoment(0.01)
    )
    whole_report, whole = gradients(new_worker(tokens_per_microbatch=4096), batch, algorithm)
    assert 0 < whole_report.metrics["second_moment_masked"] < 1
    for capacity in (24, 64):
        report, split = gradients(new_worker(tokens_per_microbatch=capacity), batch, algorithm)
        for name, values in whole.items():
            np.testing.assert_allclose(split[name], values, atol=1e-6, rtol=0)
        assert report.metrics["loss"] == pytest.approx(whole_report.metrics["loss"], abs=1e-6)


@pytest.mark.parametrize(
    ("algorithm", "where"),
    [
        (replace(LOSS, advantage=TeacherGap()), "a `teacher`"),
        (replace(LOSS, reference=ReferencePenalty(0.1)), "`algorithm.reference`"),
        (PPO, "`algorithm.critic`"),
    ],
)
def test_what_an_algorithm_needs_and_there_is_not_is_said(new_worker, algorithm, where):
    with pytest.raises(BatchError, match=f"there is none: configure {where}"):
        new_worker().forward_backward(random_batch(), algorithm)
