"""Opening of the store that a configuration names."""

from __future__ import annotations

import os
from pathlib import Path

from paceline.configs.errors import ConfigError
from paceline.configs.schema.store import MemoryStoreConfig, RedisStoreConfig, StoreConfig
from paceline.controller.ledger.memory import MemoryStore
from paceline.controller.ledger.redis_streams import RedisStore
from paceline.controller.ledger.sqlite import SQLiteStore
from paceline.controller.ledger.store import Store

FILE_NAME = "ledger.sqlite"


def open_store(config: StoreConfig, folder: Path, name: str, *, read_only: bool = False) -> Store:
    """Open the store of the run ``name`` with its files in ``folder``.

    Raises:
        LedgerError: it cannot be used; see the stores.
        ConfigError: the environment variable with the password is not set.
    """
    if isinstance(config, MemoryStoreConfig):
        return MemoryStore()
    if isinstance(config, RedisStoreConfig):
        return RedisStore(
            config.url,
            name,
            password=password_of(config),
            reconnect_seconds=0.0 if read_only else config.reconnect_seconds,
            read_only=read_only,
        )
    return SQLiteStore(folder / FILE_NAME, config.synchronous, read_only=read_only)


def password_of(config: RedisStoreConfig) -> str | None:
    """Return the password of a Redis, None if it has none.

    Raises:
        ConfigError: the environment variable that is to hold it is not set.
    """
    if config.password_env is None:
        return None
    password = os.environ.get(config.password_env)
    if password is None:
        raise ConfigError(
            f"store.password_env names {config.password_env}, which is not set in the environment: "
            "export it"
        )
    return password
