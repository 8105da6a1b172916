"""What the benchmark of old samples compares, and how it judges."""

from __future__ import annotations

import pytest

from paceline.controller.bench.e2e.algorithms import (
    CLIPPED,
    CORRECTED,
    DECOUPLED,
    FULL,
    IN_STEP,
    TRUNCATED,
    UNCORRECTED,
    VARIANTS,
    Curve,
    _result,
)
from paceline.controller.bench.e2e.paceline_runs import resolve


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_differ_in_lag_and_algorithm_alone(name) -> None:
    config = resolve(VARIANTS[name])
    assert config.loop.max_lag == (0 if name == IN_STEP else 4)
    assert config.algorithm.zero_signal == "keep"
    plain = resolve({}).model_dump()
    varied = config.model_dump()
    for section in ("algorithm", "loop", "name"):
        plain.pop(section), varied.pop(section)
    varied["rollout"]["max_num_seqs"] = plain["rollout"]["max_num_seqs"]
    assert varied == plain


def test_only_the_uncorrected_variant_takes_old_samples_for_new_ones() -> None:
    algorithms = {name: resolve(VARIANTS[name]).algorithm for name in VARIANTS}
    assert algorithms[UNCORRECTED].loss.type == "reinforce"
    assert not algorithms[UNCORRECTED].corrections
    assert algorithms[CLIPPED] == algorithms[IN_STEP]
    assert algorithms[DECOUPLED].old_policy == "recomputed"
    assert [c.type for c in algorithms[TRUNCATED].corrections] == ["truncate"]


def test_the_median_over_seeds_of_the_distance_at_the_end_is_judged() -> None:
    def curve(last: float) -> Curve:
        return Curve({0: 40.0, 100: last}, mean_age=3.5)

    def seed(last: float) -> dict[str, Curve]:
        found = {name: curve(last) for name in CORRECTED} | {IN_STEP: curve(70.0)}
        return found | {UNCORRECTED: curve(10.0)}

    result = _result(FULL, {0: seed(68.0), 1: seed(62.0)})
    target = result.targets[f"{CLIPPED}: points below lag 0 at the end"]
    assert (target.measured.median, target.met) == (5.0, True)
    assert not _result(FULL, {0: seed(66.0), 1: seed(62.0)}).all_met
    assert not any(UNCORRECTED in what for what in result.targets), "it is shown, not judged"
    assert result.figures["points_below_lag_0"][UNCORRECTED] == 60.0
