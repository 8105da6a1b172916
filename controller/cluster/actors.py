"""Ray actors: how they are started and ended, and what their errors and deaths are to a user."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from paceline.configs.errors import ClusterError, UserError
from paceline.configs.imports import imports_uncollected

T = TypeVar("T")
SAVE_MEMORY = "lower learner.tokens_per_microbatch, rollout.max_num_seqs or rollout.kv_cache_mb"


@dataclass(frozen=True)
class LateClass:
    """A class by its import path, imported where it is called: in the process that needs it."""

    path: str

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Import the class and construct it."""
        module, _, name = self.path.partition(":")
        with imports_uncollected():
            imported = importlib.import_module(module)
        return getattr(imported, name)(*arguments, **keywords)


def start_actor(
    actor_class: Callable[..., Any],
    *arguments: Any,
    cpus: float,
    gpus: float,
    environment: Mapping[str, str],
    **options: Any,
) -> Any:
    """Start an actor with its resources reserved; return Ray's handle."""
    options |= {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": dict(environment)}}
    return ray.remote(actor_class).options(**options).remote(*arguments)


async def result_of(reference: Awaitable[T], died: type[Exception], who: str) -> T:
    """Await an actor's answer; a dead actor raises ``died``, a user's mistake is raised as itself.

    Raises:
        ClusterError: the actor ran out of memory.
    """
    try:
        return await reference
    except RayActorError as error:
        raise died(
            f"{who} died ({first_line(error)}): if memory ran out, {SAVE_MEMORY}; "
            "--resume continues from the last checkpoint"
        ) from error
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        if is_out_of_memory(error.cause):
            raise ClusterError(
                f"{who} ran out of memory ({first_line(error.cause)}): {SAVE_MEMORY}"
            ) from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, by an error of Python, numpy, or torch on GPU or CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def kill(actor: ActorHandle) -> None:
    """End an actor's process; one that is gone already is fine."""
    with contextlib.suppress(Exception):
        ray.kill(actor)
