"""Forward and backward passes of a model that a rank holds from end to end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from paceline.learner.batch.microbatch import Microbatch
from paceline.learner.engines.training_engine import LossOf
from paceline.learner.model.model import Head, PolicyModel


class Passes(Protocol):
    """Passes over microbatches, as in `TrainingEngine`."""

    def add_gradients(
        self, microbatches: Sequence[Microbatch], head: Head, loss_of: LossOf
    ) -> None:
        """Add the gradients of the sum of all losses over all ranks."""

    def evaluate(
        self, microbatches: Sequence[Microbatch], head: Head
    ) -> Iterator[tuple[Microbatch, Tensor]]:
        """Yield the first output for each microbatch, without gradients, on ranks that have it."""


@dataclass(frozen=True)
class WholePasses:
    """Passes of one microbatch after the other; ``num_averaged`` ranks average their gradients."""

    model: PolicyModel
    num_averaged: int

    def add_gradients(
        self, microbatches: Sequence[Microbatch], head: Head, loss_of: LossOf
    ) -> None:
        """See `Passes`."""
        for microbatch in microbatches:
            loss = loss_of(microbatch, self.model(microbatch.row, head))
            # the mean over ranks that is taken of gradients is to be their sum
            (loss * self.num_averaged).backward()

    @torch.no_grad()
    def evaluate(
        self, microbatches: Sequence[Microbatch], head: Head
    ) -> Iterator[tuple[Microbatch, Tensor]]:
        """See `Passes`."""
        for microbatch in microbatches:
            yield microbatch, self.model(microbatch.row, head)[0]
