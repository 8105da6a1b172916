"""Conversions between our records and vLLM's."""

from __future__ import annotations

import numpy as np
import vllm
from numpy.typing import NDArray
from vllm.sampling_params import RequestOutputKind

from paceline.configs.vocabulary import (
    Completion,
    RolloutRequest,
    SamplingParameters,
    VersionSpan,
    WeightVersion,
)
from paceline.rollout.segments import SampleTask
from paceline.spec.proposer import DraftRequest


def sampling_params(
    sampling: SamplingParameters, task: SampleTask, seed: int
) -> vllm.SamplingParams:
    """Return our sampling settings in vLLM's terms, for one segment of one sample."""
    return vllm.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or -1,
        max_tokens=task.max_tokens,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=True,  # what ends a completion is said by the request alone
        seed=seed,
        logprobs=0,  # only the sampled token's
        prompt_logprobs=0 if task.num_scored else None,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,  # no other object holds it
    )


def draft_request(
    request: RolloutRequest, task: SampleTask, coupled_seed: int | None
) -> DraftRequest:
    """Return what the proposer must know of one segment of one sample."""
    return DraftRequest(
        request.prompt_token_ids,
        task.token_ids,
        task.max_tokens,
        frozenset(request.sampling.stop_token_ids),
        coupled_seed,
    )


def completion(output: vllm.CompletionOutput) -> Completion:
    """Return what vLLM sampled in one segment; `length` is the segment's end."""
    spans = tuple(
        VersionSpan(WeightVersion(int(span.version)), span.start, span.end)
        for span in output.weight_versions or ()
    )
    assert output.finish_reason in ("stop", "length", "abort"), output.finish_reason
    return Completion(
        token_ids=np.asarray(output.token_ids, dtype=np.int32),
        logprobs=np.asarray(output.logprobs.logprobs, dtype=np.float32),
        versions=spans,
        finish_reason=output.finish_reason,
    )


def scores(output: vllm.RequestOutput, count: int) -> NDArray[np.float32]:
    """Return log-probabilities of the prompt's last ``count`` tokens; zeros if it was aborted."""
    found = output.prompt_logprobs
    if not found:
        return np.zeros(count, dtype=np.float32)
    # flat: one number a token, for no other tokens were asked for
    return np.asarray(found.logprobs[-count:], dtype=np.float32)
