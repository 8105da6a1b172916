"""The rollout workers and how they sample."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from paceline.configs.schema.base import Section
from paceline.configs.vocabulary import SamplingParameters


class SamplingConfig(Section):
    """Sampling of completions in training; evaluation uses its own temperatures."""

    temperature: float = Field(default=1.0, gt=0)
    """Softmax temperature. Training needs randomness: 0 is refused."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus mass kept."""

    top_k: int = Field(default=0, ge=0)
    """Highest-probability tokens kept; 0 keeps all."""

    max_tokens: int = Field(default=64, ge=1)
    """Longest completion, the stop token included."""

    def parameters(self, stop_token_ids: tuple[int, ...]) -> SamplingParameters:
        """Return these settings as the plain record that requests carry."""
        return SamplingParameters(
            self.temperature, self.top_p, self.top_k, self.max_tokens, stop_token_ids
        )


class DraftingConfig(Section):
    """Drafting of tokens from other samples of the same prompt; the engine verifies them.

    What is sampled keeps its distribution; a step may yield several tokens of a sequence. How much
    is drafted is decided step by step by what it costs and saves on this machine.
    """

    max_tokens: int = Field(default=16, ge=1, le=32)
    """Tokens drafted for a sequence in a step, at most."""

    budget: Literal["makespan", "throughput", "none"] | None = None
    """Aim of drafting: to shorten the time until the last of a batch ends, or the time a token
    takes; `none` always drafts `max_tokens`. Null is `makespan` where training waits for its batch
    (`loop.max_lag: 0`), else `throughput`."""

    window: int = Field(default=16, ge=1)
    """Weight versions whose samples of a prompt are drafted from: the newest that sampled it."""

    max_memory_mb: int = Field(default=1024, ge=1)
    """Memory of an engine's drafter, in MiB; the oldest versions of any prompt leave first."""

    max_drift: float | None = Field(default=None, gt=0)
    """Largest divergence, in nats a token, of the policy from a version that is drafted from; an
    estimate from the steps' own measurement, which needs samples of older versions
    (`loop.max_lag` above 0). Null keeps the `window`."""

    corpus: tuple[str, ...] = ()
    """JSON-lines files of completions to draft from at the start: demonstrations, evaluations,
    `samples.jsonl` of an earlier run. A line holds `prompt` and `completion`, texts as the model
    sees them, or `prompt_token_ids` and `token_ids`; other keys do not matter."""


class RolloutConfig(Section):
    """One vLLM engine in each of `num_workers` Ray actors."""

    num_workers: int = Field(default=1, ge=1)
    """Rollout workers, each with an engine of its own."""

    tensor_parallel: int = Field(default=1, ge=1)
    """Accelerators an engine is spread over."""

    gpus_per_worker: float = Field(default=0, ge=0)
    """GPUs Ray reserves for a worker; 0 runs it on the CPU."""

    cpus_per_worker: float = Field(default=0, ge=0)
    """CPUs Ray reserves for a worker; 0 lets workers share a small machine."""

    max_num_seqs: int = Field(default=256, ge=1)
    """Sequences an engine decodes together."""

    kv_cache_mb: int = Field(default=128, ge=8)
    """KV cache of a CPU engine, in MiB."""

    gpu_memory_utilization: float = Field(default=0.85, gt=0, lt=1)
    """Share of a GPU's memory that an engine may take."""

    enforce_eager: bool = True
    """Run without graph capture and compilation; the CPU always does."""

    max_restarts: int = Field(default=1, ge=0)
    """How often a dead worker is replaced before the run ends with its error."""

    on_weight_update: Literal["recompute", "keep", "abort"] = "recompute"
    """Effect of a weight update on running sequences. `recompute`: their KV is rebuilt by the new
    weights; `keep`: they continue on the old KV, a mixture of versions; `abort`: they end,
    and any free worker continues them from their tokens."""

    segment_tokens: int = Field(default=0, ge=0)
    """Most tokens a sample grows by before its group goes back to be continued, perhaps elsewhere;
    0 samples to the end in one segment."""

    claim_seconds: float = Field(default=600.0, gt=0)
    """Longest a worker may hold a request. Then it is interrupted, and what it has is continued
    elsewhere."""

    answer_seconds: float = Field(default=60.0, gt=0)
    """A worker is replaced when its process gives no sign of life for this long, or leaves an
    interrupt unanswered. Loading weights may take `claim_seconds` where that is longer."""

    drafting: DraftingConfig | None = None
    """Speculative decoding from earlier samples; null decodes token by token."""

    coupled_sampling: bool = False
    """Sample by noise that is a function of a sample's seed, a token's position and the token, so
    that a sample is fixed by its seed and the weights: drafts, segments and workers change nothing,
    and drafts guess better. Off, each request draws from a generator of its own, as in vLLM."""

    router_replay: bool = False
    """For a mixture of experts: record which experts each token was sent to, and send it to them
    in training. Needs ``tensor_parallel: 1`` and ``enforce_eager: true``."""

    sampling: SamplingConfig = SamplingConfig()
    """How training completions are drawn."""

    @model_validator(mode="after")
    def _routing_can_be_recorded(self) -> Self:
        if self.router_replay and (self.tensor_parallel > 1 or not self.enforce_eager):
            raise ValueError(
                "rollout.router_replay records experts in the engine's own process, without "
                "compilation: set rollout.tensor_parallel to 1 and rollout.enforce_eager to true"
            )
        return self
