"""The connection to a Redis that keeps a ledger: tried again, refused where it would forget."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import redis
from redis import exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from paceline.controller.ledger.events import LedgerError

Command = tuple[str | int | bytes, ...]

LONGEST_PAUSE_SECONDS = 2.0
SOCKET_TIMEOUT_SECONDS = 30.0


class RedisServer:
    """Client of one Redis whose calls survive its restart.

    A lost connection is tried again for ``reconnect_seconds``: a Redis that is restarted from its
    append-only file has all that it had acknowledged.
    """

    def __init__(self, url: str, password: str | None, reconnect_seconds: float) -> None:
        """Connect, and wait for a Redis that still reads its file.

        Raises:
            LedgerError: it does not answer, refuses, or would forget what it holds.
        """
        self._url = url
        self._reconnect_seconds = reconnect_seconds
        with explained(url):
            self.client: Any = redis.Redis.from_url(
                url,
                password=password,
                socket_timeout=SOCKET_TIMEOUT_SECONDS,
                retry=Retry(NoBackoff(), 0),  # we try again ourselves, and know for how long
            )
            self._await_loading()
            self._refuse_forgetful()

    def ask(self, call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Return what a call answers, tried again while there is no connection.

        Raises:
            LedgerError: there was none for ``reconnect_seconds``, or Redis refused the call.
        """
        deadline, pause = time.monotonic() + self._reconnect_seconds, 0.05
        while True:
            try:
                return call(*arguments, **keywords)
            except (exceptions.ConnectionError, exceptions.TimeoutError) as error:
                if time.monotonic() + pause > deadline or isinstance(
                    error, exceptions.AuthenticationError
                ):
                    raise _explanation(self._url, error) from error
            except exceptions.RedisError as error:
                raise _explanation(self._url, error) from error
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def stream(self, commands: Callable[[], Iterator[Command]]) -> bool:
        """Send commands one by one without waiting, then read their replies.

        Return whether an id was taken: sent before its reply was lost, or by another controller.
        """
        connection = self.client.connection_pool.get_connection()
        any_taken = False
        try:
            count = 0
            for command in commands():
                connection.send_command(*command)
                count += 1
            for _ in range(count):
                try:
                    connection.read_response()
                except exceptions.ResponseError as error:
                    if not is_taken(error):
                        raise
                    any_taken = True
            return any_taken
        except BaseException:
            connection.disconnect()  # with replies still to come it is of no use
            raise
        finally:
            self.client.connection_pool.release(connection)

    def close(self) -> None:
        """Close the connection."""
        self.client.close()

    def _await_loading(self) -> None:
        """Wait for a Redis that was just started and reads its file; an absent one is an error."""
        deadline = time.monotonic() + self._reconnect_seconds
        while True:
            try:
                self.client.ping()
                return
            except exceptions.BusyLoadingError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(LONGEST_PAUSE_SECONDS / 10)

    def _refuse_forgetful(self) -> None:
        """Refuse a Redis that keeps no file, or drops keys when its memory is short."""
        try:
            found = self.client.config_get("appendonly", "maxmemory-policy")
        except exceptions.ResponseError:
            return  # a managed Redis that does not show its settings
        if found.get("appendonly") == "no":
            raise LedgerError(
                f"the Redis at {self._url} keeps no append-only file, so a crash of it would lose "
                "finished rollouts: start it with `appendonly yes`"
            )
        if found.get("maxmemory-policy", "noeviction") != "noeviction":
            raise LedgerError(
                f"the Redis at {self._url} evicts keys when memory is short (maxmemory-policy "
                f"{found['maxmemory-policy']}), finished rollouts among them: set it to noeviction"
            )


@contextlib.contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn an error of the client or its URL into a `LedgerError` of one line."""
    try:
        yield
    except (exceptions.RedisError, ValueError) as error:
        if isinstance(error, LedgerError):
            raise
        raise _explanation(url, error) from error


def is_taken(error: exceptions.ResponseError) -> bool:
    """Return whether an entry of this id, or a later one, is in the stream already."""
    return "equal or smaller" in str(error)


def _explanation(url: str, error: Exception) -> LedgerError:
    """Return one line for what went wrong."""
    text = " ".join(str(error).split())[:200]  # a refused command is quoted, samples and all
    if isinstance(error, exceptions.AuthenticationError) or text.startswith(
        ("NOAUTH", "WRONGPASS", "invalid username-password")
    ):
        return LedgerError(
            f"the Redis at {url} wants another password ({text}): put it into an environment "
            "variable and name that in store.password_env"
        )
    if isinstance(error, exceptions.ConnectionError | exceptions.TimeoutError):
        return LedgerError(
            f"the Redis at {url} does not answer ({text}): check store.url and that it runs; a "
            "run that was under way is whole and goes on with --resume"
        )
    if isinstance(error, exceptions.OutOfMemoryError):
        return LedgerError(
            f"the Redis at {url} has no room left ({text}): raise its maxmemory above the memory "
            "of loop.buffer_mb and a checkpoint interval's groups; the run goes on with --resume"
        )
    return LedgerError(
        f"the Redis at {url} refused a command ({text}): see its log; the run goes on with --resume"
    )
