"""Mixtures of experts: trained on packed rows and FSDP ranks as transformers computes them."""

from __future__ import annotations

import itertools
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from paceline.configs.errors import BatchError, ConfigError, ModelError
from paceline.configs.limits.parallel_limits import require_divisible
from paceline.configs.load import load_config
from paceline.configs.schema import RunConfig
from paceline.configs.schema.learner import LearnerConfig
from paceline.configs.vocabulary import NOT_ROUTED
from paceline.controller.wiring.algorithms import imitation
from paceline.learner.model.experts import (
    parameters_per_token,
    require_whole_experts,
    router_metrics,
)
from paceline.learner.model.model import load_policy, write_initial_model
from paceline.weights_sync.shared_memory import read_weights
from tests.learner import ranks
from tests.learner.conftest import (
    VOCAB_SIZE,
    model_config,
    random_batch,
    sequences_of,
    with_completion,
    with_samples,
)
from tests.learner.test_worker import assert_same

EXPERTS = {
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}


@pytest.fixture(scope="module")
def moe_folder(tmp_path_factory):
    """A Qwen3-MoE of 2 layers, both of experts."""
    folder = str(tmp_path_factory.mktemp("moe"))
    return write_initial_model(moe_config(), VOCAB_SIZE, 1, seed=0, folder=folder)


def moe_config(**settings):
    return model_config("qwen3_moe", **EXPERTS | settings)


@pytest.fixture
def moe_on_ranks(on_ranks, moe_folder):
    def run(*arguments, **settings):
        return on_ranks(*arguments, **{"model_folder": moe_folder, **settings})

    return run


