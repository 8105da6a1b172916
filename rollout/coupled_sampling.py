"""Coupled sampling inside vLLM: what is sampled is fixed by a request's seed and the weights.

Stock vLLM draws from a generator that each request carries along; how far it has got depends on
what was drafted. Here every token is ``argmax(processed logits + noise)``, the noise a function of
the request's seed, the token's position in its sequence, prompt included, and the token
(``paceline.spec.noise``). A drafted token is accepted if it equals the one that is sampled at its
position. So drafted and undrafted runs are the same token for token wherever their logits are, at
any temperature (arXiv 2408.07978), and so are runs that were cut into segments or moved to another
worker. Greedy requests stay greedy, and log-probabilities are vLLM's processed ones.

Written for vLLM 0.32: two modules take the place of a model runner's ``sampler``
(``v1/sample/sampler.py``) and ``rejection_sampler`` (``v1/sample/rejection_sampler.py``). They know
temperature, top-k and top-p, all that our requests ask for; anything else is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from paceline.rollout.vllm_patches import require_known_version
from paceline.spec.noise import UNIFORM_BITS, draw, position_streams, shifted

GREEDY_BELOW = 1e-5
"""Temperature below which vLLM samples greedily."""

NOISE_IN_CACHE = 1 << 17
NOISE_IN_MEMORY = 1 << 24
"""Elements of noise made at a time, of 8 bytes each and as much again for each temporary: on a CPU
what its cache holds (three times as fast), elsewhere a negligible share of memory."""


def sample_coupled(worker: Any) -> None:
    """Make a vLLM worker sample coupled from now on; every request must have a seed.

    Raises:
        RuntimeError: another vLLM version than the one this was written for.
    """
    require_known_version()
    runner = worker.model_runner
    assert not runner.use_async_scheduling, "positions are known when the last step is over"
    assert runner.sampler.logprobs_mode == "processed_logprobs"
    runner.sampler = CoupledSampler(runner)
    if runner.speculative_config is not None:
        runner.rejection_sampler = CoupledVerifier(runner.sampler)


@dataclass(kw_only=True)
class RowMetadata(SamplingMetadata):
    """vLLM's sampling metadata for every row of logits, with its seed and position, int64 [N]."""

    seeds: Tensor
    positions: Tensor


