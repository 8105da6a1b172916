"""The process of one learner rank: runs its calls, and says where it stands while one runs."""

from __future__ import annotations

import asyncio
import functools
import resource
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import ray

from paceline.configs.vocabulary import RankProgress
from paceline.controller.ranks.hangs import RankStatus
from paceline.controller.ranks.rank import Rank

CARRIERS = ("/torch/_ops.py", "/torch/utils/", "/torch/distributed/c10d_logger.py")
"""Files whose functions only carry a call on to where it waits."""


class RankHost:
    """The actor of one rank: its calls run one after the other on a thread of their own, so that
    the process answers while one of them runs.

    The rank is built by a call, not by the constructor: Ray would turn an error of the constructor
    of an actor into text, and a user's mistake must arrive as the error it is.
    """

    def __init__(self) -> None:
        self._rank: Rank | None = None
        self._calls = ThreadPoolExecutor(1, thread_name_prefix="calls")
        self._thread = 0
        self._native_thread = threading.get_native_id()
        self._number = 0
        self._call: str | None = None
        self._began = time.monotonic()

    async def build(self, factory: Callable[[], Rank]) -> None:
        """Build the rank on the thread that will run its calls: torch keeps settings by thread."""
        self._rank = await self._on_thread("build", factory)

    def address(self) -> tuple[str, int]:
        """Return this node's address and a port that was free a moment ago."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method after the calls before it."""
        function = functools.partial(getattr(self._rank, method), *arguments)
        return await self._on_thread(method, function)

    async def call_beside(self, method: str, *arguments: Any) -> Any:
        """Call a method while others run."""
        return await asyncio.to_thread(getattr(self._rank, method), *arguments)

    async def status(self) -> RankStatus:
        """Say where the rank is now, with the stacks of all threads."""
        frames = sys._current_frames()
        mine = frames.get(self._thread) if self._call is not None else None
        return RankStatus(
            call=self._call,
            number=self._number,
            seconds=time.monotonic() - self._began,
            progress=RankProgress() if self._rank is None else self._rank.progress(),
            place="rest" if mine is None else line_of(mine),
            waits_in=None if mine is None else collective_of(mine),
            stacks=stacks_of(frames),
            busy_seconds=busy_seconds(self._native_thread),
            disk_blocks=disk_blocks(),
        )

    async def _on_thread(self, name: str, function: Callable[[], Any]) -> Any:
        def named() -> Any:
            self._thread, self._began = threading.get_ident(), time.monotonic()
            self._native_thread = threading.get_native_id()
            self._number += 1
            self._call = name
            try:
                return function()
            finally:
                self._call = None

        return await asyncio.get_running_loop().run_in_executor(self._calls, named)


def collective_of(frame: FrameType) -> str | None:
    """Return the function of torch.distributed that a thread is in, None where it computes.

    A collective waits in compiled code, so the innermost Python line is the one that called it.
    """
    for each in outwards(frame):
        file = each.f_code.co_filename
        if not any(carrier in file for carrier in CARRIERS):
            return each.f_code.co_name if "/torch/distributed/" in file else None
    return None


def line_of(frame: FrameType) -> str:
    """Return the innermost line of a thread, and the innermost of Paceline that led to it."""
    ours = (f for f in outwards(frame) if f.f_globals.get("__name__", "").startswith("paceline."))
    caller = next(ours, frame)
    innermost = f"{frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})"
    if caller is frame:
        return innermost
    return f"{innermost} from {caller.f_globals['__name__']}:{caller.f_lineno}"


def outwards(frame: FrameType) -> Iterator[FrameType]:
    """Return a frame and its callers."""
    each: FrameType | None = frame
    while each is not None:
        yield each
        each = each.f_back


def busy_seconds(thread: int) -> float:
    """Return the seconds that this process ran, and that a thread of it waited for a busy CPU.

    ``thread`` is its number in the kernel; where the kernel does not tell, waiting counts nothing.
    Of one thread only: beside Python at work, each file that is read costs a turn at the GIL.
    """
    try:
        _, stood_in_line, _ = Path(f"/proc/self/task/{thread}/schedstat").read_text().split()
    except (OSError, ValueError):  # not Linux, or a sandbox's kernel
        stood_in_line = "0"
    return time.process_time() + int(stood_in_line) / 1e9


def disk_blocks() -> int:
    """Return the blocks that this process read and wrote."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_inblock + used.ru_oublock


def stacks_of(frames: dict[int, FrameType]) -> str:
    """Return every thread's stack, by its name, the innermost line last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames.items()
    )
