"""An event loop whose clock jumps: hours of waiting take no time, and timings are exact."""

from __future__ import annotations

import asyncio
import selectors


class _Jump(selectors.SelectSelector):
    """Does not wait for a timer: moves the clock to it."""

    now = 0.0

    def select(self, timeout=None):
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        assert timeout is not None, "everything waits and nothing will ever happen: a deadlock"
        self.now += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Sleeps take virtual time only; work takes none. Threads are not supported."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now


def run_virtually(coroutine):
    """Run a coroutine to its end in virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(coroutine)
