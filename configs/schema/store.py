"""The store of a run's ledger."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from paceline.configs.schema.base import Section


class MemoryStoreConfig(Section):
    """Ledger in the controller's memory: a killed run resamples what its checkpoint had in
    flight."""

    type: Literal["memory"]


class SQLiteStoreConfig(Section):
    """Ledger in `ledger.sqlite` in the run's folder."""

    type: Literal["sqlite"] = "sqlite"

    synchronous: Literal["normal", "full"] = "normal"
    """`normal` survives the death of any process; `full` also a power failure, by waiting for the
    disk."""


class RedisStoreConfig(Section):
    """Ledger in Redis Streams, under the run's name."""

    type: Literal["redis"]

    url: str = "redis://localhost:6379/0"
    """Address of the Redis, without a password: this file is saved with the run."""

    password_env: str | None = None
    """Name of the environment variable that holds its password."""

    reconnect_seconds: float = Field(default=60.0, ge=0)
    """How long a lost connection is tried again before the run ends with an error."""

    @field_validator("url")
    @classmethod
    def _names_a_redis_and_no_password(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("redis", "rediss", "unix"):
            raise ValueError(f"expected redis://host:port/number, got {url!r}")
        if parts.password:
            raise ValueError(
                "holds a password, and the configuration is saved with the run: put it into an "
                "environment variable and name that in store.password_env"
            )
        return url


StoreConfig = Annotated[
    MemoryStoreConfig | SQLiteStoreConfig | RedisStoreConfig, Field(discriminator="type")
]