class CoupledSampler(Sampler):
    """Sampler of one token after every row of logits."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner.sampler.logprobs_mode)
        self._runner = runner

    def forward(
        self,
        logits: Tensor,
        sampling_metadata: SamplingMetadata,
        num_rows: Sequence[int] | None = None,
    ) -> SamplerOutput:
        """Return tokens int32 [N, 1], and log-probabilities if they are asked for.

        ``logits`` [N, V] may be overwritten. They hold ``num_rows`` rows of each request, one
        after the other (default: one): those of its next token, and of each after that.
        """
        counts = np.array(num_rows or [1] * len(logits), dtype=np.int64)
        assert counts.sum() == len(logits)
        return super().forward(logits, self._per_row(sampling_metadata, counts, logits.device))

    def sample(
        self,
        logits: Tensor,
        sampling_metadata: SamplingMetadata,
        logprobs_mode_override: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return tokens int64 [N] and processed log-probabilities [N, V], as vLLM's code
        expects."""
        if sampling_metadata.all_greedy:
            return super().sample(logits, sampling_metadata)
        assert isinstance(sampling_metadata, RowMetadata)
        temperature = sampling_metadata.temperature
        logits = self.apply_temperature(logits, temperature, sampling_metadata.all_random)
        logits = apply_top_k_top_p(logits, sampling_metadata.top_k, sampling_metadata.top_p)
        sampled = noisy_argmax(
            logits,
            sampling_metadata.seeds,
            sampling_metadata.positions,
            is_greedy=temperature < GREEDY_BELOW,
        )
        return sampled, self.compute_logprobs(logits)

    def _per_row(
        self, metadata: SamplingMetadata, counts: np.ndarray, device: torch.device
    ) -> RowMetadata:
        """Return each request's settings for each of its rows, and the positions sampled there."""
        require_supported(metadata)
        runner = self._runner
        seeds = [runner.requests[name].sampling_params.seed for name in runner.input_batch.req_ids]
        assert None not in seeds, "coupled sampling needs the seed of every request"
        assert len(seeds) == len(counts), "a row of the batch has no request"
        next_positions = runner.input_batch.num_tokens_no_spec[: len(seeds)]
        of_request = np.repeat(np.arange(len(counts)), counts)
        in_request = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        index = torch.from_numpy(of_request).to(device)

        def per_row(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[index]

        known = {field.name: getattr(metadata, field.name) for field in fields(metadata)}
        known |= {name: per_row(known[name]) for name in ("temperature", "top_k", "top_p")}
        positions = next_positions[of_request].astype(np.int64) + in_request
        return RowMetadata(
            **known,
            seeds=torch.from_numpy(np.array(seeds, np.int64)[of_request]).to(device),
            positions=torch.from_numpy(positions).to(device),
        )


class CoupledVerifier(nn.Module):
    """Verifier that samples at every drafted position and after the last, and keeps what agrees."""

    def __init__(self, sampler: CoupledSampler) -> None:
        super().__init__()
        self.sampler = sampler

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: Tensor | None,
        logits: Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """Return tokens int32 [B, max_spec_len + 1], -1 after the first that was not drafted.

        ``logits`` [N, V] hold a row for each drafted token of a request and one more. How probable
        a drafter thought its drafts does not matter.
        """
        counts = [drafted + 1 for drafted in metadata.num_draft_tokens]
        every = self.sampler(logits, sampling_metadata, counts)
        sampled = every.sampled_token_ids[:, 0]
        is_right = torch.zeros_like(sampled, dtype=torch.bool)
        drafted_at = metadata.target_logits_indices
        is_right[drafted_at] = metadata.draft_token_ids == sampled[drafted_at]

        starts = metadata.bonus_logits_indices - drafted_counts(metadata)
        offsets = torch.arange(metadata.max_spec_len + 1, device=logits.device)
        # A request's last row is never right, so rows of the next one do not count.
        rows = (starts[:, None] + offsets).clamp_(max=len(sampled) - 1)
        num_right = is_right[rows].long().cumprod(dim=1).sum(dim=1, keepdim=True)
        tokens = sampled[rows].masked_fill(offsets > num_right, PLACEHOLDER_TOKEN_ID)
        return SamplerOutput(tokens, rows_of(every.logprobs_tensors, rows.flatten()))


def drafted_counts(metadata: SpecDecodeMetadata) -> Tensor:
    """Return the number of drafted tokens of each request, [B], on the device of the logits."""
    cumulative = metadata.cu_num_draft_tokens
    return cumulative.diff(prepend=cumulative.new_zeros(1))


def rows_of(logprobs: LogprobsTensors | None, rows: Tensor) -> LogprobsTensors | None:
    """Select the log-probabilities of these rows, in their order."""
    if logprobs is None:
        return None
    return LogprobsTensors(
        logprobs.logprob_token_ids[rows],
        logprobs.logprobs[rows],
        logprobs.selected_token_ranks[rows],
    )


def noisy_argmax(logits: Tensor, seeds: Tensor, positions: Tensor, is_greedy: Tensor) -> Tensor:
    """Return the token with the most logit + noise of each row, int64 [N]; greedy rows: no noise.

    ``logits`` [N, V] are those of the distribution to sample from, -inf where it has no mass.
    """
    tokens = torch.arange(logits.shape[1], device=logits.device)
    streams = position_streams(seeds, positions)
    most = NOISE_IN_CACHE if logits.device.type == "cpu" else NOISE_IN_MEMORY
    at_once = max(1, most // logits.shape[1])
    chosen = []
    for start in range(0, len(logits), at_once):
        rows = slice(start, start + at_once)
        noise = gumbel(streams[rows, None], tokens)
        noise.masked_fill_(is_greedy[rows, None], 0.0)
        chosen.append((logits[rows] + noise).argmax(dim=-1))
    return torch.cat(chosen)


def gumbel(streams: Tensor, tokens: Tensor) -> Tensor:
    """Compute ``paceline.spec.noise.gumbel`` in torch: float64, arguments broadcast."""
    bits = shifted(draw(streams, tokens), 64 - UNIFORM_BITS)
    uniform = bits.double().add_(0.5).mul_(2.0**-UNIFORM_BITS)
    return uniform.log_().neg_().log_().neg_()


def require_supported(metadata: SamplingMetadata) -> None:
    """Refuse settings that coupled sampling does not implement; our requests have none of them."""
    assert metadata.no_penalties and not metadata.bad_words_token_ids
    assert metadata.allowed_token_ids_mask is None and not metadata.logprob_token_ids
