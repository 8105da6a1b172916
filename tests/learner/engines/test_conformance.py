"""Whatever divides the ranks, they compute, publish, save and refuse what one process does.

Each layout goes through one run (`layouts.go_through_a_run`), of which every law looks at a part.
"""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from paceline.weights_sync.shared_memory import read_weights
from tests.learner import ranks
from tests.learner.conftest import random_batch
from tests.learner.engines.comparisons import assert_same_logprobs, assert_same_metrics
from tests.learner.engines.layouts import (
    LAYOUTS,
    SAVED,
    Layout,
    load_and_train,
)
from tests.learner.test_worker import assert_same

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("name", LAYOUTS)]


def test_gradients_metrics_and_logprobs_are_those_of_one_process(runs, name):
    """The sum over two batches, of several microbatches each, and nothing of a dropped one."""
    run, alone = runs(name)
    assert_same_metrics(run["metrics"], alone["metrics"][0], rel=1e-5, abs=1e-6)
    assert_same(run.tensors("gradients"), alone.tensors("gradients"), 1e-5)
    assert_same_logprobs(run["logprobs"], alone["logprobs"][0])


def test_steps_follow_one_process(runs, name):
    """With gradients that are clipped."""
    run, alone = runs(name)
    [steps] = alone["steps"]
    assert all(step["grad_norm"] > ranks.OPTIMIZER.max_grad_norm for step in steps)
    assert_same_metrics(run["steps"], steps, rel=1e-3, abs=1e-4)
    # Adam divides by the gradient's magnitude, so rounding errors of tiny gradients become visible
    assert_same(run.tensors("trained"), alone.tensors("trained"), 1e-3)


def test_what_is_published_and_exported_is_every_weight_once(runs, name):
    run, _ = runs(name)
    expected = run.tensors("saved")
    first, *others = run["handle"]
    assert not any(others)
    published = {name: tensor.numpy().copy() for name, tensor in read_weights(first)}
    assert_same(published, expected)
    exported = AutoModelForCausalLM.from_pretrained(f"{run.folder}/model")
    assert_same({n: p.detach().numpy() for n, p in exported.named_parameters()}, expected)
    covered = {name: np.zeros(tensor.shape, int) for name, tensor in expected.items()}
    for piece, index in itertools.chain.from_iterable(run["pieces"]):
        covered[piece][index] += 1
    assert all((times == 1).all() for times in covered.values())


def test_a_checkpoint_of_one_process_resumes(runs, name):
    run, alone = runs(name)
    assert run["version"] == [SAVED] * len(run.ranks)
    assert_same(run.tensors("resumed"), alone.tensors("trained"), 1e-3)


def test_a_checkpoint_resumes_in_one_process(runs, on_layout, name):
    run, alone = runs(name)
    [found] = on_layout(Layout(model=LAYOUTS[name].model), load_and_train, run.folder)
    assert_same(found, alone.tensors("trained"), 1e-3)


def test_looking_at_weights_between_gradient_and_update_leaves_nothing_stale(runs, name):
    run, alone = runs(name)
    [(_, _, expected)] = alone["between"]
    for before, unchanged, after in run["between"]:
        for index, wanted in enumerate(expected):
            np.testing.assert_array_equal(before[index], unchanged[index])
            np.testing.assert_allclose(after[index], wanted, atol=2e-4)


def test_greedy_mismatches_are_counted_once(runs, name):
    run, alone = runs(name)
    [expected] = alone["mismatches"]
    assert run["mismatches"] == [expected] * len(run.ranks)
    assert expected > 0


def test_a_bad_number_in_one_ranks_data_fails_all_together_and_none_hangs(runs, name):
    failed = ("NonFiniteError", len(random_batch().samples))
    for found in runs(name)[0]["bad_numbers"]:
        assert found == [failed, failed]


def test_a_gradient_that_is_not_finite_changes_nothing(runs, name):
    """Nor does it leave anything: the steps that follow are those of one process."""
    run, alone = runs(name)
    assert_same(run.tensors("initial"), alone.tensors("initial"))
    assert_same(run.tensors("unchanged"), run.tensors("initial"))
    assert all(
        re.search("gradient norm of step 0 is (nan|not finite)", error) for error in run["refusal"]
    )
