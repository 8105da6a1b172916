"""PPO written down token by token from its papers: no installed package has it as we do.

TRL no longer has a PPO trainer and RLlib's critic loss is bounded otherwise, ``min((V - R)^2, c)``.
Plain Python on scalars, so that it shares neither code nor structure with ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def advantages(
    rewards: Sequence[float], values: Sequence[float], discount: float, trace_decay: float
) -> list[float]:
    """``A_t = sum_l (gamma lambda)^l delta_{t+l}``, the sum itself (arXiv 1506.02438, eq. 16)."""
    after = [*values[1:], 0.0]
    surprises = [
        reward + discount * later - value
        for reward, value, later in zip(rewards, values, after, strict=True)
    ]
    decay = discount * trace_decay
    return [
        sum(decay**lag * surprise for lag, surprise in enumerate(surprises[t:]))
        for t in range(len(surprises))
    ]


def whitened(of_tokens: Sequence[float]) -> list[float]:
    """Less the mean, over the standard deviation of the population (not of a sample)."""
    mean = sum(of_tokens) / len(of_tokens)
    variance = sum((value - mean) ** 2 for value in of_tokens) / len(of_tokens)
    return [(value - mean) / variance**0.5 for value in of_tokens]


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Sequence[float],
    of_tokens: Sequence[float],
    clip: float,
    dual_clip: float | None = None,
) -> Tensor:
    """Mean over tokens of ``-min(r A, clip(r) A)`` by cases (arXiv 1707.06347, eq. 7), and by
    ``dual_clip`` of ``-max(., c A)`` for A < 0 (arXiv 1912.09729, eq. 2)."""
    total = logprobs.new_zeros(())
    for logprob, old, advantage in zip(logprobs, old_logprobs, of_tokens, strict=True):
        ratio = (logprob - old).exp()
        if advantage >= 0 and ratio > 1 + clip:
            total = total - (1 + clip) * advantage
        elif advantage < 0 and ratio < 1 - clip:
            total = total - (1 - clip) * advantage
        elif advantage < 0 and dual_clip is not None and ratio > dual_clip:
            total = total - dual_clip * advantage
        else:
            total = total - ratio * advantage
    return total / len(of_tokens)


def value_loss(
    values: Tensor, old_values: Sequence[float], returns: Sequence[float], clip: float | None
) -> Tensor:
    """Mean over tokens of half the larger of two squared errors: of the value and of the value
    kept within ``clip`` of the old one, as in OpenAI's baselines, CleanRL and verl."""
    total = values.new_zeros(())
    for value, old, target in zip(values, old_values, returns, strict=True):
        error = (value - target) ** 2
        if clip is not None and abs(value - old) > clip:
            kept = old + clip if value > old else old - clip
            error = max(error, error.new_tensor((kept - target) ** 2))
        total = total + error / 2
    return total / len(returns)
