"""Small tables of tokens and inputs of losses, from lists."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from paceline.learner.batch.tokens import BatchTokens
from paceline.learner.objective.losses.inputs import LossInputs, Sequences


def tokens_of(rewards, groups, lengths, behaviour=None, **columns):
    """Samples with these rewards, groups and numbers of tokens; columns are of tokens."""
    num_tokens = sum(lengths)
    behaviour = np.full(num_tokens, -1.0) if behaviour is None else behaviour
    return BatchTokens(
        group_ids=tuple(range(100, 101 + max(groups))),
        rewards=np.array(rewards, dtype=np.float64),
        groups=np.array(groups, dtype=np.int64),
        lengths=np.array(lengths, dtype=np.int64),
        behaviour_logprobs=np.array(behaviour, dtype=np.float32),
        ages=np.array(columns.pop("ages", np.zeros(num_tokens)), dtype=np.int64),
        **{name: np.array(column, dtype=np.float32) for name, column in columns.items()},
    )


def nothing(tokens):
    """No rewards of single tokens."""
    return np.zeros(int(tokens.lengths.sum()))


@st.composite
def token_tables(draw, max_groups=4, max_samples=5, max_length=6):
    """Groups of 1 to ``max_samples`` samples with any rewards and lengths."""
    sizes = draw(st.lists(st.integers(1, max_samples), min_size=1, max_size=max_groups))
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    rewards = draw(st.lists(st.floats(-3, 3, width=32), min_size=len(groups), max_size=len(groups)))
    lengths = draw(st.lists(st.integers(1, max_length), min_size=len(groups), max_size=len(groups)))
    return tokens_of(rewards, groups, lengths)


def inputs_of(ratios, advantages, lengths=None, **columns):
    """Loss inputs in float64 whose policy ratio to the behaviour policy is ``ratios``."""
    count = len(ratios)
    behaviour = torch.full((count,), -2.0, dtype=torch.float64)
    logprobs = (behaviour + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    given = {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}
    return LossInputs(
        logprobs=logprobs,
        entropy=given.pop("entropy", torch.zeros(count, dtype=torch.float64)).requires_grad_(),
        sequences=Sequences.of_lengths(torch.tensor(lengths or [count])),
        behaviour_logprobs=behaviour,
        advantages=torch.tensor(advantages, dtype=torch.float64),
        weights=given.pop("weights", torch.full((count,), 1 / count, dtype=torch.float64)),
        ages=given.pop("ages", torch.zeros(count, dtype=torch.float64)),
        **given,
    )
