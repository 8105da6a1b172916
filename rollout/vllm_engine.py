"""Stock vLLM behind the ``Engine`` protocol: in-process, stepped by us, tokens in, tokens out.

What a weight update does to running requests is ``rollout.on_weight_update``:

- ``recompute``: their KV is dropped and computed anew. Tokens after the switch are exactly the new
  policy's, attention to the old version's tokens included.
- ``keep``: they go on attending to the KV they have: tokens after the switch are a mixture of
  policies. Only they: what had not begun begins with the new weights alone.
- ``abort``: they end with what they have, to be continued by any engine. That engine computes all
  KV by its own weights: exact, as ``recompute``.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import vllm
from transformers import PretrainedConfig
from vllm.inputs import TokensPrompt
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from paceline.configs.errors import DataError, ModelError
from paceline.configs.schema.rollout import DraftingConfig, RolloutConfig
from paceline.configs.vocabulary import (
    DraftText,
    RolloutRequest,
    WeightVersion,
)
from paceline.rollout.coupled_sampling import sample_coupled
from paceline.rollout.engine import RolloutResult
from paceline.rollout.routing_record import RoutingRecord
from paceline.rollout.segments import (
    NOTHING_YET,
    ActiveRequest,
    ScoringRequest,
    SegmentRequest,
)
from paceline.rollout.vllm_patches import (
    abort_with_outputs,
    ask_for_drafts_to_the_end,
    give_drafts_their_sampling_constraints,
    has_sampled,
    keep_cpu_linear_weights,
    let_everybody_draft_nothing,
    model_runner,
    require_cpu_experts_without_padding,
    require_known_version,
)
from paceline.rollout.vllm_records import completion, draft_request, sampling_params, scores
from paceline.spec.proposer import SuffixProposer
from paceline.weights_sync.handle import WeightHandle

MIN_BATCHED_TOKENS = 4096


class VLLMEngine:
    """One vLLM ``LLMEngine``; see ``Engine`` for the contract.

    Tokenizer-free: prompts come as ids, completions leave as ids. Log-probabilities are vLLM's
    *processed* ones (after temperature, top-k and top-p), the default being the raw ones, which are
    not those of the sampling distribution.

    With ``fixed_version`` it serves the folder's own weights under that name from the start: a
    teacher, which also has room to score completions of ``max_length`` tokens with their prompts.

    ``speculative_config`` is one of vLLM's own, in place of what ``rollout.drafting`` makes of it:
    for baselines and for drafters that are right or wrong on purpose.
    """

    def __init__(
        self,
        model_folder: str,
        config: RolloutConfig,
        *,
        max_length: int,
        dtype: str,
        seed: int,
        fixed_version: WeightVersion | None = None,
        speculative_config: Mapping[str, Any] | None = None,
    ) -> None:
        require_known_version()
        if current_platform.is_cpu():
            keep_cpu_linear_weights()
        speculative = speculative_config or speculation(config.drafting)
        if speculative is not None:
            let_everybody_draft_nothing()
            if current_platform.is_cpu():
                give_drafts_their_sampling_constraints()
        arguments = vllm.EngineArgs(
            model=model_folder,
            skip_tokenizer_init=True,
            dtype=dtype,
            max_model_len=max_length if fixed_version is None else max_length + 1,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=max(MIN_BATCHED_TOKENS, max_length),
            tensor_parallel_size=config.tensor_parallel,
            enforce_eager=config.enforce_eager or current_platform.is_cpu(),
            # After a part of a prompt vLLM 0.32 rewinds the seeded generator, which a CPU generator
            # refuses (v1/worker/gpu_model_runner.py::_bookkeeping_sync): there they go in whole.
            enable_chunked_prefill=False if current_platform.is_cpu() else None,
            kv_cache_memory_bytes=config.kv_cache_mb << 20 if current_platform.is_cpu() else None,
            gpu_memory_utilization=config.gpu_memory_utilization,
            worker_extension_cls="paceline.rollout.weight_receiver.WeightReceiver",
            logprobs_mode="processed_logprobs",
            # A token of the step that is running must not be labelled with the version that comes
            # after it: weights change between steps, so steps must not overlap.
            async_scheduling=False,
            disable_log_stats=True,
            speculative_config=speculative,
            seed=seed,
            hf_overrides={}
            if fixed_version is None
            else functools.partial(with_positions, max_length + 1),
        )
        self._engine = start_engine(arguments)
        self._is_coupled = config.coupled_sampling
        if self._is_coupled:
            self._engine.collective_rpc(sample_coupled)
        if current_platform.is_cpu():
            require_cpu_head_size(self._engine.vllm_config.model_config.get_head_size())
            require_cpu_experts_without_padding(model_runner(self._engine).get_model())
        self._proposer = None
        if speculative_config is None and config.drafting is not None:
            self._proposer = self._attached_proposer(config.drafting)
        self._routing = RoutingRecord(self._engine) if config.router_replay else None
        self._max_length = max_length
        self._on_update = config.on_weight_update
        self._version = fixed_version
        self._checksum: int | None = None
        if fixed_version is not None:
            self._engine.set_weight_version(str(fixed_version))
        self._num_updates = 0
        self._active: dict[str, ActiveRequest] = {}
        self._running: dict[str, RunningSample] = {}
        self._finished: list[ActiveRequest] = []

    @property
    def version(self) -> WeightVersion | None:
        """The version served now; None before the first update."""
        return self._version

    @property
    def checksum(self) -> int | None:
        """The xxh3-64 of the bytes that version was loaded from; None for the folder's own."""
        return self._checksum

    def add(self, request: RolloutRequest) -> None:
        """Queue a request: every unfinished sample of it, after the tokens it has.

        Raises:
            DataError: prompt and completion budget do not fit the context.
        """
        num_prompt, budget = len(request.prompt_token_ids), request.sampling.max_tokens
        if num_prompt + budget > self._max_length:
            raise DataError(
                f"request {request.request_id}: prompt of {num_prompt} tokens and max_tokens "
                f"{budget} exceed the context of {self._max_length}: shorten it or raise "
                "model.max_length"
            )
        assert request.request_id not in self._active, f"{request.request_id} is here already"
        active = ScoringRequest(request) if request.scores else SegmentRequest(request)
        for index in active.open_samples:
            self._enqueue(active, index)
        self._active[request.request_id] = active
        if active.is_finished:
            self._finished.append(active)

    def step(self) -> list[RolloutResult]:
        """Run one engine step; return the requests whose every sample ended its segment."""
        if self._running:
            started = time.perf_counter()
            outputs = self._engine.step()
            if self._proposer is not None:
                self._proposer.step_took(time.perf_counter() - started)
            for output in outputs:
                self._collect(output)
        return self._take_finished()

    @property
    def draft_counters(self) -> Mapping[str, float]:
        """Running totals of drafting; empty where nothing is drafted."""
        return {} if self._proposer is None else asdict(self._proposer.counters)

    def has_work(self) -> bool:
        """Return whether any request has not been answered."""
        return bool(self._active)

    def interrupt(self, request_id: str) -> RolloutResult | None:
        """Abort a request and return what it has; None if it was answered or never came."""
        active = self._active.pop(request_id, None)
        if active is None:
            return None
        self._abort([sample_id(request_id, index) for index in active.open_samples])
        self._finished.remove(active)
        return active.result()

    def update_weights(self, handle: WeightHandle) -> list[RolloutResult]:
        """Load a published version; `rollout.on_weight_update` decides about running requests."""
        if self._on_update == "abort":
            self._abort(list(self._running))
        found = self._engine.collective_rpc("load_published_weights", args=(handle,))
        (self._checksum,) = set(found)  # one for all of vLLM's workers
        self._engine.set_weight_version(str(handle.version))
        self._version = handle.version
        if self._proposer is not None:
            self._proposer.serve(handle.version)
        self._num_updates += 1
        if self._on_update == "keep":
            self._requeue_unstarted()
        else:
            self._engine.reset_prefix_cache(reset_running_requests=True)
        return self._take_finished()

    def add_draft_text(self, texts: Sequence[DraftText]) -> None:
        """Draft from these completions too; does nothing in an engine that does not draft."""
        if self._proposer is not None:
            self._proposer.add_draft_text(texts)

    def drop_draft_text(self, before: int) -> None:
        """Stop drafting from completions of versions before ``before``."""
        if self._proposer is not None:
            self._proposer.history.forget(before)

    def _enqueue(self, active: ActiveRequest, index: int) -> None:
        """Give vLLM a sample as a request of its own, so that it can be aborted alone."""
        task = active.task(index)
        prompt: TokensPrompt = {"prompt_token_ids": list(task.token_ids)}
        if self._on_update == "keep":
            # Blocks in the prefix cache are found by content and salt: those that older weights
            # computed stay in use by their own sequences and cannot be hit by later ones.
            prompt["cache_salt"] = f"update {self._num_updates}"
        name = sample_id(active.request.request_id, index)
        seed = task.sample_seed if self._is_coupled else task.seed
        parameters = sampling_params(active.request.sampling, task, seed)
        vllm_id = self._engine.add_request(name, prompt, parameters)
        self._running[name] = RunningSample(active, index, vllm_id, task.num_scored)
        if self._proposer is not None and not task.num_scored:
            coupled_seed = seed if self._is_coupled else None
            self._proposer.begin(vllm_id, draft_request(active.request, task, coupled_seed))

    def _collect(self, output: vllm.RequestOutput) -> None:
        """Close the sample that an output ends."""
        sample = self._running.pop(output.request_id)
        new = completion(output.outputs[0])
        if self._routing is not None:
            num_tokens = len(output.prompt_token_ids) + len(new.token_ids)
            new = replace(new, routed_experts=self._routing.take(sample.vllm_id, num_tokens))
        if sample.num_scored:
            new = replace(new, logprobs=scores(output, sample.num_scored))
        elif self._proposer is not None:
            by_itself = new.finish_reason == "stop"
            sources = self._proposer.finish(sample.vllm_id, new.token_ids, by_itself)
            new = replace(new, draft_sources=sources)
        sample.active.close_sample(sample.index, new)
        if sample.active.is_finished:
            self._finished.append(sample.active)

    def _attached_proposer(self, drafting: DraftingConfig) -> SuffixProposer:
        """Return the proposer that vLLM built, attached to the rows of its batch."""
        runner = model_runner(self._engine)
        proposer = runner.drafter
        assert isinstance(proposer, SuffixProposer)
        ask_for_drafts_to_the_end(runner)
        proposer.attach(drafting, lambda: runner.input_batch.req_ids)
        return proposer

    def _take_finished(self) -> list[RolloutResult]:
        """Return and forget the requests whose segments are finished."""
        results = [active.result() for active in self._finished]
        self._finished.clear()
        for result in results:
            del self._active[result.request_id]
        return results

    def _abort(self, names: list[str]) -> None:
        """Stop samples, and close each with what it has."""
        vllm_ids = [self._running[name].vllm_id for name in names]
        for output in abort_with_outputs(self._engine, vllm_ids):
            self._collect(output)

    def _requeue_unstarted(self) -> None:
        """Bring samples that wait for their first token under the salt of the new weights."""
        waiting = [s for s in self._running.values() if not has_sampled(self._engine, s.vllm_id)]
        abort_with_outputs(self._engine, [sample.vllm_id for sample in waiting])
        for sample in waiting:
            if self._routing is not None:
                self._routing.take(sample.vllm_id, 0)
            if self._proposer is not None and not sample.num_scored:
                self._proposer.finish(sample.vllm_id, NOTHING_YET.token_ids, by_itself=False)
            self._enqueue(sample.active, sample.index)


