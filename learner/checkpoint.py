"""What of a learner is written to disk: sharded checkpoints to resume from, folders to serve.

Checkpoints hold global tensors by Hugging Face parameter name, so they load on any number of ranks.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import GenerationConfig, PreTrainedConfig

from paceline.configs.errors import CheckpointError
from paceline.configs.schema.model import Precision
from paceline.learner.mesh import RankMesh
from paceline.learner.training_engine import State, TrainingEngine

Roles = Mapping[str, TrainingEngine]
"""Trained models by role."""


def save_checkpoint(folder: str, roles: Roles, version: int, mesh: RankMesh) -> None:
    """Write master weights, optimiser state and version; every rank calls it."""
    state = _state(roles) | {"version": torch.tensor(version)}
    with _alone_is_fine():
        dcp.save(state, checkpoint_id=folder, no_dist=mesh.devices is None)


def load_checkpoint(folder: str, roles: Roles, mesh: RankMesh) -> int:
    """Restore what ``save_checkpoint`` wrote, in place; returns its version.

    Raises:
        CheckpointError: it is missing, incomplete or of another model.
    """
    if not (Path(folder) / ".metadata").exists():
        raise CheckpointError(
            f"no complete learner checkpoint in {folder}: resume from another one"
        )
    state = _state(roles)
    _check_shapes(folder, state)
    version = torch.tensor(0)
    try:
        with _alone_is_fine():
            loaded = state | {"version": version}
            dcp.load(loaded, checkpoint_id=folder, no_dist=mesh.devices is None)
    except (dcp.api.CheckpointException, OSError, RuntimeError) as error:
        raise CheckpointError(f"the learner checkpoint in {folder} cannot be read") from error
    for role, engine in roles.items():
        engine.restore(loaded[role])
    return int(loaded["version"])


def export_model(folder: str, engine: TrainingEngine, precision: Precision, mesh: RankMesh) -> None:
    """Write a Hugging Face folder in ``precision``; every rank calls it.

    Each rank writes a file of the tensors that it has whole. The folder appears under its name only
    when complete; an older one of that name is replaced.
    """
    target = Path(folder)
    partial = target.with_name(target.name + ".partial")
    if mesh.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    mesh.wait_for_all()
    dtype = getattr(torch, precision)
    mine = {name: tensor.to(dtype).contiguous() for name, tensor in engine.whole_tensors()}
    file = f"model-{mesh.rank + 1:05d}.safetensors" if mine else None
    if file is not None:
        save_file(mine, partial / file, metadata={"format": "pt"})
    sizes = {name: tensor.nbytes for name, tensor in mine.items()}
    files = {name: sizes for name, sizes in mesh.gather_all((file, sizes)) if name is not None}
    if mesh.rank == 0:
        _finish_folder(partial, files, engine.model_config, dtype)
        _put_in_place(partial, target)
    mesh.wait_for_all()


def _finish_folder(
    folder: Path,
    files: Mapping[str, Mapping[str, int]],
    config: PreTrainedConfig,
    dtype: torch.dtype,
) -> None:
    """Beside the tensors: where each is, and the model's configuration."""
    if len(files) == 1:
        os.replace(folder / next(iter(files)), folder / "model.safetensors")
    else:
        index = {
            "metadata": {"total_size": sum(sum(sizes.values()) for sizes in files.values())},
            "weight_map": {name: file for file, sizes in files.items() for name in sizes},
        }
        text = json.dumps(index, indent=2, sort_keys=True)
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    written = copy.deepcopy(config)
    written.dtype = dtype
    written.save_pretrained(folder)
    GenerationConfig.from_model_config(written).save_pretrained(folder)


def _put_in_place(partial: Path, folder: Path) -> None:
    outdated = folder.with_name(folder.name + ".outdated")
    shutil.rmtree(outdated, ignore_errors=True)
    if folder.exists():
        os.replace(folder, outdated)
    os.replace(partial, folder)
    shutil.rmtree(outdated, ignore_errors=True)


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """Torch warns that it assumes a single process even when told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _state(roles: Roles) -> dict[str, Any]:
    return {role: engine.state() for role, engine in roles.items()}


def _check_shapes(folder: str, state: Mapping[str, State]) -> None:
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    for role, of_role in state.items():
        for name, tensor in of_role["model"].items():
            found = saved.get(f"{role}.model.{name}")
            shape = tuple(found.size) if isinstance(found, TensorStorageMetadata) else None
            if shape != tuple(tensor.shape):
                raise CheckpointError(
                    f"the learner checkpoint in {folder} has shape {shape} for {name} of the "
                    f"{role}, the model has {tuple(tensor.shape)}: it belongs to another model "
                    "or algorithm"
                )
