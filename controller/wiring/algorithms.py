"""From a configured algorithm to what the learner optimises.

A new part of an algorithm is a file with its class, a section with its options under the same names
in ``configs/schema/algorithm_parts.py``, and a line in one of the tables here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import ray.cloudpickle

from paceline.configs.imports import build_imported
from paceline.configs.schema import RunConfig
from paceline.configs.schema.algorithm import (
    ImportedAlgorithm,
    PolicyAlgorithm,
    PreferenceAlgorithm,
    SupervisedAlgorithm,
)
from paceline.configs.schema.algorithm_parts import CorrectionConfig
from paceline.configs.schema.base import Section
from paceline.configs.schema.run import given_completions
from paceline.controller.groups.signal_filter import EVERYTHING, SignalFilter
from paceline.controller.parts import Algorithm
from paceline.learner.objective.advantages import (
    BatchNormalized,
    Estimator,
    GeneralizedAdvantage,
    GroupRelative,
    LeaveOneOut,
    Outcome,
    PreferredPair,
    TeacherGap,
)
from paceline.learner.objective.losses.corrections import (
    MaskAbove,
    MaskMastered,
    MaskOutside,
    RejectSequences,
    SecondMoment,
    Truncate,
)
from paceline.learner.objective.losses.policy import (
    Clip,
    ClippedWeight,
    NegativeLogLikelihood,
    PolicyLoss,
    Reinforce,
    SequenceClip,
)
from paceline.learner.objective.objective import Objective, OverlongPenalty, ReferencePenalty

ADVANTAGES: Mapping[str, Callable[..., Estimator]] = {
    "group_relative": GroupRelative,
    "leave_one_out": LeaveOneOut,
    "batch_normalized": BatchNormalized,
    "outcome": Outcome,
    "gae": GeneralizedAdvantage,
    "teacher_gap": TeacherGap,
}
LOSSES: Mapping[str, Callable[..., PolicyLoss]] = {
    "clip": Clip,
    "sequence_clip": SequenceClip,
    "clipped_weight": ClippedWeight,
    "reinforce": Reinforce,
}
CORRECTIONS: Mapping[str, Callable[..., Any]] = {
    "truncate": Truncate,
    "mask_above": MaskAbove,
    "mask_outside": MaskOutside,
    "reject_sequences": RejectSequences,
    "second_moment": SecondMoment,
    "mask_mastered": MaskMastered,
}


def build_algorithm(config: RunConfig) -> tuple[SignalFilter, Algorithm]:
    """Return which groups the configured algorithm trains on, and its objective.

    Raises:
        ConfigError: an imported one cannot be imported or built.
    """
    chosen = config.algorithm
    max_tokens = config.rollout.sampling.max_tokens
    if isinstance(chosen, SupervisedAlgorithm):
        return imitation()
    if isinstance(chosen, PreferenceAlgorithm):
        return EVERYTHING, preferences(chosen.beta, max_tokens)
    signal = SignalFilter(chosen.zero_signal == "drop", chosen.max_draws)
    if isinstance(chosen, ImportedAlgorithm):
        return signal, import_algorithm(chosen)
    return signal, policy_optimization(chosen, max_tokens)


def policy_optimization(config: PolicyAlgorithm, max_tokens: int) -> Objective:
    """Return the objective put together of the configured parts."""
    parts = {c.type: build_part(CORRECTIONS, c) for c in config.corrections}
    second_moment = parts.pop("second_moment", None)
    reference, overlong = config.reference, config.overlong
    return Objective(
        advantage=build_part(ADVANTAGES, config.advantage),
        policy_loss=build_part(LOSSES, config.loss),
        aggregation=config.aggregation,
        max_tokens=max_tokens,
        old_policy=config.old_policy,
        corrections=tuple(parts.values()),
        second_moment=second_moment,
        reference=ReferencePenalty(reference.coefficient, reference.estimator, reference.place)
        if reference
        else None,
        overlong=OverlongPenalty(max_tokens, overlong.buffer_tokens, overlong.penalty)
        if overlong
        else None,
        entropy_coefficient=config.entropy_coefficient,
        num_updates=config.num_updates,
    )


def imitation() -> tuple[SignalFilter, Objective]:
    """Return supervised learning from demonstrations: every token of theirs counts the same."""
    objective = Objective(
        Outcome(), NegativeLogLikelihood(), "token_mean", max_tokens=1, is_sampled=False
    )
    return EVERYTHING, objective


def preferences(beta: float, max_tokens: int) -> Objective:
    """Return learning from pairs: DPO."""
    return Objective(PreferredPair(beta), Reinforce(), "group_sum", max_tokens, is_sampled=False)


def import_algorithm(config: ImportedAlgorithm) -> Algorithm:
    """Return a user's algorithm, made to travel to the learner with its code.

    Raises:
        ConfigError: it cannot be imported or built.
    """
    found = build_imported(
        "algorithm.import_path", config.import_path, config.parameters, "prepare"
    )
    # the learner's processes need not be able to import it
    ray.cloudpickle.register_pickle_by_value(sys.modules[config.import_path.partition(":")[0]])
    return found


def build_part(table: Mapping[str, Callable[..., Any]], section: Section | CorrectionConfig) -> Any:
    """Return the part that a section of the schema names, with the section's options."""
    options = section.model_dump()
    return table[options.pop("type")](**options)


def training_temperature(config: RunConfig) -> float:
    """Return the temperature of the learner's log-probabilities: that of the sampling, else 1."""
    is_sampled = given_completions(config.algorithm) is None
    return config.rollout.sampling.temperature if is_sampled else 1.0
