"""Peak memory of a learner rank: in the backward pass of a full microbatch.

Counted is what torch allocates, tensor by tensor, as the code is: what transformers' layers keep
for the backward pass, our own head that never holds logits whole, FSDP's gathered layers. Not
counted are the allocator's slack, the libraries' own buffers and what communication takes.
`tests/learner/test_memory_forecast.py` measures ranks beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.configs.forecast.activation_memory import ActivationMemory
from paceline.configs.forecast.model_shape import ModelShape
from paceline.configs.forecast.rank_part import FULL, RankPart, rank_parts
from paceline.configs.schema import RunConfig
from paceline.configs.schema.algorithm import critic_of, reference_of

Parts = dict[str, int]
"""Bytes, by what takes them."""

CHECKPOINT_COPY = "checkpoint's copy"
LOADING = "more while it loads"

LARGEST_BUCKET = 50_000_000
"""Elements DeepSpeed reduces or gathers at once, as in `learner/engines/deepspeed_engine.py`."""

MOST_GATHERED = 1_000_000_000
"""Parameters that ZeRO stage 3 keeps whole from the forward to the backward pass, its default."""


@dataclass(frozen=True)
class LearnerMemory:
    """Bytes where a rank computes (``rank``), and in host memory beside its GPU (``host``)."""

    rank: Parts
    host: Parts


def learner_memory(config: RunConfig, shape: ModelShape) -> LearnerMemory:
    """Return the bytes of the rank that holds most where it computes."""
    found = [_memory(config, part) for part in rank_parts(config, shape)]
    return max(found, key=lambda memory: sum(memory.rank.values()))


def _memory(config: RunConfig, part: RankPart) -> LearnerMemory:
    critic, reference = critic_of(config.algorithm), reference_of(config.algorithm)
    num_trained = 2 if critic is not None and critic.backbone == "separate" else 1
    state = _State(part)
    rank, host = state.here(), state.off_loaded()
    if num_trained == 2:
        rank["critic"], host["critic"] = sum(rank.values()), sum(host.values())
    if reference is not None:
        where = host if reference.offload else rank
        where["reference"] = FULL * part.sharded(part.parameters)
    activations = ActivationMemory(part)
    rank |= {
        "gathered weights": state.gathered(activations.kept()),
        "activations": activations.kept(),
        "sent between stages": activations.sent(),
        "work space": activations.work_space(),
    }
    # weights and moments as they are saved beside training; DeepSpeed gives a copy of them
    host[CHECKPOINT_COPY] = 3 * FULL * part.sharded(part.parameters) * num_trained
    rank[CHECKPOINT_COPY] = host[CHECKPOINT_COPY] if part.config.engine == "deepspeed" else 0
    if part.config.gpus_per_rank:
        host[LOADING] = _more_to_load(part, 0, host)
        return LearnerMemory(rank, host)
    together = {name: rank.get(name, 0) + host.get(name, 0) for name in rank | host}
    num_before = num_trained - (reference is None)
    together[LOADING] = _more_to_load(part, num_before, together)
    return LearnerMemory(together, {})


def _more_to_load(part: RankPart, num_before: int, later: Parts) -> int:
    """Return the bytes that the last model takes beyond ``later`` while it is loaded: it is whole
    on every rank until the rank's shard is cut out, beside ``num_before`` models with their
    moments."""
    shard = FULL * part.sharded(part.parameters)
    loading = FULL * part.shape.num_parameters + shard + 3 * shard * num_before
    return max(0, loading - sum(later.values()))


@dataclass(frozen=True)
class _State:
    """Weights, gradients and both of Adam's moments of one trained model."""

    part: RankPart

    @property
    def _whole(self) -> int:
        return self.part.parameters

    @property
    def _shard(self) -> int:
        return self.part.sharded(self.part.parameters)

    @property
    def _zero(self) -> int:
        """DeepSpeed's stage; 0 without it."""
        config = self.part.config
        return config.deepspeed.stage if config.engine == "deepspeed" else 0

    @property
    def _is_off_loaded(self) -> bool:
        config = self.part.config
        return config.deepspeed.offload_optimizer if self._zero else config.offload_optimizer

    def here(self) -> Parts:
        """Return the bytes held where the rank computes."""
        found = {} if self._is_off_loaded else self._trained()
        if self._zero:
            weights = self._shard if self._zero == 3 else self._whole
            is_master = self._zero == 3 and not self._is_off_loaded and self.part.precision == FULL
            found["weights"] = 0 if is_master else self.part.precision * weights
        if self._zero == 1 or self.part.config.parallel.pipeline > 1:
            # summed over microbatches before they are reduced over ranks
            found["whole gradients"] = FULL * self._whole
        if self._zero == 1 and self.part.precision < FULL:
            found["whole gradients"] += self.part.precision * self._whole  # as they are computed
        return found

    def off_loaded(self) -> Parts:
        """Return the bytes held in host memory."""
        if not self._is_off_loaded:
            return {}
        found = self._trained()
        if self._zero:
            found["gradients"] += FULL * self._shard  # once more as they add up
        if 0 < self._zero < 3:
            found["weights on their way back"] = self.part.precision * self._shard
        return found

    def _trained(self) -> Parts:
        # stages of a pipeline have shards of gradients only after their first round
        is_first_round = self.part.config.parallel.pipeline > 1 and (
            self.part.round == self.part.num_microbatches
        )
        has_shards = not is_first_round and self._zero != 1
        return {
            "master weights": FULL * self._shard,
            "gradients": FULL * self._shard * has_shards,
            "optimiser": 2 * FULL * self._shard,
        }

    def gathered(self, kept: int) -> int:
        """Return the bytes of temporarily whole weights, beside ``kept`` bytes of activations.

        FSDP gathers the vocabulary's matrices, the layer at work and the next one. A pipeline's
        stage gathers all its layers in the end, when the activations of a pass are gone.
        """
        part = self.part
        if self._zero:
            return self._gathered_by_deepspeed(kept)
        if not part.is_sharded:
            return 0
        at_work = part.precision * (part.num_embeddings * part.embedding + 2 * part.layer)
        if part.config.parallel.pipeline == 1:
            return at_work
        return max(at_work, part.precision * self._whole - kept // len(part.under_way))

    def _gathered_by_deepspeed(self, kept: int) -> int:
        bucket = FULL * min(LARGEST_BUCKET, self._whole)
        if self._zero == 3:
            return bucket + self.part.precision * min(MOST_GATHERED, self._whole)
        # in host memory a new bucket takes none before it is filled, when activations are gone
        return bucket if self.part.config.gpus_per_rank else max(0, bucket - kept)
