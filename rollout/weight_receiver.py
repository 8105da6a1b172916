"""vLLM worker extension: load published weights into the live model (runs in vLLM's worker)."""

from __future__ import annotations

from typing import Any

from paceline.rollout.vllm_patches import repack_cpu_experts, repack_cpu_linears
from paceline.weights_sync.handle import WeightHandle, WeightSyncError
from paceline.weights_sync.shared_memory import read_weights, verify


class WeightReceiver:
    """Methods that vLLM adds to its worker, by ``worker_extension_cls``."""

    model_runner: Any

    def load_published_weights(self, handle: WeightHandle) -> int:
        """Copy every published tensor into the model; return the checksum of the bytes it copied.

        The bytes are verified before and after they are copied: a writer that comes too early may
        write meanwhile. It writes later versions, so bytes that are still right were right all
        along.

        Raises:
            WeightSyncError: the bytes are not those announced, before or after they were copied, or
                a parameter of the model was left as it was.
        """
        model = self.model_runner.get_model()
        loaded = model.load_weights(read_weights(handle))
        checksum = verify(handle)
        missing = {name for name, _ in model.named_parameters()} - loaded
        if missing:
            raise WeightSyncError(
                f"version {handle.version} left {len(missing)} parameters of the engine unchanged, "
                f"{sorted(missing)[0]} among them: published names do not match the architecture"
            )
        repack_cpu_linears(model)
        repack_cpu_experts(model)
        return checksum
