"""All changes that Paceline makes to vLLM, and all uses of what vLLM offers no interface for.

In one place, guarded by the version it was read in. Nothing here runs at import: ``VLLMEngine``
applies what it needs, explicitly, before it loads a model. Only ``coupled_sampling.py`` stands by
itself: no repair but another way to sample, put in place of vLLM's after the model was loaded.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
import vllm
from torch import Tensor, nn
from vllm.model_executor.layers import utils
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.sample import rejection_sampler
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from paceline.configs.errors import ModelError

PATCHED_VERSION = "0.32"

_packed_layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_original_dispatch: Any = None
_original_prepare: Any = None


def require_known_version() -> None:
    """Refuse a vLLM that this file was not written for.

    Raises:
        RuntimeError: another vLLM version than the one this was read in.
    """
    if not vllm.__version__.startswith(PATCHED_VERSION):
        raise RuntimeError(
            f"vLLM {vllm.__version__} is installed; the changes to it were written for "
            f"{PATCHED_VERSION}: re-read rollout/vllm_patches.py before moving the pin"
        )


def keep_cpu_linear_weights() -> None:
    """Keep the plain weight beside its packed form, so that CPU linears can be updated.

    Defect (vLLM 0.32, ``model_executor/layers/utils.py::dispatch_cpu_unquantized_gemm``): on the
    CPU a linear layer's weight is packed for oneDNN when the model is loaded and then replaced by
    an empty tensor. ``load_weights`` has nowhere to write afterwards; and a tied ``lm_head``, whose
    weight is kept, goes on multiplying with the packed copy of the OLD weight: outputs are wrong in
    silence. We keep ``weight`` and remember the layer; ``repack_cpu_linears`` packs again after
    each update.
    """
    global _original_dispatch
    if _original_dispatch is not None:
        return
    require_known_version()
    _original_dispatch = utils.dispatch_cpu_unquantized_gemm

    def dispatch_and_remember(layer: nn.Module, remove_weight: bool) -> None:
        _original_dispatch(layer, remove_weight=False)
        _packed_layers.add(layer)

    utils.dispatch_cpu_unquantized_gemm = dispatch_and_remember


def repack_cpu_linears(model: nn.Module) -> None:
    """Pack the current weights of every linear of ``model`` that was packed when it was loaded."""
    for module in model.modules():
        if module in _packed_layers:
            _original_dispatch(module, remove_weight=False)


def repack_cpu_experts(model: nn.Module) -> None:
    """Pack the experts' weights that were just loaded in place of those packed before.

    Defect (vLLM 0.32, ``model_executor/layers/fused_moe/experts/cpu_moe.py``): on the CPU experts'
    weights are replaced by a packed form of the same shape when the model is loaded. A later
    ``load_weights`` writes plain rows into it, nothing packs them again (``unquantized_fused_moe_
    method.py::_setup_kernel`` does so only the first time), and outputs are wrong in silence.
    """
    for layer, experts in _cpu_experts(model):
        experts.process_weights_after_loading(layer)


def require_cpu_experts_without_padding(model: nn.Module) -> None:
    """Refuse experts whose weights vLLM's CPU kernels pad: what is published would not fit them.

    Raises:
        ModelError: the experts' width is no multiple of what the kernels compute at a time.
    """
    for _, experts in _cpu_experts(model):
        config = experts.moe_config
        width, padded = config.intermediate_size_per_partition, experts._padded_intermediate_size
        if width != padded(config):
            raise ModelError(
                f"the model's moe_intermediate_size is {width}; vLLM's CPU kernels work on "
                f"{padded(config)} features and cannot be given new weights of fewer: choose a "
                f"multiple of {experts._intermediate_alignment()}"
            )


def _cpu_experts(model: nn.Module) -> Iterator[tuple[RoutedExperts, CPUUnquantizedExperts]]:
    """Yield layers of experts and what computes them on a CPU."""
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        experts = getattr(kernel, "fused_experts", None)
        if isinstance(module, RoutedExperts) and isinstance(experts, CPUUnquantizedExperts):
            yield module, experts


def give_drafts_their_sampling_constraints() -> None:
    """Verify drafts on a CPU at their request's temperature, top-k and top-p.

    Defect (vLLM 0.32, ``utils/cpu_triton_utils.py::_expand_kernel_impl``, reached by
    ``v1/sample/rejection_sampler.py::expand_batch_to_tokens``): for anything but int64 the kernel
    writes into a converted copy of its output, which is then thrown away. Temperatures, top-k and
    top-p of drafted positions are uninitialised memory, and what is sampled there is biased in
    silence: log-probabilities look right, only the distribution is not. Greedy requests are not
    affected. Without drafting the function is never called.
    """
    require_known_version()
    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


def let_everybody_draft_nothing() -> None:
    """Make a step in which no request drafted a token as if drafting were off.

    Defect (vLLM 0.32, ``v1/worker/gpu_model_runner.py::_prepare_inputs``): where drafting is
    configured, every step goes through the rejection sampler. Without a drafted token that is work
    for nothing, and with top-k the engine ends: the largest top-k of no positions is asked for
    (``v1/sample/ops/topk_topp_sampler.py::apply_top_k_only``). Models with recurrent layers need
    the speculative path in every step; we serve none.
    """
    global _original_prepare
    require_known_version()
    if _original_prepare is None:
        _original_prepare = GPUModelRunner._prepare_inputs
        GPUModelRunner._prepare_inputs = _prepare_plainly_without_drafts


def _prepare_plainly_without_drafts(runner: Any, scheduler_output: Any, *rest: Any) -> Any:
    if scheduler_output.scheduled_spec_decode_tokens:
        return _original_prepare(runner, scheduler_output, *rest)
    configured, runner.speculative_config = runner.speculative_config, None
    try:
        return _original_prepare(runner, scheduler_output, *rest)
    finally:
        runner.speculative_config = configured


def expand_batch_to_tokens(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Tensor:
    """Repeat each request's value ``x`` [B] for all of its drafted tokens, [num_tokens].

    ``cu_num_tokens`` [B] are cumulative counts; ``replace_from`` becomes ``replace_to``.
    """
    cumulative = cu_num_tokens.to(torch.int64)
    counts = torch.diff(cumulative, prepend=cumulative.new_zeros(1))
    if replace_from != replace_to:
        x = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return x.repeat_interleave(counts, output_size=num_tokens)


def model_runner(engine: vllm.LLMEngine) -> Any:
    """Return the model runner of an engine in this process, with its batch and its proposer.

    Gap (vLLM 0.32): a ``custom_class`` proposer is told neither request ids nor prompts, and there
    is no way to reach it but this one.
    """
    return engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def ask_for_drafts_to_the_end(runner: Any) -> None:
    """Have the proposer asked wherever a sequence is in its context.

    Gap (vLLM 0.32, ``v1/worker/gpu_model_runner.py::_input_fits_in_drafter``): once the longest
    sequence of a batch has less room than the longest draft, no proposer is asked, for any
    sequence, nor told what became of its last drafts. Ours never drafts beyond a request's end.
    """
    runner.effective_drafter_max_model_len = runner.max_model_len + runner.num_spec_tokens


def abort_with_outputs(engine: vllm.LLMEngine, vllm_ids: list[str]) -> list[vllm.RequestOutput]:
    """End requests of one sample each; returns what they have, ``finish_reason`` ``abort``.

    Gap (vLLM 0.32, ``v1/engine/llm_engine.py::abort_request``): the synchronous engine forgets what
    an aborted request had sampled. The asynchronous one hands it over: ``OutputProcessor.
    abort_requests`` makes a last output, with log-probabilities and version spans, wherever a
    request has a queue to put it in. We give each a queue for that moment.
    """
    states = engine.output_processor.request_states
    queues = []
    for vllm_id in vllm_ids:
        queue = RequestOutputCollector(RequestOutputKind.FINAL_ONLY, vllm_id)
        states[vllm_id].queue = queue
        queues.append(queue)
    engine.abort_request(vllm_ids, internal=True)
    outputs = [queue.get_nowait() for queue in queues]
    assert all(isinstance(output, vllm.RequestOutput) for output in outputs), outputs
    return outputs


def has_sampled(engine: vllm.LLMEngine, vllm_id: str) -> bool:
    """Return whether a request has its first token (vLLM 0.32 keeps tokens in ``RequestState``)."""
    state = engine.output_processor.request_states[vllm_id]
    return state.detokenizer.num_output_tokens() > 0
