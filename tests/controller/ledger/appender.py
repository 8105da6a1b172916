"""Appends to a ledger until it is killed; prints what was acknowledged. Run as a program."""

from __future__ import annotations

import sys
from pathlib import Path

from paceline.controller.ledger.events import Event, Kind
from paceline.controller.ledger.redis_streams import RedisStore
from paceline.controller.ledger.sqlite import SQLiteStore
from tests.controller.builders import make_group


def life_of(group_id: int) -> list[Event]:
    versions = {"oldest": 0, "newest": 0}
    return [
        Event(Kind.ADMITTED, group_id, 0.0, {"prompt": f"p{group_id}"}),
        Event(Kind.CLAIMED, group_id, 0.0),
        Event(Kind.FINISHED, group_id, 0.0, versions, make_group(group_id)),
    ]


def main(kind: str, where: str, first: int) -> None:
    store = SQLiteStore(Path(where)) if kind == "sqlite" else RedisStore(where, "run")
    for group_id in range(first, 10**6):
        store.append(life_of(group_id))
        sys.stdout.write(f"{group_id}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
