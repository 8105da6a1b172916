"""What a rank of the learner will hold at its fullest: in the backward pass of a full microbatch.

Counted is what torch allocates, tensor by tensor, as the code is: what transformers' layers keep
for the backward pass, our own head that never holds logits whole, FSDP's gathered layers. Not
counted are the allocator's slack, the libraries' own buffers and what communication takes.
`tests/learner/test_memory_forecast.py` measures ranks beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.configs.model_shape import ModelShape
from paceline.configs.schema import RunConfig
from paceline.configs.schema.algorithm import critic_of, reference_of
from paceline.configs.schema.learner import LearnerConfig

BYTES = {"float32": 4, "bfloat16": 2}
FULL = 4
"""Bytes of a float32, in which weights, their gradients' sums and Adam's moments are kept."""

LOGITS_PER_CHUNK, MIN_ROWS_PER_CHUNK = 2**22, 512
"""As in `kernels/token_logprobs.py` (a test compares)."""

CHECKPOINT_COPY = "checkpoint's copy"

LARGEST_BUCKET = 50_000_000
"""Elements that DeepSpeed reduces or gathers at once, as in `learner/deepspeed_engine.py`."""


def learner_rank(config: RunConfig, shape: ModelShape) -> tuple[tuple[str, int], ...]:
    """By what takes them: the bytes of the rank with the most."""
    rank = _Rank(shape, config.learner, BYTES[config.model.precision])
    critic = critic_of(config.algorithm)
    has_own_critic = critic is not None and critic.backbone == "separate"
    has_reference = reference_of(config.algorithm) is not None
    state = rank.state()
    return (
        *state.items(),
        ("critic", sum(state.values()) * has_own_critic),
        ("reference", FULL * rank.sharded(rank.parameters) * has_reference),
        ("gathered weights", rank.gathered()),
        ("activations", rank.kept()),
        ("work space", rank.work_space()),
        (CHECKPOINT_COPY, rank.checkpoint_copy() * (2 if has_own_critic else 1)),
    )


@dataclass(frozen=True)
class _Rank:
    """A rank with ``precision`` bytes a value; of a pipeline the first, which has the most
    microbatches under way, with the head's work of the last."""

    shape: ModelShape
    config: LearnerConfig
    precision: int

    @property
    def matrix_ranks(self) -> int:
        """Ranks that divide every matrix."""
        return self.config.parallel.tensor

    @property
    def tokens(self) -> int:
        """Tokens of a row that a rank's share of the heads and features is computed for."""
        return self.config.tokens_per_microbatch // self.config.parallel.sequence

    @property
    def layers(self) -> int:
        """Layers of a rank."""
        return -(-self.shape.layers // self.config.parallel.pipeline)

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
        """Vocabulary matrices of a rank: both ends of a pipeline have one."""
        return 1 if self.shape.tied_embeddings or self.config.parallel.pipeline > 1 else 2

    @property
    def parameters(self) -> int:
        """Of a rank and those that share its part of the model."""
        if self.config.parallel.model_ranks == 1:
            return self.shape.num_parameters
        return self.layers * self.layer + self.num_embeddings * self.embedding

    def sharded(self, count: int) -> int:
        """A shard of ``count`` elements."""
        parallel = self.config.parallel
        divided = self.config.num_ranks // (
            parallel.replicate * parallel.tensor * parallel.pipeline
        )
        return -(-count // divided)

    def state(self) -> dict[str, int]:
        """Master weights, gradients and both of Adam's moments."""
        whole, shard = FULL * self.parameters, FULL * self.sharded(self.parameters)
        if self.config.engine == "fsdp":
            return {"master weights": shard, "gradients": shard, "optimiser": 2 * shard}
        stage = self.config.deepspeed.stage
        count = self.sharded(self.parameters) if stage == 3 else self.parameters
        computed = self.precision * count
        return {
            "master weights": shard + computed,
            "gradients": shard if stage >= 2 else whole,
            "optimiser": 2 * shard,
        }

    def checkpoint_copy(self) -> int:
        """Weights and moments as they are saved beside training, where that is the same memory."""
        return 0 if self.config.gpus_per_rank else 3 * FULL * self.sharded(self.parameters)

    def gathered(self) -> int:
        """What FSDP holds whole: the vocabulary's matrices, a layer at work and the next one; a
        bucket of DeepSpeed's."""
        if self.config.engine == "deepspeed":
            return FULL * min(LARGEST_BUCKET, self.parameters)
        if not self.is_sharded:
            return 0
        return self.precision * (self.num_embeddings * self.embedding + 2 * self.layer)

    @property
    def is_sharded(self) -> bool:
        """Whether weights are copies of shards: always, but for one rank in float32."""
        return self.config.num_ranks > 1 or self.precision < FULL

    def kept(self) -> int:
        """What the forward pass leaves for the backward pass, of all microbatches under way."""
        hidden = self.precision * self.shape.hidden
        is_kept_whole = self.config.activation_checkpointing == "none"
        a_layer = self.kept_by_layer() if is_kept_whole else hidden
        is_chunked = self.config.activation_checkpointing == "chunks"
        last = hidden if is_chunked else self.norm
        return self.tokens * (self.shape.layers * a_layer + last + hidden)

    @property
    def norm(self) -> int:
        """Bytes a token of a norm over the hidden size: in float32 its input and what it scales,
        then its output (for lower precisions a copy of the input)."""
        return (FULL + 2 * self.precision) * self.shape.hidden

    def kept_by_layer(self) -> int:
        """Bytes a token, attention scores computed again (as flash attention does)."""
        shape, size = self.shape, self.precision
        queries = shape.query_heads * shape.head_dim // self.matrix_ranks
        keys = shape.key_value_heads * shape.head_dim // self.matrix_ranks
        # rotated queries, attention's output and that as a row; rotated keys, values
        attention = size * (3 * queries + 2 * keys)
        if shape.norms_per_layer > 2 * shape.hidden:  # queries and keys have theirs
            attention += (FULL + size) * (queries + keys)
        # gate, up, activated gate and their product
        mlp = 4 * size * shape.intermediate_per_token // self.matrix_ranks
        return 2 * self.norm // self.matrix_ranks + attention + mlp

    def work_space(self) -> int:
        """The most that is alive for a while: at the head, in a layer, or when all are done."""
        at_the_end = self._embedding_gradients() - self.kept()
        return max(self._at_head(), self._in_layer(), at_the_end)

    def _at_head(self) -> int:
        """Logits of some rows and what is made of them; the vocabulary's gradient as a sum and of
        those rows; gradients of the hidden states before and after the last norm."""
        vocabulary = self.shape.vocabulary // self.matrix_ranks
        rows = min(self.tokens, max(MIN_ROWS_PER_CHUNK, LOGITS_PER_CHUNK // self.shape.vocabulary))
        # logits, scaled, and those of the rows before; each once more where they are not float32
        copies = 3 * FULL + (2 * self.precision if self.precision < FULL else 0)
        of_rows = copies * rows * vocabulary
        gradients = (FULL + self.precision) * self.embedding
        return of_rows + gradients + 2 * self.tokens * self.precision * self.shape.hidden

    def _in_layer(self) -> int:
        """A layer's gradients, of what it is given and of its weights, while the vocabulary's
        waits for that of the embedding."""
        hidden = self.precision * self.shape.hidden
        features = self.precision * self.shape.intermediate_per_token // self.matrix_ranks
        waiting = FULL * self.embedding
        weights = self.precision * self.layer
        if self.is_sharded:
            weights += FULL * self.layer  # as it is summed over ranks
        working = self.tokens * (2 * hidden + 2 * features)
        if self.config.activation_checkpointing == "layers":
            working += self.tokens * self.kept_by_layer()
        if self.config.activation_checkpointing == "chunks":
            working = self._in_chunks()
            weights += FULL * self.layer
        return waiting + weights + working

    def _in_chunks(self) -> int:
        """Gradients of the row's hidden states on both sides; its keys and values, their gradients
        in float32 and a chunk's to them; a chunk's activations and their gradients."""
        hidden, size = self.precision * self.shape.hidden, self.precision
        keys = self.shape.key_value_heads * self.shape.head_dim
        of_row = 2 * hidden + 2 * keys * (2 * size + FULL)
        chunk = min(self.config.tokens_per_chunk, self.tokens)
        features = 2 * size * self.shape.intermediate_per_token
        of_chunk = self.kept_by_layer() + 2 * hidden + features
        # on a CPU a mask says which of the row's keys a chunk's queries see
        mask = 0 if self.config.gpus_per_rank else size * self.tokens
        return self.tokens * of_row + chunk * (of_chunk + mask)

    def _embedding_gradients(self) -> int:
        """Of the vocabulary's matrices: head's, embedding's, and as they are summed over ranks."""
        summed = FULL * self.num_embeddings * self.embedding if self.is_sharded else 0
        return 2 * FULL * self.embedding + summed
