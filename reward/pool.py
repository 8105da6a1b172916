"""Graders in processes of their own: one that hangs is killed, one that dies harms no other.

Processes are spawned, not forked: the process they grade for has many threads (Ray's, asyncio's),
whose locks a fork would copy in whatever state they are.
"""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from paceline.configs.errors import GraderError, UserError
from paceline.configs.vocabulary import Prompt
from paceline.reward.grader import Grader

_START_LIMIT_SECONDS = 300.0
_PARENT_CHECK_SECONDS = 1.0


class GraderPool:
    """Pool of ``num_processes`` processes, each with a grader of its own, that grade side by side.

    ``factory`` builds a grader; it must pickle, and runs once in each process, outside the time
    limit. The limit is for one group and counts from when a process takes it up.
    """

    def __init__(
        self, factory: Callable[[], Grader], num_processes: int, time_limit_seconds: float
    ) -> None:
        self._factory = factory
        self._num_processes = num_processes
        self._time_limit = time_limit_seconds
        self._pool = self._new_pool()
        self._closed = False

    async def start(self) -> None:
        """Start the processes and wait until a grader is built, so that a bad one shows at once.

        Raises:
            GraderError: the grader cannot be built.
        """
        future = self._schedule(_report_build, (), None)
        try:
            problem = await asyncio.wait_for(asyncio.wrap_future(future), _START_LIMIT_SECONDS)
        except TimeoutError as error:
            raise GraderError(
                f"the grader was not built within {_START_LIMIT_SECONDS:g} seconds; "
                f"see what its constructor waits for"
            ) from error
        except (ProcessExpired, BrokenProcessPool) as error:
            raise GraderError(_died("while the grader was built", error)) from error
        if problem is not None:
            raise GraderError(problem)

    async def grade(self, prompt: Prompt, completions: Sequence[str]) -> list[float]:
        """Return one finite reward for each completion.

        Raises:
            GraderError: the grader raised, hung, died or returned something else.
        """
        future = self._schedule(_grade, (prompt, tuple(completions)), self._time_limit)
        try:
            outcome = await asyncio.wrap_future(future)
        except (TimeoutError, FutureTimeoutError) as error:
            raise GraderError(
                f"grading prompt {prompt.id} took longer than {self._time_limit:g} seconds and was "
                f"killed; raise reward.time_limit_seconds, or set reward.on_error to drop"
            ) from error
        except (ProcessExpired, BrokenProcessPool) as error:
            raise GraderError(_died(f"while grading prompt {prompt.id}", error)) from error
        if isinstance(outcome, str):
            raise GraderError(outcome)
        return outcome

    def close(self) -> None:
        """Stop all processes, whatever they are doing; a second call does nothing."""
        if not self._closed:
            self._closed = True
            _stop(self._pool)

    def _schedule(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], limit: float | None
    ) -> ProcessFuture[Any]:
        assert not self._closed, "the pool is closed"
        try:
            return self._pool.schedule(function, args=arguments, timeout=limit)
        except RuntimeError:
            # pebble gives its pool up for good when a process dies while none is at work.
            _stop(self._pool)
            self._pool = self._new_pool()
            return self._pool.schedule(function, args=arguments, timeout=limit)

    def _new_pool(self) -> ProcessPool:
        return ProcessPool(
            max_workers=self._num_processes,
            initializer=_initialise,
            initargs=(self._factory, os.getpid()),
            context=multiprocessing.get_context("spawn"),
        )


def _stop(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


def _died(when: str, error: Exception) -> str:
    code = getattr(error, "exitcode", None)
    return (
        f"a grader process died {when}{'' if code is None else f' (exit code {code})'}; "
        f"exit code -9 or none is most often memory: lower reward.num_processes"
    )


# What follows runs in the grader's process, which holds one grader for life. Problems travel back
# as text: an exception that cannot be unpickled would break the pool.
_grader: Grader | None = None
_build_problem: str | None = None


def _initialise(factory: Callable[[], Grader], parent: int) -> None:
    global _grader, _build_problem
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    try:
        _grader = factory()
    except BaseException as error:
        _build_problem = f"the grader cannot be built: {_say(error)}"


def _exit_with(parent: int) -> None:
    """Watch the parent: one that was killed cannot stop a grader that hangs."""
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_SECONDS)
    os._exit(1)


def _report_build() -> str | None:
    return _build_problem


def _grade(prompt: Prompt, completions: tuple[str, ...]) -> list[float] | str:
    if _grader is None:
        return _build_problem or "the grader cannot be built"
    try:
        rewards = [float(reward) for reward in _grader.grade(prompt, completions)]
    except UserError as error:
        return str(error)
    except BaseException as error:
        return f"the grader failed on prompt {prompt.id}: {_say(error)}"
    if len(rewards) != len(completions):
        return (
            f"the grader returned {len(rewards)} rewards for the {len(completions)} completions of "
            f"prompt {prompt.id}; it must return one for each"
        )
    if not all(math.isfinite(reward) for reward in rewards):
        return f"the grader returned a reward that is not finite for prompt {prompt.id}: {rewards}"
    return rewards


def _say(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
