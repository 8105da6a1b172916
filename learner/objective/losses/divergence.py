"""KL estimators: of a Kullback-Leibler divergence from samples of its first distribution."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

DivergenceEstimator = Literal["k1", "k2", "k3"]


def divergence(log_ratio: Tensor, estimator: DivergenceEstimator) -> Tensor:
    """Estimate KL(p || q) of every token sampled from p, any shape; ``log_ratio`` = log(q / p).

    Schulman 2020, "Approximating KL divergence": ``k1 = -log r`` is unbiased, of high variance;
    ``k2 = (log r)^2 / 2`` is biased, of low variance; ``k3 = (r - 1) - log r`` is unbiased, of low
    variance and never negative. As a loss differentiated through p, k1 has zero gradient in
    expectation and k2's expected gradient is that of KL(p || q) itself; k3's is that of KL(q || p).
    """
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    return log_ratio.expm1() - log_ratio
