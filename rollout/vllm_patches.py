"""Every change Paceline makes to vLLM, in one place, each guarded by the version it was read in.

Nothing here runs at import: ``VLLMEngine`` applies what it needs, explicitly, before it loads a
model.
"""

from __future__ import annotations

import weakref
from typing import Any

import vllm
from torch import nn
from vllm.model_executor.layers import utils

PATCHED_VERSION = "0.32"

_packed_layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_original_dispatch: Any = None


def keep_cpu_linear_weights() -> None:
    """Keep the plain weight beside its packed form, so that CPU linears can be updated.

    Defect (vLLM 0.32, ``model_executor/layers/utils.py::dispatch_cpu_unquantized_gemm``): on the
    CPU a linear layer's weight is packed for oneDNN when the model is loaded and then replaced by
    an empty tensor. ``load_weights`` has nowhere to write afterwards; and a tied ``lm_head``, whose
    weight is kept, goes on multiplying with the packed copy of the OLD weight: outputs are wrong in
    silence. We keep ``weight`` and remember the layer; ``repack_cpu_linears`` packs again after
    each update.

    Raises:
        RuntimeError: another vLLM version than the one this was read in.
    """
    global _original_dispatch
    if _original_dispatch is not None:
        return
    if not vllm.__version__.startswith(PATCHED_VERSION):
        raise RuntimeError(
            f"vLLM {vllm.__version__} is installed; the CPU weight patch was written for "
            f"{PATCHED_VERSION}: re-read rollout/vllm_patches.py before moving the pin"
        )
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
