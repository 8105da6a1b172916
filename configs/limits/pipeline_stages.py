"""Assignment of a model's layers to the stages of a pipeline."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

ROUND_PER_RANK = 8
"""Torch allocates what is sent for every microbatch of a round at once: a round has at most this
many for each rank of the pipeline, of which its ends wait for one."""


def stage_layers(num_layers: int, num_stages: int, head_cost: float) -> list[range]:
    """Return each stage's layers, at least one each, such that the costliest stage costs least.

    The last one also has the head, worth ``head_cost`` layers. What cannot be divided evenly goes
    to later stages: earlier ones hold the activations of more microbatches.
    """
    assert 1 < num_stages <= num_layers, f"{num_layers} layers cannot be {num_stages} stages"
    num_others = num_stages - 1

    def costliest(num_last: int) -> tuple[float, int]:
        others = math.ceil((num_layers - num_last) / num_others)
        return max(others, num_last + head_cost), -num_last

    num_last = min(range(1, num_layers - num_others + 1), key=costliest)
    fewest, remainder = divmod(num_layers - num_last, num_others)
    sizes = [fewest + (index >= num_others - remainder) for index in range(num_others)]
    return [range(*ends) for ends in pairwise(accumulate([*sizes, num_last], initial=0))]
