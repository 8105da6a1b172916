"""Environment variables that an engine's process needs before vLLM is imported (no vLLM here)."""

from __future__ import annotations


def engine_environment(*, on_gpu: bool) -> dict[str, str]:
    """Return the environment variables for a rollout worker's process.

    The engine core runs inside the actor: no second process to supervise, and weights can be
    swapped between two of our own steps. On the CPU one thread serves an engine (two contending
    OpenMP pools collapse small matrix products), and dynamo is off because the one compiled
    function left, vLLM's log-probability rank count, stalls the first request by 15-19 s and
    recompiles at new batch shapes.
    """
    common = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if on_gpu:
        return common
    return common | {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCHDYNAMO_DISABLE": "1",
    }
