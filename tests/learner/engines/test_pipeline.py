"""A pipeline of two or more ranks computes, publishes, saves and refuses what one process does."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from paceline.configs.errors import ModelError
from paceline.configs.limits.pipeline_stages import stage_layers
from paceline.configs.schema.algorithm_parts import CriticConfig
from paceline.configs.vocabulary import TrainBatch
from paceline.learner.engines.parallel import stages
from paceline.learner.engines.parallel.stages import StageModel
from paceline.learner.model.model import load_policy, write_initial_model
from paceline.learner.objective.advantages import GeneralizedAdvantage
from paceline.learner.objective.losses.policy import Clip
from paceline.learner.objective.objective import Objective
from paceline.weights_sync.shared_memory import read_weights
from tests.learner import ranks
from tests.learner.conftest import VOCAB_SIZE, model_config, random_batch, random_sample
from tests.learner.test_worker import assert_same, spoil

EMBEDDING = "model.embed_tokens.weight"
PLAIN = {"parallel": {"pipeline": 2}}
INTERLEAVED = {"parallel": {"pipeline": 2, "schedule": "interleaved", "stages_per_rank": 2}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models of 4 layers whose embeddings are tied, and not."""
    return {is_tied: write_model(tmp_path_factory.mktemp("model"), is_tied) for is_tied in (0, 1)}


def write_model(folder, is_tied=True, **settings):
    config = model_config(tie_word_embeddings=bool(is_tied), num_hidden_layers=4, **settings)
    return write_initial_model(config, VOCAB_SIZE, 1, seed=0, folder=str(folder))


@pytest.fixture
def on_stages(on_ranks, folders):
    """`on_ranks` with a model of 4 layers, tied unless told otherwise."""

    def run(num_ranks, program, *arguments, is_tied=1, **settings):
        folder = folders[is_tied]
        return on_ranks(num_ranks, program, *arguments, model_folder=folder, **settings)

    return run


# what every rank does


def named_parameters(worker, role="policy"):
    for part in worker._models.trained()[role].parts:
        yield from part.trained_parameters()


def gradients(worker, batch, algorithm=ranks.LOSS, role="policy"):
    """Metrics, and gradients of the parameters here; a second share is added to the first."""
    worker.forward_backward(batch, algorithm)
    report = worker.forward_backward(batch, algorithm)
    found = {
        name: ranks.whole(parameter.grad) / 2
        for name, parameter in named_parameters(worker, role)
        if parameter.grad is not None
    }
    worker._drop_gradients()
    return report.metrics, found, worker.logprobs(batch.samples, batch.temperature)


def train(worker, batches, algorithm=ranks.LOSS, reference=None):
    """What is reported of every step, and all weights here after the last."""
    if reference is not None:
        worker.load_reference(reference)
    reports = []
    for step, batch in enumerate(batches, worker.version):
        report = worker.forward_backward(batch, algorithm)
        reports.append(report.metrics | worker.optimizer_step(ranks.OPTIMIZER, step, 100))
    found = {
        f"{role}.{name}": ranks.whole(parameter)
        for role in worker._models.trained()
        for name, parameter in named_parameters(worker, role)
    }
    return reports, found


def train_and_save(worker, batches, folder):
    train(worker, batches)
    worker.save(folder)


def load_and_train(worker, folder, batches):
    worker.load(folder)
    return train(worker, batches)


def publish_and_export(worker, batches, folder):
    _, after = train(worker, batches)
    handle = worker.publish(len(batches))
    worker.export(folder)
    return after, handle, [shard.name for shard in worker._models.policy.shards()]


def step_with_a_bad_gradient(worker, batch, stage):
    """The error's name, and whether no weight was written."""
    worker.forward_backward(batch, ranks.LOSS)
    before = {name: ranks.whole(p) for name, p in named_parameters(worker)}
    if worker._models.mesh.rank_in("pipeline") == stage:
        worker._models.policy.parts[0].decoder_layers[0].mlp.up_proj.weight.grad.fill_(float("nan"))
    try:
        worker.optimizer_step(ranks.OPTIMIZER, 0, 100)
    except Exception as error:
        after = {name: ranks.whole(p) for name, p in named_parameters(worker)}
        return type(error).__name__, all((before[n] == after[n]).all() for n in before)
    return None, False


