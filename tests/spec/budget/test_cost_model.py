"""The cost of steps: recovered from noisy timings, whatever else was timed among them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.spec.budget.cost_model import CostModel, StepCosts, batch_bucket

VLLM = StepCosts(9.0e-3, 0.55e-3)


def observe_steps(
    model: CostModel,
    truth: StepCosts,
    num_steps: int,
    batch: int = 4,
    noise: float = 0.05,
    outliers: float = 0.0,
    most_drafts: int = 7,
    seed: int = 0,
) -> None:
    random = np.random.default_rng(seed)
    for _ in range(num_steps):
        num_tokens = batch + int(random.integers(0, most_drafts + 1)) * batch
        seconds = truth.seconds(num_tokens) * (1 + noise * random.standard_normal())
        if random.random() < outliers:
            seconds *= random.uniform(5, 50)
        model.observe(num_tokens, batch, max(seconds, 1e-6))


@pytest.mark.parametrize("outliers", [0.0, 0.08])
@pytest.mark.parametrize("seed", range(4))
def test_the_line_is_recovered_from_noise_and_outliers(outliers: float, seed: int) -> None:
    model = CostModel()
    observe_steps(model, VLLM, 400, outliers=outliers, seed=seed)
    costs = model.costs(4, drafted=True)
    assert costs is not None
    assert costs.base == pytest.approx(VLLM.base, rel=0.15)
    assert costs.token == pytest.approx(VLLM.token, rel=0.15)
    prediction = model.predict(16, 4)
    assert prediction is not None
    assert prediction.seconds == pytest.approx(VLLM.seconds(16), rel=0.03)


def test_steps_that_compiled_something_at_the_start_do_not_matter() -> None:
    model = CostModel()
    model.observe(4, 4, 15.0)
    model.observe(8, 4, 8.0)
    observe_steps(model, VLLM, 40)
    prediction = model.predict(16, 4)
    assert prediction is not None and prediction.seconds == pytest.approx(VLLM.seconds(16), rel=0.1)


@given(
    st.lists(
        st.tuples(st.integers(1, 16), st.integers(0, 100), st.floats(1e-4, 10)),
        min_size=8,
        max_size=60,
    ),
    st.integers(1, 64),
)
def test_costs_are_never_negative(steps: list[tuple[int, int, float]], batch: int) -> None:
    model = CostModel()
    for requests, drafts, seconds in steps:
        model.observe(requests + drafts, requests, seconds)
    for drafted in (False, True):
        costs = model.costs(batch, drafted)
        assert costs is not None and costs.base >= 0 and costs.token >= 0
        assert costs.seconds(batch) > 0
    prediction = model.predict(batch + 1, batch)
    assert prediction is not None and prediction.standard_error >= 0
    assert 0 <= prediction.confidence <= 1


def test_confidence_grows_with_what_was_seen_and_falls_away_from_it() -> None:
    model = CostModel()
    observe_steps(model, VLLM, 20, noise=0.1)
    few = model.predict(16, 4)
    far = model.predict(400, 4)
    observe_steps(model, VLLM, 400, noise=0.1, seed=1)
    many = model.predict(16, 4)
    assert few is not None and far is not None and many is not None
    assert many.confidence > few.confidence > far.confidence


def test_the_standard_error_is_about_what_predictions_err() -> None:
    errors, claimed = [], []
    for seed in range(60):
        model = CostModel()
        observe_steps(model, VLLM, 60, noise=0.1, seed=seed)
        prediction = model.predict(16, 4)
        assert prediction is not None
        errors.append(prediction.seconds - VLLM.seconds(16))
        claimed.append(prediction.standard_error)
    assert np.std(errors) == pytest.approx(np.mean(claimed), rel=0.5)


def test_nothing_is_known_before_the_first_steps_and_nothing_certain_from_one_kind_of_step() -> (
    None
):
    model = CostModel()
    assert model.costs(1, drafted=False) is None and model.predict(1, 1) is None
    for _ in range(20):
        model.observe(1, 1, 0.01)
    drafted = model.predict(5, 1)
    assert drafted is not None and drafted.confidence == 0
    assert drafted.seconds == pytest.approx(0.05)  # as dear as it can be: nothing pays yet


def test_what_drafting_costs_beside_its_tokens_is_seen() -> None:
    model = CostModel()
    random = np.random.default_rng(0)
    for _ in range(600):
        drafts = int(random.integers(0, 5)) * 4
        overhead = 3e-3 if drafts else 0.0
        seconds = VLLM.seconds(4 + drafts) + overhead
        model.observe(4 + drafts, 4, seconds * (1 + 0.02 * random.standard_normal()))
    plain, drafted = model.costs(4, drafted=False), model.costs(4, drafted=True)
    assert plain is not None and drafted is not None
    assert plain.seconds(4) == pytest.approx(VLLM.seconds(4), rel=0.03)
    assert drafted.seconds(4) - plain.seconds(4) == pytest.approx(3e-3, rel=0.3)


def test_a_batch_never_seen_is_predicted_from_all_others() -> None:
    model = CostModel()
    for batch in (1, 4, 16):
        observe_steps(model, VLLM, 100, batch=batch, seed=batch)
    prediction = model.predict(60, 60)
    assert prediction is not None and prediction.seconds == pytest.approx(VLLM.seconds(60), rel=0.1)


def test_a_machine_that_became_slower_is_followed() -> None:
    model = CostModel()
    observe_steps(model, VLLM, 300, noise=0.02)
    slower = StepCosts(2 * VLLM.base, 2 * VLLM.token)
    observe_steps(model, slower, 1000, noise=0.02, seed=1)
    prediction = model.predict(16, 4)
    assert prediction is not None
    assert prediction.seconds == pytest.approx(slower.seconds(16), rel=0.05)


def test_buckets_are_octaves() -> None:
    assert [batch_bucket(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [0, 1, 2, 2, 3, 3, 4]


def test_plain_steps_are_foretold_from_plain_steps_where_drafted_tokens_are_cheaper() -> None:
    """Seconds 1 + m + d / 3: 60 plain steps of large batches, then drafted ones of small."""
    model = CostModel()
    for num_requests in range(64, 34, -1):
        for _ in range(2):
            model.observe(num_requests, num_requests, 1.0 + num_requests)
    for step in range(400):
        num_requests, num_drafted = 8 + step % 24, 1 + 7 * step % 40
        seconds = 1 + num_requests + num_drafted / 3
        model.observe(num_requests + num_drafted, num_requests, seconds)
    for num_requests in (2, 10, 20, 30):
        prediction = model.predict(num_requests, num_requests)
        assert prediction is not None
        assert prediction.seconds == pytest.approx(1 + num_requests, rel=0.03)
