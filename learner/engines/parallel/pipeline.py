"""Passes through a pipeline: torch's schedules over a rank's stages.

A microbatch's hidden states are sent from stage to stage, and their gradients back. A last stage
turns outputs into a loss within its own forward pass. FSDP works as torch's schedules want it: a
stage's gradients are summed over microbatches, whole and in float32, and reduced over ranks once
(arXiv:2104.04473 describes the schedules).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor

from paceline.configs.limits.pipeline_stages import ROUND_PER_RANK
from paceline.learner.batch.microbatch import Microbatch
from paceline.learner.engines.mesh import RankMesh
from paceline.learner.engines.parallel.stages import StageModel
from paceline.learner.engines.training_engine import LossOf
from paceline.learner.model.model import Head

FinishOf = Callable[[Microbatch, tuple[Tensor, ...]], Tensor]


class RowStage(PipelineStage):
    """A stage whose microbatches are rows with structure, which torch could not split itself."""

    def __init__(
        self,
        model: StageModel,
        index: int,
        mesh: RankMesh,
        hidden: Tensor,
        arguments: Sequence[dict[str, Any]],
    ) -> None:
        """Set the stage up for microbatches, each with its dict of arguments.

        ``hidden`` has the shape and dtype of what stages send each other.
        """
        assert mesh.devices is not None
        super().__init__(
            model,
            index,
            mesh.sizes["pipeline"] * mesh.stages_per_rank,
            mesh.device,
            input_args=() if model.is_first else (hidden,),
            output_args=(hidden,),
            group=mesh.devices.get_group("pipeline"),
        )
        self._arguments = arguments

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        """Run torch's own on the arguments of the microbatch of that number."""
        arguments = self._arguments[fwd_chunk_id]
        return super().forward_one_chunk(fwd_chunk_id, args, arguments, save_forward_output)


@dataclass(frozen=True)
class PipelinePasses:
    """Passes over a rank's ``stages``, whose hidden states are of ``dtype``."""

    stages: Sequence[StageModel]
    mesh: RankMesh
    dtype: torch.dtype

    def add_gradients(
        self, microbatches: Sequence[Microbatch], head: Head, loss_of: LossOf
    ) -> None:
        """See `Passes`."""

        def loss(microbatch: Microbatch, outputs: tuple[Tensor, ...]) -> Tensor:
            # the mean over ranks that is taken of gradients is to be their sum
            return loss_of(microbatch, outputs) * self.mesh.num_averaged

        for chosen in self._rounds(microbatches):
            self._run(chosen, head, loss, trains=True)

    @torch.no_grad()
    def evaluate(
        self, microbatches: Sequence[Microbatch], head: Head
    ) -> Iterator[tuple[Microbatch, Tensor]]:
        """See `Passes`; on the last rank of the pipeline."""
        for chosen in self._rounds(microbatches):
            found = self._run(chosen, head, _first_output, trains=False)
            if found is not None:
                sizes = [len(microbatch.row.targets) for microbatch in chosen]
                yield from zip(chosen, found.split(sizes), strict=True)

    def _rounds(self, microbatches: Sequence[Microbatch]) -> Iterator[list[Microbatch]]:
        """Yield rounds as equal as possible, of as many microbatches as the schedule takes."""
        num_ranks = self.mesh.sizes["pipeline"]
        unit = num_ranks if self.mesh.stages_per_rank > 1 else 1
        assert len(microbatches) >= num_ranks and len(microbatches) % unit == 0
        num_rounds = -(-len(microbatches) // (ROUND_PER_RANK * num_ranks))
        units = np.arange(len(microbatches)).reshape(-1, unit)
        for chosen in np.array_split(units, num_rounds):
            yield [microbatches[i] for i in chosen.ravel()]

    def _run(
        self, microbatches: Sequence[Microbatch], head: Head, finish: FinishOf, *, trains: bool
    ) -> Tensor | None:
        """Run every microbatch through every stage; the last rank gets the outputs of those that
        are not trained on."""
        # each rank that divides the row's tokens has hidden states of its share
        num_shares = self.mesh.num_token_ranks
        lengths = [m.row.token_ids.shape[1] // num_shares for m in microbatches]
        arguments = [
            {
                "row": microbatch.row,
                "length": length,
                "num_tokens": max(lengths),
                "head": head,
                "finish": partial(finish, microbatch),
            }
            for microbatch, length in zip(microbatches, lengths, strict=True)
        ]
        schedule = self._schedule(arguments, _as_it_is if trains else None)
        no_targets = torch.empty(len(arguments)) if trains else None
        with self._gradients_kept():
            try:
                found: Tensor | None = schedule.step(target=no_targets, return_outputs=not trains)
            except RuntimeError as error:
                # torch wraps what went wrong, such as a lack of memory, in an error of its own
                raise error.__cause__ or error from None
            if trains:
                self._sum_over_ends()
        return found

    def _schedule(
        self,
        arguments: Sequence[dict[str, Any]],
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> Schedule1F1B | ScheduleInterleaved1F1B:
        """Build the schedule of the stages' work on microbatches of these arguments."""
        rank, num_ranks = self.mesh.rank_in("pipeline"), self.mesh.sizes["pipeline"]
        shape = (1, arguments[0]["num_tokens"], self.stages[0].causal_lm.config.hidden_size)
        hidden = torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=True)
        stages: list[Any] = [
            RowStage(model, rank + i * num_ranks, self.mesh, hidden, arguments)
            for i, model in enumerate(self.stages)
        ]
        if len(stages) > 1:
            return ScheduleInterleaved1F1B(stages, len(arguments), loss_fn, scale_grads=False)
        return Schedule1F1B(stages[0], len(arguments), loss_fn, scale_grads=False)

    @contextmanager
    def _gradients_kept(self) -> Iterator[None]:
        """Keep the gradients that are there and add those of the block: a new schedule of torch
        deletes them first, even one without backward passes."""
        parameters = [p for stage in self.stages for p in stage.parameters()]
        earlier = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        yield
        for parameter, gradient in zip(parameters, earlier, strict=True):
            if gradient is not None:
                added = parameter.grad
                parameter.grad = gradient if added is None else gradient.add_(added)

    def _sum_over_ends(self) -> None:
        """Sum the gradients of tied embeddings: each end of a pipeline holds its own part."""
        ends = [stage for stage in self.stages if stage.is_first or stage.is_last]
        if ends and ends[0].is_tied:
            self._add_other_end(ends[0].embedding_weight)

    def _add_other_end(self, weight: nn.Parameter) -> None:
        assert self.mesh.devices is not None
        if weight.grad is None:  # a critic's outputs have none
            weight.grad = torch.zeros_like(weight)
        assert isinstance(weight.grad, DTensor)
        mine = weight.grad.to_local()
        sent = mine.to(self.mesh.device)
        received = torch.empty_like(sent)
        group = self.mesh.devices.get_group("pipeline")
        end = dist.get_global_rank(group, 0 if self.mesh.rank_in("pipeline") else group.size() - 1)
        exchange = [
            dist.P2POp(dist.isend, sent, end, group),
            dist.P2POp(dist.irecv, received, end, group),
        ]
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        mine += received.to(mine.device)


def _first_output(_: Microbatch, outputs: tuple[Tensor, ...]) -> Tensor:
    return outputs[0]


def _as_it_is(loss: Tensor, _: Tensor) -> Tensor:
    return loss
