"""Generalised advantages beside RLlib's own."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import ray

from paceline.learner.objective.advantages import GeneralizedAdvantage
from tests.learner.batch.token_tables import tokens_of


@pytest.fixture(scope="module")
def rllib_targets():
    """RLlib's GAE, found without importing the rest of RLlib, which wants gymnasium."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ray.rllib", "ray.rllib.utils", "ray.rllib.utils.postprocessing"):
            package = ModuleType(name)
            package.__path__ = [str(Path(ray.__file__).parent.joinpath(*name.split(".")[1:]))]
            patch.setitem(sys.modules, name, package)
        module = "ray.rllib.utils.postprocessing.value_predictions"
        found = importlib.import_module(module).compute_value_targets
        yield found
        sys.modules.pop(module, None)


@pytest.mark.parametrize(("discount", "trace_decay"), [(1.0, 1.0), (0.99, 0.95), (1.0, 0.0)])
def test_gae_is_rllibs(rllib_targets, discount, trace_decay):
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 20, 30)
    count = int(lengths.sum())
    penalties, values = generator.normal(size=(2, count)).astype(np.float32)
    outcome = generator.normal(size=len(lengths))
    tokens = tokens_of(outcome, np.arange(len(lengths)), lengths, values=values)
    estimate = GeneralizedAdvantage(discount, trace_decay, normalize=False)(
        tokens, penalties.astype(float)
    )
    ends = np.cumsum(lengths) - 1
    rewards, terminated = penalties.astype(np.float64), np.zeros(count)
    rewards[ends] += outcome
    terminated[ends] = 1.0
    expected = rllib_targets(
        values.astype(np.float64), rewards, terminated, np.zeros(count), discount, trace_decay
    )
    np.testing.assert_allclose(estimate.returns, expected, rtol=1e-5, atol=1e-5)