def transformers_gradients(folder, batch):
    """Those of the mean log-probability loss, a sample at a time, by an expert at a time."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager"
    )
    total = torch.zeros(())
    for sequence in sequences_of(batch):
        total = total - completion_logprobs(model, sequence, batch.temperature).sum()
    (total / batch.num_trained_tokens).backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def completion_logprobs(model, sequence, temperature=1.0):
    tokens = torch.from_numpy(sequence.token_ids).long()
    logprobs = (model(tokens[None]).logits[0, :-1] / temperature).log_softmax(-1)
    chosen = logprobs.gather(1, tokens[1:, None])[:, 0]
    return chosen[sequence.num_prompt - 1 :]


@pytest.mark.parametrize(
    "settings",
    [{}, {"norm_topk_prob": False, "num_experts_per_tok": 1}, {"decoder_sparse_step": 2}],
    ids=str,
)
def test_every_parameters_gradient_is_that_of_transformers_own_experts(
    on_ranks, tmp_path, settings
):
    folder = str(tmp_path / "model")
    write_initial_model(moe_config(**settings), VOCAB_SIZE, 1, seed=0, folder=folder)
    batch = random_batch(num_samples=6, temperature=0.8)
    [(_, found)] = on_ranks(1, ranks.gradients, batch, imitation()[1], model_folder=folder)
    assert_same(found, transformers_gradients(folder, batch), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": "layers"}], ids=str)
def test_every_parameters_gradient_on_two_ranks_equals_that_of_one_process(moe_on_ranks, settings):
    batch = random_batch(num_samples=15, temperature=0.9)
    [(report, expected)] = moe_on_ranks(1, ranks.gradients, batch)
    for sharded_report, found in moe_on_ranks(2, ranks.gradients, batch, **settings):
        for name in ("loss", "entropy", "router_load_max", "router_entropy"):
            assert sharded_report.metrics[name] == pytest.approx(report.metrics[name], rel=1e-5)
        assert_same(found, expected, 1e-5)


@pytest.mark.slow
def test_experts_that_no_token_chose_have_gradients_of_zero_and_hang_nobody(moe_on_ranks):
    """One trained token on two ranks: most experts, and all of one rank, are idle."""
    batch = random_batch(num_samples=1, longest=2)
    [(_, expected)] = moe_on_ranks(1, ranks.gradients, batch)
    assert any((g == 0).all(axis=(1, 2)).any() for n, g in expected.items() if "experts" in n)
    for _, found in moe_on_ranks(2, ranks.gradients, batch):
        assert_same(found, expected, 1e-5)


@pytest.mark.slow
def test_bfloat16_is_near_float32_and_the_same_on_two_ranks(moe_on_ranks):
    batch = random_batch()
    [(exact, _)] = moe_on_ranks(1, ranks.gradients, batch)
    [(one, found)] = moe_on_ranks(1, ranks.gradients, batch, precision="bfloat16")
    [(two, found_on_two), _] = moe_on_ranks(2, ranks.gradients, batch, precision="bfloat16")
    assert one.metrics["loss"] == pytest.approx(exact.metrics["loss"], rel=0.05)
    assert two.metrics["entropy"] == pytest.approx(one.metrics["entropy"], rel=1e-2)
    for name, gradient in found.items():
        assert gradient.dtype == np.float32
        error = np.linalg.norm(found_on_two[name] - gradient) / np.linalg.norm(gradient)
        assert error < 0.05, name


@pytest.mark.parametrize(
    "settings",
    [
        {"num_ranks": 2, "parallel": {"tensor": 2}},
        {"num_ranks": 2, "parallel": {"pipeline": 2}},
        {"num_ranks": 2, "parallel": {"sequence": 2}},
        {"engine": "deepspeed"},
    ],
    ids=str,
)
def test_experts_are_refused_where_nobody_divides_them(settings):
    learner = LearnerConfig.model_validate(settings)
    with pytest.raises(ModelError, match="qwen3_moe has experts"):
        require_whole_experts(AutoConfig.for_model("qwen3_moe"), learner)
    require_whole_experts(AutoConfig.for_model("qwen3"), learner)
    values = load_config("quickstart").model_dump()
    values["model"]["architecture"] = {"model_type": "qwen3_moe", "num_experts": 4}
    values["learner"] |= settings
    with pytest.raises(ConfigError, match="has experts"):
        require_divisible(RunConfig.model_validate(values))


def test_a_token_costs_the_parameters_of_the_experts_it_is_sent_to(moe_folder):
    policy = load_policy(moe_folder)
    parameters = dict(policy.causal_lm.named_parameters())
    of_experts = sum(p.numel() for name, p in parameters.items() if "experts" in name)
    idle = of_experts // 2  # two of four
    total = sum(p.numel() for p in parameters.values())
    assert parameters_per_token(policy.causal_lm) == total - idle


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_what_is_published_and_exported_has_the_names_of_checkpoints(
    moe_on_ranks, moe_folder, tmp_path, num_ranks
):
    """Three ranks hold four experts unevenly, and a router's rows too."""
    folder = tmp_path / "model"
    program = (ranks.train_and_publish, [random_batch()], str(folder))
    (weights, handle), *_ = moe_on_ranks(num_ranks, *program)
    published = {name: tensor.clone() for name, tensor in read_weights(handle)}
    with safe_open(f"{moe_folder}/model.safetensors", "pt") as initial:
        assert published.keys() == set(initial.keys())
    with safe_open(folder / "model.safetensors", "pt") as exported:
        assert published.keys() == set(exported.keys())
        assert all(torch.equal(published[name], exported.get_tensor(name)) for name in published)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert_same({n: p.detach().numpy() for n, p in loaded.named_parameters()}, weights)


def counted_by_hand(folder, batch):
    """How often each expert is chosen where a trained token is predicted: [layers, experts]."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    config = model.config
    counts = np.zeros((config.num_hidden_layers, config.num_experts), dtype=np.int64)
    for sequence in sequences_of(batch):
        output = model(torch.from_numpy(sequence.token_ids).long()[None], output_router_logits=True)
        predictors = np.arange(sequence.num_prompt, len(sequence.token_ids)) - 1
        for layer, logits in enumerate(output.router_logits):
            chosen = logits.topk(config.num_experts_per_tok).indices[predictors]
            counts[layer] += np.bincount(chosen.flatten().numpy(), minlength=config.num_experts)
    return counts


def test_router_metrics_are_those_of_counts_by_hand():
    counts = np.array([[4, 4, 4, 4], [16, 0, 0, 0], [8, 8, 0, 0]])
    assert router_metrics(counts) == pytest.approx(
        {
            "router_load_max": (1 + 4 + 2) / 3,
            "router_entropy": (np.log(4) + 0 + np.log(2)) / 3,
            "router_dead_experts": 5 / 12,
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_step_reports_the_load_of_every_trained_token_once(moe_on_ranks, moe_folder, num_ranks):
    """Also where layers are recomputed, and where a rank looks at log-probabilities in between."""
    batch = random_batch(num_samples=15)
    expected = router_metrics(counted_by_hand(moe_folder, batch))
    found = moe_on_ranks(
        num_ranks, ranks.look_and_train, batch, 2, activation_checkpointing="layers"
    )
    for first, second in found:
        assert {name: first[name] for name in expected} == pytest.approx(expected)
        assert second["router_entropy"] != first["router_entropy"]


def test_a_model_without_experts_reports_no_router(on_ranks):
    [(report, _)] = on_ranks(1, ranks.gradients, random_batch())
    assert not any(name.startswith("router") for name in report.metrics)


def own_routing(folder, sequence):
    """The experts that transformers' routers choose of a sample: int16 [P + C, layers, K]."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokens = torch.from_numpy(sequence.token_ids).long()[None]
    logits = model(tokens, output_router_logits=True).router_logits
    chosen = [layer.topk(model.config.num_experts_per_tok).indices for layer in logits]
    return torch.stack(chosen, dim=1).numpy().astype(np.int16)


