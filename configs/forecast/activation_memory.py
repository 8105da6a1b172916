"""Memory of a learner rank's forward and backward passes, besides weights and gradients."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.configs.forecast.rank_part import FULL, RankPart

LOGITS_PER_CHUNK, MIN_ROWS_PER_CHUNK = 2**22, 512
"""As in `kernels/token_logprobs.py` (a test compares)."""


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes on the rank with this ``part``, at its fullest."""

    part: RankPart

    def kept(self) -> int:
        """Return the bytes that forward passes under way keep for their backward passes."""
        part, mode = self.part, self.part.config.activation_checkpointing
        a_layer = self._kept_by_layer() if mode == "none" else part.hidden // part.matrix_ranks
        last = part.hidden if mode == "chunks" else self._norm()
        passes = part.under_way
        # of every pass its first layer's input, or what it handed on
        hidden = sum(passes) * a_layer + len(passes) * part.hidden + last * part.has_head
        return part.tokens * hidden

    def sent(self) -> int:
        """Return the bytes of hidden states and gradients that a round sends to a pipeline's
        stages."""
        part = self.part
        num_stages = len(part.stages)
        received = 2 * num_stages - part.embeds - part.has_head
        return received * part.round * part.tokens * part.hidden // part.matrix_ranks

    def work_space(self) -> int:
        """Return the most temporary bytes: at the head, in a layer, or when all layers are done."""
        at_head = self._at_head() if self.part.has_head else 0
        at_the_end = self._embedding_gradients() - self.kept()
        return max(at_head, self._in_layer(), at_the_end)

    def _norm(self, tensor_ranks: int = 1) -> int:
        """Return the bytes a token of a norm over the hidden size: in float32 its input and what it
        scales, then its output (for lower precisions a copy of the input). Tensor ranks divide its
        tokens, except in the output, which matrices take whole."""
        inside = (FULL + self.part.precision) * self.part.shape.hidden // tensor_ranks
        return inside + self.part.hidden

    def _kept_by_layer(self) -> int:
        """Return the bytes a token; attention scores are recomputed, as flash attention does."""
        part, shape, size = self.part, self.part.shape, self.part.precision
        queries = shape.query_heads * shape.head_dim // part.matrix_ranks
        keys = shape.key_value_heads * shape.head_dim // part.matrix_ranks
        # rotated queries, attention's output and that as a row; rotated keys, values
        attention = size * (3 * queries + 2 * keys)
        if shape.norms_per_layer > 2 * shape.hidden:  # queries and keys have theirs
            attention += (FULL + size) * (queries + keys)
        # gate, up, activated gate and their product
        mlp = 4 * size * shape.intermediate_per_token // part.matrix_ranks
        if shape.experts is not None:  # what every chosen expert is given and gives
            mlp += 2 * part.hidden * shape.experts.per_token
        return 2 * self._norm(part.matrix_ranks) + attention + mlp

    def _at_head(self) -> int:
        """Sum the logits of some rows and what is made of them, the vocabulary's gradient (the sum
        and those rows' part), and gradients of the hidden states before and after the last norm."""
        part = self.part
        vocabulary = part.shape.vocabulary // part.matrix_ranks
        step = max(MIN_ROWS_PER_CHUNK, LOGITS_PER_CHUNK // vocabulary)
        rows = min(part.tokens, step)
        # logits, scaled, and those of the rows before; each once more where they are not float32
        copies = FULL * (3 if part.tokens > step else 2)
        if part.precision < FULL:
            copies += 2 * part.precision
        gradients = (FULL + part.precision) * part.embedding
        return copies * rows * vocabulary + gradients + 2 * part.tokens * part.hidden

    def _in_layer(self) -> int:
        """Sum a layer's gradients, of its input and of its weights, while the vocabulary's gradient
        waits for that of the embedding."""
        part, mode = self.part, self.part.config.activation_checkpointing
        features = part.precision * part.shape.intermediate_per_token // part.matrix_ranks
        is_pipelined = part.config.parallel.pipeline > 1
        waiting = 0 if is_pipelined else FULL * part.embedding
        weights = part.precision * part.layer
        if part.is_sharded and not is_pipelined:
            weights += FULL * part.layer  # as it is summed over ranks
        working = part.tokens * (2 * part.hidden + 2 * features)
        if mode == "layers":
            working += part.tokens * self._kept_by_layer()
        if mode == "chunks":
            working = self._in_chunks()
            weights += FULL * part.layer
        return waiting + weights + working

    def _in_chunks(self) -> int:
        """Sum the gradients of the row's hidden states on both sides; its keys and values, their
        gradients in float32 and a chunk's to them; a chunk's activations and their gradients."""
        part, size = self.part, self.part.precision
        keys = part.shape.key_value_heads * part.shape.head_dim
        of_row = 2 * part.hidden + 2 * keys * (2 * size + FULL)
        chunk = min(part.config.tokens_per_chunk, part.tokens)
        features = 2 * size * part.shape.intermediate_per_token
        of_chunk = self._kept_by_layer() + 2 * part.hidden + features
        # on a CPU a mask says which of the row's keys a chunk's queries see
        mask = 0 if part.config.gpus_per_rank else size * part.tokens
        return part.tokens * of_row + chunk * (of_chunk + mask)

    def _embedding_gradients(self) -> int:
        """Sum gradients of the vocabulary's matrices: head, embedding, and as summed over ranks."""
        part = self.part
        summed = FULL * part.num_embeddings * part.embedding if part.is_sharded else 0
        return 2 * FULL * part.embedding + summed
