"""Checkpoints written while training goes on.

The state of a learner changes only when an optimiser steps. So a save returns at once: a thread
copies the state to host memory while the next step's passes run, the optimiser waits for that copy
and never for the disk, and a second thread writes it (DataStates-LLM, Maurya et al. 2024).
"""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import wait
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from paceline.configs.errors import CheckpointError
from paceline.learner.engines.mesh import RankMesh

LONGEST_WRITE = timedelta(hours=1)
"""Longest that the fastest rank waits for the disk of the slowest."""
GROUP_NAME = "checkpoint"


class BackgroundSave:
    """Writer of one checkpoint of this rank at a time; every rank makes every call.

    The copy lies in buffers that the next save uses again: 12 bytes of host memory a parameter of
    this rank's shards (weight and both moments), from the first save on. Ranks agree on a
    checkpoint through a gloo group of their own, so that a save never stands between two
    collectives of training.
    """

    def __init__(self, mesh: RankMesh) -> None:
        self._mesh = mesh
        self._group: dist.ProcessGroup | None = None
        if mesh.devices is not None:
            self._group = dist.new_group(
                backend="gloo", timeout=LONGEST_WRITE, group_desc=GROUP_NAME
            )
        on_gpu = mesh.device.type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_gpu,
                use_shared_memory=False,
                use_async_staging=True,
                use_non_blocking_copy=on_gpu,
            )
        )
        self._save: AsyncSaveResponse | None = None
        self._ending = threading.Lock()
        self._folder = ""

    def begin(self, folder: str, state: dict[str, Any]) -> None:
        """Begin to write ``state``, live tensors, to ``folder``; wait for the previous save first.

        Raises:
            CheckpointError: the previous one failed.
        """
        self.finish()
        if self._mesh.device.type == "cuda":
            # the copy runs on a stream of its own, which does not wait for an optimiser's kernels
            torch.cuda.synchronize()
        self._folder = folder
        alone_is_fine()
        save = dcp.async_save(
            state,
            checkpoint_id=folder,
            process_group=self._group,
            async_stager=self._stager,
            no_dist=self._mesh.devices is None,
        )
        assert isinstance(save, AsyncSaveResponse)
        self._save = save

    def fence(self) -> None:
        """Return once the state was copied and may change; a copy that failed is `finish`'s."""
        if self._save is not None:
            wait([self._save.staging_completion])

    def finish(self) -> None:
        """Return once the checkpoint is whole: with every rank's files and what describes them.

        Several threads may wait.

        Raises:
            CheckpointError: this or another rank could not write it; raised once.
        """
        save = self._save
        if save is None:
            return
        wait([save.upload_completion])
        with self._ending:
            if self._save is not save:
                return  # another thread waited for it too
            self._save = None
        try:
            save.upload_completion.result()
        # whatever a disk, a copy or another rank can end it with; torch's own is no Exception
        except (Exception, CheckpointException) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise CheckpointError(
                f"the learner checkpoint in {self._folder} could not be written ({reason}): "
                "look at the space and the permissions there; --resume continues from the one "
                "before"
            ) from error

    def close(self) -> None:
        """Finish, and give the buffers back.

        Raises:
            CheckpointError: the checkpoint in flight failed.
        """
        try:
            self.finish()
        finally:
            self._stager.close()


def alone_is_fine() -> None:
    """Silence torch's warning that it assumes a single process, in any thread: here it is one."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
