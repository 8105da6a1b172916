"""Run checkpoints: what an interrupted run is resumed from.

``checkpoints/step-000050/`` holds the learner's shards (``learner/``), what engines drafted from
where they do (``draft_corpus``), and ``state.json``: the step, where the prompt feed stood, which
prompts had been admitted and not trained, and the totals so far. A checkpoint is written under
another name while training goes on, and renamed when every part of it is there: a folder of that
name is always whole.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paceline.configs.errors import CheckpointError
from paceline.controller.observe.files.jsonl import read_json, write_json
from paceline.controller.parts import Finish

SCHEMA = 1
PATTERN = re.compile(r"step-(\d{6,})$")
LEARNER, DRAFT_CORPUS = "learner", "draft_corpus"

Save = Callable[[str], Awaitable[Finish | None]]
"""Writes a part of a checkpoint to a path; or only begins to, and returns what waits for the rest.
What is written is as it was when the call returned."""


@dataclass(frozen=True)
class RunState:
    """The controller's part of a checkpoint, at a step boundary.

    ``feed`` is the prompt feed's own state; ``pending`` are the positions before it whose prompts
    were admitted and neither trained nor dropped: where no ledger tells more, they are sampled
    again. ``seconds`` are spent
    so far, by part of the run; ``before`` is what the held-out evaluation before training found;
    ``drift`` how far each step took the policy, where that matters (`PolicyDrift`).
    """

    step: int
    feed: dict[str, Any]
    pending: tuple[int, ...]
    totals: dict[str, Any]
    seconds: dict[str, float]
    warm_start: dict[str, float] | None
    before: dict[str, Any]
    drift: tuple[float, ...] = ()


class CheckpointFolder:
    """The checkpoints of one run, newest ``keep`` of them."""

    def __init__(self, root: Path, keep: int) -> None:
        self._root = root
        self._keep = keep
        self._writing: asyncio.Task[None] | None = None

    async def save(
        self,
        state: RunState,
        parts: Mapping[str, Save],
        settle: Callable[[int], object] = lambda oldest: None,
    ) -> None:
        """Begin a checkpoint of named parts; `finish`, and the next save, wait until it is whole.

        Then the oldest beyond those kept are removed, and ``settle`` hears the oldest step left.
        One that is there for this step already is as good, and never the one to be taken away.

        Raises:
            CheckpointError: a part, or the save before, could not be written.
        """
        await self.finish()
        target = self._root / f"step-{state.step:06d}"
        if target.exists():
            return
        for leftover in self._root.glob("unfinished-*"):
            shutil.rmtree(leftover)
        unfinished = self._root / f"unfinished-{state.step:06d}"
        unfinished.mkdir(parents=True)
        begun = [await save(str(unfinished / name)) for name, save in parts.items()]
        write_json(unfinished / "state.json", {"schema": SCHEMA, **asdict(state)})
        self._writing = asyncio.create_task(
            self._complete(unfinished, target, begun, settle), name=f"checkpoint {state.step}"
        )

    async def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any.

        Raises:
            CheckpointError: a part of it could not be written; raised once.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            await writing

    async def _complete(
        self,
        unfinished: Path,
        target: Path,
        begun: Sequence[Finish | None],
        settle: Callable[[int], object],
    ) -> None:
        for finish in begun:
            if finish is not None:
                await finish()
        unfinished.rename(target)
        for old in self._whole()[: -self._keep]:
            shutil.rmtree(old)
        settle(self.oldest_step())

    def oldest_step(self) -> int:
        """Return the step of the oldest checkpoint: training before it is final."""
        return int(self._whole()[0].name.removeprefix("step-"))

    def latest(self) -> tuple[RunState, Path] | None:
        """Return the newest checkpoint's state and its folder; None without any.

        Raises:
            CheckpointError: it is unreadable, or was written by another version of Paceline.
        """
        complete = self._whole()
        if not complete:
            return None
        folder = complete[-1]
        content = read_json(folder / "state.json")
        if not isinstance(content, dict) or content.pop("schema", None) != SCHEMA:
            raise CheckpointError(
                f"{folder / 'state.json'} is unreadable or not of schema {SCHEMA}: resume with the "
                "version of Paceline that wrote it, or remove this checkpoint to use an older one"
            )
        try:
            lists = {"pending": content["pending"], "drift": content.get("drift", ())}
            state = RunState(**{**content, **{name: tuple(each) for name, each in lists.items()}})
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / 'state.json'} is incomplete: {error}") from error
        return state, folder

    def _whole(self) -> list[Path]:
        found = [path for path in self._root.glob("step-*") if PATTERN.search(path.name)]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))
