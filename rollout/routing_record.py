"""Record of the experts that vLLM routed every token to, for the learner to replay.

vLLM 0.32 has an interface for this (``enable_return_routed_experts``), of its second model runner
alone, which needs Triton: no engine on a CPU has it. This uses the same hook of vLLM's routers in
the first model runner. Written for vLLM 0.32, in one process and without compilation.

A token's experts are those of the first pass that read it: the pass that sampled what follows it.
What a weight update or a preemption has computed again does not count.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import vllm
from numpy.typing import NDArray
from torch import Tensor
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
    bind_routed_experts_capturer,
)
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from paceline.configs.errors import ModelError
from paceline.configs.vocabulary import NOT_ROUTED
from paceline.rollout.vllm_patches import model_runner, require_known_version

Experts = NDArray[np.int16]
"""Experts of T tokens: [T, layers, K]; layers without experts hold zeros."""


@dataclass(frozen=True)
class StepPart:
    """A request's part of a step: the rows from ``row`` on are its tokens from ``start`` on.

    ``slots`` int64 are the places in the KV cache of its tokens ``[num_known, stop)``: of those
    that it reads in this step, and of those before it that the prefix cache gave it.
    """

    vllm_id: str
    row: int
    start: int
    stop: int
    num_known: int
    slots: NDArray[np.int64]


@dataclass
class RecordedExperts:
    """The experts of a request's first ``num_tokens`` tokens, in pieces."""

    pieces: list[Experts] = field(default_factory=list)
    num_tokens: int = 0

    def add(self, experts: Experts) -> None:
        """Append the experts of the tokens that come next."""
        self.pieces.append(experts)
        self.num_tokens += len(experts)


class RoutingRecord:
    """The experts of every request of an engine, from its first token to its last.

    Raises:
        ModelError: the engine's model has no experts, or its runner is not the one this knows.
    """

    def __init__(self, engine: vllm.LLMEngine) -> None:
        require_known_version()
        runner = model_runner(engine)
        config = runner.model_config
        if not config.is_moe or not isinstance(runner, GPUModelRunner):
            raise ModelError(
                f"rollout.router_replay cannot record the experts of {config.model}: it has none, "
                "or the engine runs it by vLLM's second model runner; switch it off, or set "
                "VLLM_USE_V2_MODEL_RUNNER=0"
            )
        self._runner = runner
        of_token = (config.get_total_num_hidden_layers(), config.get_num_experts_per_tok())
        self._table = runner.input_batch.block_table[0]
        num_slots = runner.kv_cache_config.num_blocks * self._table.block_size
        # of the prefix cache a request is given the KV of tokens that it never passed itself
        self._of_slots: Experts = np.full((num_slots, *of_token), NOT_ROUTED, np.int16)
        self._of_step: Experts = np.zeros((runner.max_num_tokens, *of_token), np.int16)
        self._of_requests: dict[str, RecordedExperts] = {}
        self._step: list[StepPart] = []
        self._prepare_inputs = runner._prepare_inputs
        runner._prepare_inputs = self._begin_step
        bind_routed_experts_capturer(runner.get_model(), self)

    def capture(self, layer_id: int, topk_ids: Tensor) -> None:
        """Store ``topk_ids`` [T, K] of all tokens of a step; every router calls it."""
        self._of_step[: len(topk_ids), layer_id] = topk_ids.cpu().numpy()

    def take(self, vllm_id: str, num_tokens: int) -> Experts:
        """Return and forget the experts of a finished request, int16 [num_tokens, layers, K].

        Call it right after the request's last step.
        """
        self._end_step()
        known = self._of_requests.pop(vllm_id, RecordedExperts())
        unread = np.full((num_tokens, *self._of_step.shape[1:]), NOT_ROUTED, np.int16)
        # of a drafted step there may be tokens beyond the request's end; its last was never read
        read = np.concatenate([*known.pieces, unread[:0]])[: max(0, num_tokens - 1)]
        unread[: len(read)] = read
        return unread

    def _begin_step(self, scheduler_output: Any, counts: NDArray[np.int32]) -> Any:
        """Place the step's requests; the runner calls it once it knows their numbers of tokens."""
        self._end_step()
        batch = self._runner.input_batch
        row = 0
        for index, (vllm_id, count) in enumerate(zip(batch.req_ids, counts.tolist(), strict=True)):
            start = int(batch.num_computed_tokens_cpu[index])
            known = self._of_requests.setdefault(vllm_id, RecordedExperts())
            num_known = min(start, known.num_tokens)
            slots = self._slots(index, num_known, start + count)
            self._step.append(StepPart(vllm_id, row, start, start + count, num_known, slots))
            row += count
        return self._prepare_inputs(scheduler_output, counts)

    def _end_step(self) -> None:
        """Give what the last step's routers chose to its requests."""
        for placed in self._step:
            read = self._of_step[placed.row : placed.row + placed.stop - placed.start]
            self._of_slots[placed.slots[placed.start - placed.num_known :]] = read
        # only now: of requests that came together one may have read what another finds in the cache
        for placed in self._step:
            request = self._runner.requests.get(placed.vllm_id)
            known = self._of_requests.get(placed.vllm_id)
            if request is None or known is None:
                continue
            # the last token was sampled in this step; a draft in its place, or after it, was wrong
            end = min(placed.stop, request.num_tokens - 1)
            slots = placed.slots[known.num_tokens - placed.num_known : end - placed.num_known]
            known.add(self._of_slots[slots])
        self._step.clear()

    def _slots(self, index: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the KV cache slots of tokens ``[start, stop)`` of the batch's request at
        ``index``."""
        places = np.arange(start, stop)
        blocks = self._table.block_table.np[index, places // self._table.block_size]
        return blocks.astype(np.int64) * self._table.block_size + places % self._table.block_size
