"""A headless Chromium, driven by its DevTools protocol over a pair of pipes."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

FLAGS = (
    "--headless",
    "--no-sandbox",  # it refuses to run as root with it
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)


class Tab:
    """A page. ``events`` are all that the browser told of it, in order."""

    def __init__(self, commands: BinaryIO, answers: BinaryIO) -> None:
        self._commands, self._answers = commands, answers
        self._num_calls = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return the browser's answer to a command.

        Raises:
            RuntimeError: it refused.
        """
        self._num_calls += 1
        message = {"id": self._num_calls, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while (answer := self._read()).get("id") != self._num_calls:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def open(self, page: Path) -> None:
        """Load a file and wait until all that belongs to it is there."""
        self.call("Page.navigate", url=page.as_uri())
        while not self.told("Page.loadEventFired"):
            self.events.append(self._read())

    def told(self, method: str) -> list[dict[str, Any]]:
        """Return the parameters of every event of a kind so far."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def complaints(self) -> list[Any]:
        """Return what the console shows: messages, exceptions, refusals by the policy."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [each for kind in kinds for each in self.told(kind)]

    def requested(self) -> list[str]:
        """Return the address of everything that the page asked for."""
        return [each["request"]["url"] for each in self.told("Network.requestWillBeSent")]

    def value(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page, as JSON carries it."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def move_pointer(self, x: float, y: float) -> None:
        """Move the mouse to a place in the window, in CSS pixels."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, file: Path) -> None:
        """Write the whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def _read(self) -> dict[str, Any]:
        message = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("Chromium ended")
            message += byte
        return json.loads(message)


@contextmanager
def chromium(profile: Path) -> Iterator[Tab]:
    """Start a browser with an empty profile; it ends with the block."""
    assert shutil.which("chromium"), (
        "these tests need chromium: run `make test`, which installs it, or "
        "`apt-get install chromium`"
    )
    read_commands, write_commands = os.pipe()
    read_answers, write_answers = os.pipe()
    # Chromium reads commands from descriptor 3 and answers to 4.
    shell = f'exec 3<&{read_commands} 4>&{write_answers}; exec "$@"'
    program = ("chromium", *FLAGS, f"--user-data-dir={profile}")
    process = subprocess.Popen(
        ["bash", "-c", shell, "bash", *program],
        pass_fds=(read_commands, write_answers),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(read_commands)
    os.close(write_answers)
    with open(write_commands, "wb") as commands, open(read_answers, "rb") as answers:
        try:
            yield Tab(commands, answers)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # renderers and helpers too
            process.wait()
