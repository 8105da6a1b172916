"""Stages of a pipeline: runs of a model's layers, cut out of the whole one.

A stage is the whole model but for modules that other stages hold, in whose place hidden states pass
through. So parameters keep their names, whatever stage they are on: weights are published, saved
and loaded by them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from paceline.configs.errors import ModelError
from paceline.configs.limits.parallel_limits import undivided_by_pipeline
from paceline.configs.limits.pipeline_stages import stage_layers
from paceline.learner.engines.mesh import RankMesh
from paceline.learner.model.attention import PackedSegments, Segment
from paceline.learner.model.model import PACKING_TOLERANCE, Head, PackedRow, PolicyModel

StageOutput = Callable[[tuple[Tensor, ...]], Tensor]
"""Maps a model's outputs for a microbatch to the one tensor that its last stage returns."""


class PassThrough(nn.Module):
    """Stand-in for a module that another stage holds."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return hidden states unchanged."""
        return hidden


class StageModel(PolicyModel):
    """Some of the layers of ``whole``, whose parameters it shares; the first stage embeds, the last
    one has the heads.

    Tied embeddings are on both: on the last stage they are ``repeated``.
    """

    def __init__(self, whole: PolicyModel, layers: range) -> None:
        shared = {id(kept): kept for kept in (*whole.parameters(), *whole.decoder_layers)}
        super().__init__(copy.deepcopy(whole.causal_lm, shared))
        num_layers = len(whole.decoder_layers)
        self.is_first, self.is_last = layers.start == 0, layers.stop == num_layers
        self.is_tied = (
            self.causal_lm.get_input_embeddings().weight
            is self.causal_lm.get_output_embeddings().weight
        )
        self.value_head = whole.value_head if self.is_last else None
        self._remove_others(layers)
        names = [
            name
            for name, parameter in self.causal_lm.named_parameters()
            if self.is_tied and self.is_last and parameter is self.embedding_weight
        ]
        self.repeated = frozenset(names)

    def forward(  # type: ignore[override]
        self,
        *before: Tensor,
        row: PackedRow,
        length: int,
        num_tokens: int,
        head: Head,
        finish: StageOutput,
    ) -> Tensor:
        """Return hidden states [1, num_tokens, H] for the next stage; the last one, ``finish``'s.

        ``before`` are the previous stage's: as many for every row, because all that is sent must
        have one shape, though only the row's own ``length`` tokens are computed.
        """
        hidden = self.hidden_states(row, before[0][:, :length] if before else None)
        if not self.is_last:
            return pad(hidden, (0, 0, 0, num_tokens - length))
        return finish(self.outputs(hidden, row, head))

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The stage's transformer blocks, in order."""
        layers = super().decoder_layers
        return nn.ModuleList(layer for layer in layers if not isinstance(layer, PassThrough))

    @property
    def embedding_weight(self) -> nn.Parameter:
        """Weight of the input embedding; on the first stage and, where it is tied, the last."""
        weight = self.causal_lm.get_input_embeddings().weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def _remove_others(self, layers: range) -> None:
        causal_lm, base = self.causal_lm, self.causal_lm.base_model
        blocks, embedding = super().decoder_layers, causal_lm.get_input_embeddings()
        for index in range(len(blocks)):
            if index not in layers:
                blocks[index] = PassThrough()
        for parent in (causal_lm, base):
            for name, child in list(parent.named_children()):
                if child is base or child is blocks or not list(child.parameters()):
                    continue
                is_wanted = self.is_last
                if child is embedding:
                    is_wanted = self.is_first or (self.is_last and self.is_tied)
                if not is_wanted:
                    setattr(parent, name, PassThrough())


def divide_layers(whole: PolicyModel, mesh: RankMesh) -> list[StageModel]:
    """Return this rank's stages of a model on the CPU; they share its parameters.

    Raises:
        ModelError: it computes something else in stages, or has fewer layers than these.
    """
    num_ranks = mesh.sizes["pipeline"]
    problem = undivided_by_pipeline(num_ranks, mesh.stages_per_rank, len(whole.decoder_layers))
    if problem is not None:
        raise ModelError(problem)
    layers, head = whole.decoder_layers, whole.causal_lm.get_output_embeddings().weight
    parameters_per_layer = sum(p.numel() for p in layers.parameters()) / len(layers)
    runs = stage_layers(
        len(layers), num_ranks * mesh.stages_per_rank, head.numel() / parameters_per_layer
    )
    stages = [StageModel(whole, run) for run in runs]
    _check_stages(whole, stages)
    return stages[mesh.rank_in("pipeline") :: num_ranks]


@torch.no_grad()
def _check_stages(whole: PolicyModel, stages: Sequence[StageModel]) -> None:
    """Compare stages with the whole model on a row: some architectures do more around layers."""
    tokens = torch.arange(4)[None] % whole.causal_lm.config.vocab_size
    packed = PackedSegments.from_segments([Segment(0, 4)], tokens.device)
    row = PackedRow(tokens, packed.positions()[None], packed, torch.arange(4), tokens[0])
    expected = whole.hidden_states(row)
    found: Tensor | None = None
    for stage in stages:
        found = stage.hidden_states(row, found)
    assert found is not None
    error = (found - expected).abs().max() / expected.abs().max()
    if not error < PACKING_TOLERANCE:
        raise ModelError(
            f"{whole.causal_lm.config.model_type} computes something else in the stages of a "
            f"pipeline than whole (relative error {error:.1e}): use parallel.pipeline: 1, or a "
            "plain model, for example of the Qwen or Llama families"
        )