def look_and_run_out_of_memory(worker, batch):
    """On the last microbatch: before it, other stages would wait to be heard."""
    microbatches = worker._models.share(batch.samples).microbatches
    left = iter(microbatches)

    def head(hidden, weight, targets):
        if next(left) is microbatches[-1]:
            raise MemoryError
        return (hidden[:, 0],)

    try:
        list(worker._models.policy.evaluate(microbatches, head))
    except MemoryError:
        return "out of memory"
    return "all sent"


# and what comes of it


def merged(found):
    """Parameters of all ranks by name; where two have the same, they are the same."""
    whole = {}
    for of_rank in found:
        for name, values in of_rank.items():
            np.testing.assert_array_equal(values, whole.setdefault(name, values), err_msg=name)
    return whole


def assert_same_gradients(found, expected):
    [(metrics, gradients_, logprobs)] = expected
    for mine, _, of_tokens in found:
        assert ranks.of_training(mine) == pytest.approx(
            ranks.of_training(metrics), rel=1e-5, abs=1e-6
        )
        for one, other in zip(of_tokens, logprobs, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
    assert_same(merged(theirs for _, theirs, _ in found), gradients_, 1e-5)


def assert_same_training(found, expected):
    [(reports, weights)] = expected
    for mine, _ in found:
        for one, other in zip(mine, reports, strict=True):
            assert ranks.of_training(one) == pytest.approx(
                ranks.of_training(other), rel=1e-3, abs=1e-4
            )
    # Adam divides by the gradient's magnitude, so rounding errors of tiny gradients become visible
    assert_same(merged(theirs for _, theirs in found), weights, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("is_tied", [0, 1])
@pytest.mark.parametrize("settings", [PLAIN, INTERLEAVED])
def test_every_gradient_metric_and_logprob_of_a_pipeline_is_that_of_one_process(
    on_stages, settings, is_tied
):
    batch = random_batch(num_samples=15, temperature=0.9)
    expected = on_stages(1, gradients, batch, is_tied=is_tied)
    found = on_stages(2, gradients, batch, is_tied=is_tied, **settings)
    assert_same_gradients(found, expected)
    first, last = (set(names) for _, names, _ in found)
    assert (first & last) == ({EMBEDDING} if is_tied else set())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "settings"),
    [
        (2, PLAIN | {"activation_checkpointing": True}),
        (2, INTERLEAVED | {"activation_checkpointing": "chunks", "tokens_per_chunk": 16}),
        (4, {"parallel": {"pipeline": 4}}),
        (4, PLAIN),
        (4, INTERLEAVED),
        (4, {"parallel": {"pipeline": 2, "replicate": 2}}),
        (4, {"parallel": {**PLAIN["parallel"], "tensor": 2}}),
        (4, {"parallel": {**INTERLEAVED["parallel"], "tensor": 2}}),
        (4, {"parallel": {**INTERLEAVED["parallel"], "sequence": 2}}),
        (8, {"parallel": {**PLAIN["parallel"], "tensor": 2}}),
    ],
)
def test_stages_that_are_divided_further_compute_the_same(on_stages, num_ranks, settings):
    """Checkpointed; on 4 ranks one stage each, or two that are sharded, held twice or divided over
    tensor or sequence ranks; on 8 sharded and divided."""
    batch = random_batch(num_samples=21)
    expected = on_stages(1, gradients, batch)
    assert_same_gradients(on_stages(num_ranks, gradients, batch, **settings), expected)


@pytest.mark.slow
@pytest.mark.parametrize("num_samples", [1, 3])
def test_stages_without_work_keep_step(on_stages, num_samples):
    """Fewer samples than a pipeline has ranks, and more than one round of them."""
    generator = np.random.default_rng(0)
    samples = tuple(random_sample(generator, 10, 40) for _ in range(num_samples))
    batch = TrainBatch(0, (0,), samples)
    expected = on_stages(1, gradients, batch)
    for settings in (PLAIN, INTERLEAVED):
        assert_same_gradients(on_stages(2, gradients, batch, **settings), expected)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [PLAIN, INTERLEAVED])
