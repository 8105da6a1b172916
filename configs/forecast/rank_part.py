"""A learner rank's part of the model and of a row, in parameters and tokens."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.configs.forecast.model_shape import ModelShape
from paceline.configs.limits.pipeline_stages import ROUND_PER_RANK, stage_layers
from paceline.configs.schema import RunConfig
from paceline.configs.schema.learner import LearnerConfig

BYTES = {"float32": 4, "bfloat16": 2}
FULL = 4
"""Bytes of a float32, in which weights, their gradients' sums and Adam's moments are kept."""


@dataclass(frozen=True)
class RankPart:
    """Share of one rank of a pipeline (``place`` 0 of 1 without a pipeline), with ``precision``
    bytes a value; a step gives it ``num_microbatches``."""

    shape: ModelShape
    config: LearnerConfig
    precision: int
    place: int
    num_microbatches: int

    @property
    def matrix_ranks(self) -> int:
        """Ranks that divide every matrix."""
        return self.config.parallel.tensor

    @property
    def tokens(self) -> int:
        """Tokens of a row that a rank's share of the heads and features is computed for."""
        return self.config.tokens_per_microbatch // self.config.parallel.sequence

    @property
    def hidden(self) -> int:
        """Bytes of a token's hidden state, as a matrix takes it."""
        return self.precision * self.shape.hidden

    @property
    def stages(self) -> list[range]:
        """Layers of each stage of the rank."""
        num_layers, num_ranks = self.shape.layers, self.config.parallel.pipeline
        if num_ranks == 1:
            return [range(num_layers)]
        num_stages = num_ranks * self.config.parallel.stages_per_rank
        head_cost = self.shape.vocabulary * self.shape.hidden / self.shape.parameters_per_layer
        return stage_layers(num_layers, num_stages, head_cost)[self.place :: num_ranks]

    @property
    def under_way(self) -> list[int]:
        """Layers of every forward pass that still waits for its backward pass, at most."""
        num_ranks, num_stages = self.config.parallel.pipeline, len(self.stages)
        later = num_ranks - 1 - self.place
        # a rank with several stages begins with twice as many passes for each rank after it
        ahead = later if num_stages == 1 else (num_stages - 1) * num_ranks + 2 * later
        count = min(ahead + 1, self.round * num_stages)
        return [len(self.stages[i // num_ranks % num_stages]) for i in range(count)]

    @property
    def round(self) -> int:
        """Microbatches that a pipeline takes up at once, at most."""
        return min(self.num_microbatches, ROUND_PER_RANK * self.config.parallel.pipeline)

    @property
    def embeds(self) -> bool:
        """True on the rank with the first stage."""
        return self.place == 0

    @property
    def has_head(self) -> bool:
        """True on the rank with the last stage."""
        return self.place == self.config.parallel.pipeline - 1

    @property
    def embedding(self) -> int:
        """Parameters of one of a rank's vocabulary matrices."""
        return self.shape.vocabulary * self.shape.hidden // self.matrix_ranks

    @property
    def layer(self) -> int:
        """Parameters of a rank's part of a layer."""
        return self.shape.parameters_per_layer // self.matrix_ranks

    @property
    def num_embeddings(self) -> int:
        """Vocabulary matrices of a rank: both ends of a pipeline have one, even if tied."""
        is_whole = self.config.parallel.pipeline == 1
        tied = is_whole and self.shape.tied_embeddings
        return int(self.embeds) + int(self.has_head) - int(tied)

    @property
    def parameters(self) -> int:
        """Parameters of a rank and of those that share its part of the model."""
        if self.config.parallel.model_ranks == 1:
            return self.shape.num_parameters
        layers = sum(map(len, self.stages))
        return layers * self.layer + self.num_embeddings * self.embedding

    def sharded(self, count: int) -> int:
        """Return the elements of one rank's shard of ``count`` elements."""
        parallel = self.config.parallel
        divided = self.config.num_ranks // (
            parallel.replicate * parallel.tensor * parallel.pipeline
        )
        return -(-count // divided)

    @property
    def is_sharded(self) -> bool:
        """True if weights are copies of shards: always, except for one rank in float32."""
        is_alone = self.config.num_ranks == 1 and not self.config.offload_optimizer
        return not is_alone or self.precision < FULL


def rank_parts(config: RunConfig, shape: ModelShape) -> list[RankPart]:
    """Return the parts of a pipeline's ranks, or the one that every rank has, at full lengths."""
    learner, loop = config.learner, config.loop
    tokens = loop.groups_per_step * loop.samples_per_group * config.model.max_length
    num_microbatches = -(-tokens // (learner.tokens_per_microbatch * learner.num_data_ranks))
    num_ranks = learner.parallel.pipeline
    return [
        RankPart(
            shape,
            learner,
            BYTES[config.model.precision],
            place,
            max(num_microbatches, num_ranks),
        )
        for place in range(num_ranks)
    ]
