"""A pipeline with too little or much work, what goes wrong in one of its stages, and how a model is
cut into them. Every law: `test_conformance.py`."""

from __future__ import annotations

import numpy as np
import pytest

from paceline.configs.errors import ModelError
from paceline.configs.limits.pipeline_stages import stage_layers
from paceline.configs.vocabulary import TrainBatch
from paceline.learner.engines.parallel import stages
from paceline.learner.engines.parallel.stages import StageModel
from paceline.learner.model.model import load_policy, write_initial_model
from tests.learner import ranks
from tests.learner.conftest import (
    VOCAB_SIZE,
    model_config,
    random_batch,
    random_group,
    sequences_of,
)
from tests.learner.engines.comparisons import assert_same_gradients, relative_error
from tests.learner.engines.layouts import LAYOUTS, Layout

EMBEDDING = "model.embed_tokens.weight"
PIPELINES = ["pipeline", "interleaved"]


def steps_with_a_bad_gradient(worker, batch):
    """The error's name, and whether no weight was written, for a bad gradient of either stage."""
    return [step_with_a_bad_gradient(worker, batch, stage) for stage in range(2)]


def step_with_a_bad_gradient(worker, batch, stage):
    worker.forward_backward(batch, ranks.LOSS)
    before = ranks.weights(worker)
    if worker._models.mesh.rank_in("pipeline") == stage:
        worker._models.policy.parts[0].decoder_layers[0].mlp.up_proj.weight.grad.fill_(float("nan"))
    try:
        worker.optimizer_step(ranks.OPTIMIZER, 0, 100)
    except Exception as error:
        after = ranks.weights(worker)
        return type(error).__name__, all((before[n] == after[n]).all() for n in before)
    return None, False


def look_and_run_out_of_memory(worker, batch):
    """On the last microbatch: before it, other stages would wait to be heard."""
    microbatches = worker._models.share(sequences_of(batch)).microbatches
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


def few_samples(num_samples):
    generator = np.random.default_rng(0)
    return tuple(random_group(generator, 10, 40) for _ in range(num_samples))


def microbatches_of_one(num_samples):
    """Samples that take more than half a row each."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(25, 50, num_samples)
    return tuple(random_group(generator, 10, int(length)) for length in lengths)


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("groups", [few_samples(1), few_samples(3), microbatches_of_one(37)])
def test_stages_without_work_keep_step_and_much_work_goes_through_in_rounds(
    on_layout, name, groups
):
    """Fewer samples than a pipeline has ranks, some more than one round of them, and many."""
    layout, batch = LAYOUTS[name], TrainBatch(0, groups)
    [expected] = on_layout(Layout(model=layout.model), ranks.gradients_and_logprobs, batch)
    assert_same_gradients(on_layout(layout, ranks.gradients_and_logprobs, batch), expected)


@pytest.mark.slow
def test_bfloat16_in_a_pipeline_is_the_arithmetic_of_one_process(on_layout):
    program, settings = (ranks.gradients, random_batch()), {"precision": "bfloat16"}
    [(report, expected)] = on_layout(Layout(model="deep"), *program, **settings)
    found = on_layout(LAYOUTS["pipeline"], *program, **settings)
    assert found[0][0].metrics["entropy"] == pytest.approx(report.metrics["entropy"], rel=1e-3)
    for name, gradient in ranks.merged(theirs for _, theirs in found).items():
        assert gradient.dtype == np.float32
        assert relative_error(gradient, expected[name]) < 0.02, name


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_a_gradient_that_is_not_finite_on_one_stage_stops_the_update_on_all(on_layout, name):
    found = on_layout(LAYOUTS[name], steps_with_a_bad_gradient, random_batch())
    assert found == [[("NonFiniteError", True)] * 2] * 2


@pytest.mark.slow
def test_what_goes_wrong_in_a_stage_is_raised_as_it_is(on_layout):
    found = on_layout(LAYOUTS["pipeline"], look_and_run_out_of_memory, random_batch())
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


@pytest.mark.parametrize(("model", "is_tied"), [("deep", 1), ("deep_untied", 0)])
def test_stages_hold_every_parameter_once_but_tied_embeddings(model_folders, model, is_tied):
    whole = load_policy(model_folders[model], has_values=True)
    parts = [StageModel(whole, run) for run in (range(1), range(1, 3), range(3, 4))]
    names = [name for part in parts for name, _ in part.trained_parameters()]
    expected = [name for name, _ in whole.trained_parameters()]
    assert sorted(names) == sorted(expected + [EMBEDDING] * is_tied)
    assert [part.repeated for part in parts] == [set(), set(), {EMBEDDING} if is_tied else set()]
    held = {id(p): n for n, p in whole.trained_parameters()}
    assert all(held[id(p)] == n for part in parts for n, p in part.trained_parameters())


def test_a_model_that_does_something_between_its_stages_is_refused(tmp_path):
    """Granite scales what it takes for embeddings."""
    settings = {"num_hidden_layers": 4, "embedding_multiplier": 3.0}
    config = model_config("granite", **settings)
    whole = load_policy(write_initial_model(config, VOCAB_SIZE, 1, seed=0, folder=str(tmp_path)))
    parts = [StageModel(whole, run) for run in (range(2), range(2, 4))]
    with pytest.raises(ModelError, match="granite computes something else in the stages"):
        stages._check_stages(whole, parts)