def test_many_microbatches_go_through_in_rounds(on_stages, settings):
    generator = np.random.default_rng(0)
    # more than half a row each: a microbatch of its own
    shapes = [(10, int(n)) for n in generator.integers(25, 50, 37)]
    batch = TrainBatch(0, (0,), tuple(random_sample(generator, *shape) for shape in shapes))
    expected = on_stages(1, gradients, batch)
    assert_same_gradients(on_stages(2, gradients, batch, **settings), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "settings", "is_tied"),
    [(2, PLAIN, 1), (2, PLAIN, 0), (2, INTERLEAVED, 1), (4, PLAIN, 1)],
)
def test_three_steps_of_a_pipeline_are_those_of_one_process(
    on_stages, num_ranks, settings, is_tied
):
    batches = [random_batch(seed=seed) for seed in range(3)]
    expected = on_stages(1, train, batches, is_tied=is_tied)
    found = on_stages(num_ranks, train, batches, is_tied=is_tied, **settings)
    assert_same_training(found, expected)
    assert len({tuple(report.items()) for mine, _ in found for report in mine}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["separate", "shared"])
@pytest.mark.parametrize("settings", [PLAIN, INTERLEAVED])
def test_critic_and_reference_in_a_pipeline_do_what_they_do_on_one_process(
    on_stages, folders, settings, backbone
):
    batches = [random_batch(seed=seed, num_samples=13) for seed in range(10, 13)]
    arguments = (batches, ranks.ACTOR_CRITIC, folders[1])
    critic = CriticConfig(backbone=backbone, clip=0.2)
    expected = on_stages(1, train, *arguments, critic=critic)
    assert_same_training(on_stages(2, train, *arguments, critic=critic, **settings), expected)


@pytest.mark.slow
def test_every_gradient_of_a_critic_in_a_pipeline_is_that_of_one_process(on_stages):
    batch = random_batch(num_samples=13)
    algorithm = Objective(GeneralizedAdvantage(), Clip(0.2, 0.28), "token_mean", max_tokens=64)
    critic = CriticConfig(backbone="separate", clip=0.2)
    expected = on_stages(1, gradients, batch, algorithm, "critic", critic=critic)
    found = on_stages(2, gradients, batch, algorithm, "critic", critic=critic, **PLAIN)
    assert_same_gradients(found, expected)


@pytest.mark.slow
def test_bfloat16_in_a_pipeline_is_the_arithmetic_of_one_process(on_stages):
    batch = random_batch()
    [(metrics, expected, _)] = on_stages(1, gradients, batch, precision="bfloat16")
    found = on_stages(2, gradients, batch, precision="bfloat16", **PLAIN)
    assert found[0][0]["entropy"] == pytest.approx(metrics["entropy"], rel=1e-3)
    for name, gradient in merged(theirs for _, theirs, _ in found).items():
        error = np.linalg.norm(gradient - expected[name]) / np.linalg.norm(expected[name])
        assert gradient.dtype == np.float32
        assert error < 0.02, name


@pytest.mark.slow
@pytest.mark.parametrize("is_tied", [0, 1])
@pytest.mark.parametrize(("num_ranks", "settings"), [(2, INTERLEAVED), (4, PLAIN)])
def test_a_pipeline_publishes_and_exports_every_weight_once(
    on_stages, tmp_path, num_ranks, settings, is_tied
):
    folder = tmp_path / "exported"
    arguments = ([random_batch()], str(folder))
    found = on_stages(num_ranks, publish_and_export, *arguments, is_tied=is_tied, **settings)
    expected = merged(weights for weights, _, _ in found)
    [handle] = [handle for _, handle, _ in found if handle is not None]
    published = {f"policy.{name}": t.numpy() for name, t in read_weights(handle)}
    assert_same(published, expected)
    exported = AutoModelForCausalLM.from_pretrained(folder).named_parameters()
    assert_same({f"policy.{n}": p.detach().numpy() for n, p in exported}, expected)
    said = [name for _, _, names in found for name in names]
    assert said.count(EMBEDDING) == num_ranks // 2
    assert set(said) == {name.removeprefix("policy.") for name in expected}


@pytest.mark.slow
@pytest.mark.parametrize(("saving", "loading"), [(1, 2), (2, 1), (2, 4)])
def test_a_checkpoint_resumes_with_and_without_a_pipeline(on_stages, tmp_path, saving, loading):
    batches = [random_batch(seed=seed) for seed in range(4)]
    folder = str(tmp_path / "checkpoint")
    layouts = {1: {}, 2: PLAIN, 4: INTERLEAVED}
    [(reports, weights)] = on_stages(1, train, batches)
    on_stages(saving, train_and_save, batches[:2], folder, **layouts[saving])
    resumed = on_stages(loading, load_and_train, folder, batches[2:], **layouts[loading])
    assert_same_training(resumed, [(reports[2:], weights)])


