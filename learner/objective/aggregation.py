"""Aggregation: the weight of each token in an update's loss (pure, numpy only)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Aggregation = Literal["token_mean", "sequence_mean", "fixed_length", "group_sum"]


def token_weights(
    aggregation: Aggregation, lengths: NDArray[np.int64], max_tokens: int, num_groups: int
) -> NDArray[np.float64]:
    """Return weights float64 [N] of the tokens of n samples of ``lengths`` [n].

    * ``token_mean``: ``1 / N``: every token counts the same (DAPO, arXiv 2503.14476, eq. 12).
    * ``sequence_mean``: ``1 / (n length)``: every sample counts the same (GRPO, arXiv 2402.03300,
      eq. 3).
    * ``fixed_length``: ``1 / (n max_tokens)``: no sample's length changes what its tokens count
      (Dr.GRPO, arXiv 2503.20783, section 3.2).
    * ``group_sum``: ``1 / num_groups``: a mean over groups of sums (DPO's pairs).
    """
    num_samples, num_tokens = len(lengths), int(lengths.sum())
    if aggregation == "sequence_mean":
        return np.repeat(1.0 / (num_samples * lengths), lengths)
    denominators = {
        "token_mean": num_tokens,
        "fixed_length": num_samples * max_tokens,
        "group_sum": num_groups,
    }
    return np.full(num_tokens, 1.0 / denominators[aggregation])
