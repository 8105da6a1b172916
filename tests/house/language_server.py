"""As much of the language server protocol as "go to definition" takes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse


class LanguageServer:
    """A client of one server over its standard input and output."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self._process = process
        self._num_requests = 0
        name = {"uri": folder.as_uri(), "name": folder.name}
        self._request(
            "initialize",
            processId=None,
            rootUri=folder.as_uri(),
            workspaceFolders=[name],
            capabilities={},
        )
        self._send({"method": "initialized", "params": {}})

    def definitions(self, file: Path, line: int, column: int) -> list[Path]:
        """Return the files that define the name at a place; lines and columns count from 0."""
        document = {"uri": file.as_uri()}
        opened = {**document, "languageId": "python", "version": 1, "text": file.read_text()}
        self._send({"method": "textDocument/didOpen", "params": {"textDocument": opened}})
        found = self._request(
            "textDocument/definition",
            textDocument=document,
            position={"line": line, "character": column},
        )
        return [Path(unquote(urlparse(place["uri"]).path)) for place in found or []]

    def _request(self, method: str, **parameters: Any) -> Any:
        self._num_requests += 1
        self._send({"id": self._num_requests, "method": method, "params": parameters})
        while True:
            message = self._receive()
            if "method" not in message and message.get("id") == self._num_requests:
                return message["result"]
            if "method" in message and "id" in message:  # the server asks for our settings: none
                items = message["params"].get("items", []) if message["params"] else []
                self._send({"id": message["id"], "result": [None] * len(items)})

    def _send(self, message: dict[str, Any]) -> None:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        assert self._process.stdin is not None
        self._process.stdin.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        length = 0
        while header := self._process.stdout.readline().strip():
            name, _, value = header.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        assert length, f"the language server ended with {self._process.poll()}"
        message: dict[str, Any] = json.loads(self._process.stdout.read(length))
        return message


@contextmanager
def language_server(command: Sequence[str | Path], folder: Path) -> Iterator[LanguageServer]:
    """Start a server for the files under a folder, and end it afterwards."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield LanguageServer(process, folder)
    finally:
        process.kill()
        process.communicate()