def routed(batch, of_sequence):
    pairs = zip(batch.samples, sequences_of(batch), strict=True)
    return with_samples(
        batch, [with_completion(s, routed_experts=of_sequence(q)) for s, q in pairs]
    )


def test_routers_that_are_given_their_own_choice_change_nothing(moe_on_ranks, moe_folder):
    batch = random_batch(num_samples=8)
    [(report, expected)] = moe_on_ranks(1, ranks.gradients, batch)
    given = routed(batch, partial(own_routing, moe_folder))
    [(again, found)] = moe_on_ranks(1, ranks.gradients, given)
    assert again.metrics == pytest.approx(report.metrics, rel=1e-5, abs=1e-6)
    assert_same(found, expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("norm", [True, False])
def test_given_experts_are_taken_with_the_routers_own_weights_and_gradients(
    on_ranks, tmp_path, num_ranks, norm
):
    """Against transformers with its routers' top-k replaced, a sample at a time: also where a
    prompt is shared, where siblings' prompts went to different experts, where nothing is known."""
    folder = str(tmp_path / "model")
    write_initial_model(moe_config(norm_topk_prob=norm), VOCAB_SIZE, 1, seed=0, folder=folder)
    generator = np.random.default_rng(3)
    batch = random_batch(num_samples=10)
    of_prompt = {}

    def random_routing(sequence):
        length = len(sequence.token_ids)
        chosen = generator.permuted(np.tile(np.arange(4), (length, 2, 1)), axis=-1)[..., :2]
        chosen[generator.random(length) < 0.2] = NOT_ROUTED
        start = sequence.num_prompt
        if generator.random() < 0.7:
            chosen[:start] = of_prompt.setdefault(sequence.prompt, chosen[:start])
        return None if generator.random() < 0.2 else chosen.astype(np.int16)

    given = routed(batch, random_routing)
    expected = replayed_gradients(folder, given)
    program = (ranks.gradients, given, imitation()[1])
    settings = {"model_folder": folder, "activation_checkpointing": "layers"}
    for _, found in on_ranks(num_ranks, *program, **settings):
        assert_same(found, expected, 1e-5)


def replayed_gradients(folder, batch):
    given = None
    own_topk = torch.topk

    def topk(probabilities, count, dim):
        """Called by the routers, layer by layer."""
        values, indices = own_topk(probabilities, count, dim=dim)
        if given is None:
            return values, indices
        chosen = torch.from_numpy(given[:, next(layers)]).long()
        chosen = torch.where(chosen == NOT_ROUTED, indices, chosen)
        return probabilities.gather(1, chosen), chosen

    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager"
    )
    total = torch.zeros(())
    with mock.patch.object(torch, "topk", topk):
        for sequence in sequences_of(batch):
            given, layers = sequence.routed_experts, itertools.count()
            total = total - completion_logprobs(model, sequence).sum()
    (total / batch.num_trained_tokens).backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def test_routing_of_another_model_is_refused(moe_folder, tmp_path):
    worker = ranks.make_worker(moe_folder, tmp_path / "weights")
    batch = routed(random_batch(), lambda s: np.zeros((len(s.token_ids), 2, 3), np.int16))
    with pytest.raises(BatchError, match="2 layers, 3 a token"):
        worker.logprobs(batch.groups)
