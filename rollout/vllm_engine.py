"""Stock vLLM behind the ``Engine`` protocol: in-process, stepped by us, tokens in, tokens out."""

from __future__ import annotations

import numpy as np
import vllm
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from paceline.configs.errors import DataError, ModelError
from paceline.configs.schema.rollout import RolloutConfig
from paceline.configs.vocabulary import (
    Completion,
    RolloutRequest,
    SamplingParameters,
    VersionSpan,
    WeightVersion,
)
from paceline.rollout.engine import RolloutResult
from paceline.rollout.vllm_patches import keep_cpu_linear_weights
from paceline.weights_sync.handle import WeightHandle

MIN_BATCHED_TOKENS = 4096


class VLLMEngine:
    """One vLLM ``LLMEngine``; see ``Engine`` for the contract.

    Tokenizer-free: prompts come as ids, completions leave as ids. Log-probabilities are vLLM's
    *processed* ones (after temperature, top-k and top-p), the default being the raw ones, which are
    not those of the sampling distribution.
    """

    def __init__(
        self, model_folder: str, config: RolloutConfig, *, max_length: int, dtype: str, seed: int
    ) -> None:
        if current_platform.is_cpu():
            keep_cpu_linear_weights()
        arguments = vllm.EngineArgs(
            model=model_folder,
            skip_tokenizer_init=True,
            dtype=dtype,
            max_model_len=max_length,
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
            seed=seed,
        )
        self._engine = start_engine(arguments)
        if current_platform.is_cpu():
            require_cpu_head_size(self._engine.vllm_config.model_config.get_head_size())
        self._max_length = max_length
        self._version: WeightVersion | None = None

    @property
    def version(self) -> WeightVersion | None:
        """The version served now; None before the first update."""
        return self._version

    def add(self, request: RolloutRequest) -> None:
        """Queue a request.

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
        self._engine.add_request(
            request.request_id,
            {"prompt_token_ids": list(request.prompt_token_ids)},
            sampling_params(request.sampling, request.num_samples, request.seed),
        )

    def step(self) -> list[RolloutResult]:
        """One engine step; requests whose every sample ended come back."""
        outputs = self._engine.step()
        return [
            RolloutResult(output.request_id, tuple(map(completion, output.outputs)))
            for output in outputs
            if output.finished
        ]

    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self._engine.has_unfinished_requests()

    def update_weights(self, handle: WeightHandle) -> None:
        """Load a published version; KV of running requests is dropped and computed anew.

        Tokens after the switch are therefore exactly the new policy's, attention to the old
        version's tokens included.
        """
        self._engine.collective_rpc("load_published_weights", args=(handle,))
        self._engine.reset_prefix_cache(reset_running_requests=True)
        self._engine.set_weight_version(str(handle.version))
        self._version = handle.version


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
            "choose another model, or correct the rollout section"
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


def sampling_params(
    sampling: SamplingParameters, num_samples: int, seed: int
) -> vllm.SamplingParams:
    """Our sampling settings in vLLM's terms; sample ``i`` gets seed ``seed + i``."""
    return vllm.SamplingParams(
        n=num_samples,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or -1,
        max_tokens=sampling.max_tokens,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=True,  # what ends a completion is said by the request alone
        seed=seed,
        logprobs=0,  # only the sampled token's
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def completion(output: vllm.CompletionOutput) -> Completion:
    """A finished vLLM output as our record."""
    spans = tuple(
        VersionSpan(WeightVersion(int(span.version)), span.start, span.end)
        for span in output.weight_versions or ()
    )
    return Completion(
        token_ids=np.asarray(output.token_ids, dtype=np.int32),
        logprobs=np.asarray(output.logprobs.logprobs, dtype=np.float32),
        versions=spans,
        finish_reason="stop" if output.finish_reason == "stop" else "length",
    )
