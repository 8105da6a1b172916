"""A learner on disk: sharded checkpoints to resume from, folders to serve.

Checkpoints hold global tensors by Hugging Face parameter name, so they load on any number of ranks.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from transformers import GenerationConfig, PreTrainedConfig

from paceline.configs.errors import CheckpointError
from paceline.configs.schema.model import Precision
from paceline.learner.checkpoints.background_save import alone_is_fine
from paceline.learner.engines.mesh import RankMesh
from paceline.learner.engines.training_engine import TrainingEngine

Roles = Mapping[str, TrainingEngine]
"""Trained models by role."""


def checkpoint_state(roles: Roles, version: int) -> dict[str, Any]:
    """Return what a checkpoint holds, as live tensors: master weights, optimiser state, version."""
    return _state(roles) | {"version": torch.tensor(version)}


def load_checkpoint(folder: str, roles: Roles, mesh: RankMesh) -> int:
    """Restore a written ``checkpoint_state`` in place, and return its version.

    Shapes and the sizes of all files are looked at first: what is refused has changed nothing.

    Raises:
        CheckpointError: it is missing, incomplete or of another model.
    """
    state = _state(roles)
    require_loadable(folder, state)
    loaded = state | {"version": torch.tensor(0)}
    alone_is_fine()
    try:
        dcp.load(loaded, checkpoint_id=folder, no_dist=mesh.devices is None)
    except (CheckpointException, OSError, RuntimeError) as error:
        raise CheckpointError(f"the learner checkpoint in {folder} cannot be read") from error
    for role, engine in roles.items():
        engine.restore(loaded[role])
    return int(loaded["version"])


def require_loadable(folder: str, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a checkpoint that cannot become a ``state`` of these names and shapes, by role.

    Raises:
        CheckpointError: it is missing, incomplete or of another model.
    """
    if not (Path(folder) / ".metadata").exists():
        raise CheckpointError(
            f"no complete learner checkpoint in {folder}: resume from another one"
        )
    saved = _read_metadata(folder)
    _check_shapes(folder, saved, state)
    _check_files(folder, saved)


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
    """Write the index of tensors and the model's configuration beside the tensors."""
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


def _state(roles: Roles) -> dict[str, Any]:
    return {role: engine.state() for role, engine in roles.items()}


def _read_metadata(folder: str) -> Metadata:
    try:
        return dcp.FileSystemReader(folder).read_metadata()
    except Exception as error:  # a torn pickle ends in any error
        raise CheckpointError(
            f"the learner checkpoint in {folder} cannot be read: its .metadata is damaged; resume "
            "from another one"
        ) from error


def _check_shapes(folder: str, saved: Metadata, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a checkpoint of another architecture, or one that lacks weights or moments."""
    for name, tensor in _named_tensors(state):
        found = saved.state_dict_metadata.get(name)
        shape = tuple(found.size) if isinstance(found, TensorStorageMetadata) else None
        if shape != tuple(tensor.shape):
            role, _, parameter = name.partition(".")
            raise CheckpointError(
                f"the learner checkpoint in {folder} has shape {shape} for {parameter} of the "
                f"{role}, the model has {tuple(tensor.shape)}: it belongs to another model "
                "or algorithm"
            )


def _named_tensors(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield tensors under their names in a checkpoint."""
    for name, value in state.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        else:
            yield from _named_tensors(value, f"{prefix}{name}.")


def _check_files(folder: str, saved: Metadata) -> None:
    """Refuse a checkpoint with a missing or short file: its writing or copying broke off."""
    ends: dict[str, int] = {}
    for piece in (saved.storage_data or {}).values():
        end = piece.offset + piece.length
        ends[piece.relative_path] = max(end, ends.get(piece.relative_path, 0))
    for file, expected in sorted(ends.items()):
        path = Path(folder) / file
        size = path.stat().st_size if path.exists() else 0
        if size < expected:
            raise CheckpointError(
                f"the learner checkpoint in {folder} is incomplete: {file} has {size} bytes, "
                f"expected {expected}; nothing was loaded, resume from another one"
            )