@dataclass(frozen=True)
class RunningSample:
    """A sample that vLLM works on, and its id in vLLM."""

    active: ActiveRequest
    index: int
    vllm_id: str
    num_scored: int


def with_positions(count: int, config: PretrainedConfig) -> PretrainedConfig:
    """Return a model's configuration with at least ``count`` positions.

    To score a context's last token vLLM wants room for one more. The model does not need it:
    positions are rotary, and one beyond those trained changes nothing before it. A model that has
    more keeps its number, on which some kinds of scaling depend.
    """
    text = config.get_text_config()
    if getattr(text, "max_position_embeddings", count) < count:
        text.max_position_embeddings = count
    return config


def sample_id(request_id: str, index: int) -> str:
    """Return the name of one sample of a request."""
    return f"{request_id}/{index}"


def speculation(drafting: DraftingConfig | None) -> dict[str, Any] | None:
    """Return vLLM's settings for our proposer."""
    if drafting is None:
        return None
    return {
        "method": "custom_class",
        "model": f"{SuffixProposer.__module__}.{SuffixProposer.__name__}",
        "num_speculative_tokens": drafting.max_tokens,
    }


def start_engine(arguments: vllm.EngineArgs) -> vllm.LLMEngine:
    """Load the model into an engine in this process.

    Raises:
        ModelError: vLLM refuses it.
    """
    try:
        return vllm.LLMEngine.from_engine_args(arguments, enable_multiprocessing=False)
    except Exception as error:
        # vLLM and what it loads raise all sorts: about the model's files, its kind, or its size.
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"vLLM cannot serve the model {arguments.model} ({type(error).__name__}: {reason}): "
            "choose another model, or correct the section of its engine: rollout, or teacher"
        ) from error


def require_cpu_head_size(head_size: int) -> None:
    """Refuse what vLLM's CPU attention would refuse at the first request, deep inside a kernel.

    Raises:
        ModelError: there is no CPU kernel for this head size.
    """
    supported = CPUAttentionBackend.get_supported_head_sizes()
    if head_size not in supported:
        raise ModelError(
            f"the model's head_dim is {head_size}; vLLM's CPU attention has kernels for "
            f"{supported}: choose one of them"
        )