@pytest.mark.slow
@pytest.mark.parametrize("settings", [PLAIN, INTERLEAVED])
def test_looking_at_weights_between_gradient_and_update_leaves_nothing_stale(on_stages, settings):
    batch = random_batch()
    [(_, _, expected)] = on_stages(1, ranks.logprobs_between_steps, batch)
    for before, unchanged, after in on_stages(2, ranks.logprobs_between_steps, batch, **settings):
        for index in range(len(batch.samples)):
            np.testing.assert_array_equal(before[index], unchanged[index])
            np.testing.assert_allclose(after[index], expected[index], atol=2e-4)


@pytest.mark.slow
def test_greedy_mismatches_are_those_of_one_process(on_stages):
    sequences = [(s.token_ids, int(s.loss_mask.argmax())) for s in random_batch().samples]
    [one] = on_stages(1, ranks.greedy_mismatches, sequences, 1e-4)
    assert on_stages(2, ranks.greedy_mismatches, sequences, 1e-4, **PLAIN) == [one, one]
    assert one > 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), [("reward", float("nan")), ("logprobs", -1e4)])
def test_a_bad_number_in_one_ranks_data_fails_all_stages_together(on_stages, name, value):
    batch = random_batch()
    spoiled = spoil(spoil(batch, "reward", -1.0), name, value)
    failed = [("NonFiniteError", len(batch.samples))] * 4
    assert on_stages(4, ranks.failing_step, spoiled, **PLAIN) == failed


@pytest.mark.slow
@pytest.mark.parametrize("settings", [PLAIN, INTERLEAVED])
def test_a_gradient_that_is_not_finite_on_one_stage_stops_the_update_on_all(on_stages, settings):
    for stage in range(2):
        found = on_stages(2, step_with_a_bad_gradient, random_batch(), stage, **settings)
        assert found == [("NonFiniteError", True)] * 2


@pytest.mark.slow
def test_what_goes_wrong_in_a_stage_is_raised_as_it_is(on_stages):
    found = on_stages(2, look_and_run_out_of_memory, random_batch(), **PLAIN)
    assert found == ["all sent", "out of memory"]


@pytest.mark.parametrize("num_layers", range(1, 13))
def test_stages_have_every_layer_once_and_the_costliest_costs_least(num_layers):
    for num_stages in range(2, num_layers + 1):
        for head_cost in (0.0, 0.4, 1.0, 3.2):
            found = stage_layers(num_layers, num_stages, head_cost)
            assert [i for run in found for i in run] == list(range(num_layers))
            assert all(found)
            costs = [len(run) for run in found[:-1]], len(found[-1]) + head_cost
            assert max(costs[0]) - min(costs[0]) <= 1
            best = min(
                max(n + head_cost, -(-(num_layers - n) // (num_stages - 1)))
                for n in range(1, num_layers - num_stages + 2)
            )
            assert max(*costs[0], costs[1]) == best


def test_more_stages_than_layers_are_refused():
    with pytest.raises(AssertionError, match="2 layers cannot be 3 stages"):
        stage_layers(2, 3, 0.0)


@pytest.mark.parametrize("is_tied", [0, 1])
def test_stages_hold_every_parameter_once_but_tied_embeddings(folders, is_tied):
    whole = load_policy(folders[is_tied], has_values=True)
    parts = [StageModel(whole, run) for run in (range(1), range(1, 3), range(3, 4))]
    names = [name for part in parts for name, _ in part.trained_parameters()]
    expected = [name for name, _ in whole.trained_parameters()]
    assert sorted(names) == sorted(expected + [EMBEDDING] * is_tied)
    assert [part.repeated for part in parts] == [set(), set(), {EMBEDDING} if is_tied else set()]
    held = {id(p): n for n, p in whole.trained_parameters()}
    assert all(held[id(p)] == n for part in parts for n, p in part.trained_parameters())


def test_a_model_that_does_something_between_its_stages_is_refused(tmp_path):
    """Granite scales what it takes for embeddings."""
    whole = load_policy(write_model(tmp_path, model_type="granite", embedding_multiplier=3.0))
    parts = [StageModel(whole, run) for run in (range(2), range(2, 4))]
    with pytest.raises(ModelError, match="granite computes something else in the stages"):
        stages._check_stages(whole, parts)
