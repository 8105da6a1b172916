"""What of a learner is written to disk: sharded checkpoints to resume from, folders to serve.

Checkpoints hold global tensors by Hugging Face parameter name, so they load on any number of ranks.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from paceline.configs.errors import CheckpointError
from paceline.configs.schema.model import Precision
from paceline.learner.model import PolicyModel

State = dict[str, Any]
Roles = Mapping[str, tuple[PolicyModel, torch.optim.AdamW]]
"""Trained models with their optimisers, by role."""


def save_checkpoint(folder: str, roles: Roles, version: int) -> None:
    """Write master weights, optimiser state and version; every rank calls it."""
    state = _state(roles) | {"version": torch.tensor(version)}
    with _alone_is_fine():
        dcp.save(state, checkpoint_id=folder, no_dist=not dist.is_initialized())


def load_checkpoint(folder: str, roles: Roles) -> int:
    """Restore what ``save_checkpoint`` wrote, in place; returns its version.

    Raises:
        CheckpointError: it is missing, incomplete or of another model.
    """
    if not (Path(folder) / ".metadata").exists():
        raise CheckpointError(
            f"no complete learner checkpoint in {folder}: resume from another one"
        )
    version = torch.tensor(0)
    state = _state(roles) | {"version": version}
    _check_shapes(folder, roles)
    try:
        with _alone_is_fine():
            dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    except (dcp.api.CheckpointException, OSError, RuntimeError) as error:
        raise CheckpointError(f"the learner checkpoint in {folder} cannot be read") from error
    return int(state["version"])


def export_model(folder: str, policy: PolicyModel, precision: Precision) -> None:
    """Write a Hugging Face folder in ``precision``; every rank calls it, the first one writes.

    It appears under its name only when complete; an older one of that name is replaced.
    """
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    whole = {}
    for name, parameter in policy.causal_lm.named_parameters():
        tensor = parameter.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if is_first:
            whole[name] = tensor.to("cpu", getattr(torch, precision))
    if is_first:
        _write_folder(Path(folder), policy, whole, precision)
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """Torch warns that it assumes a single process even when told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _write_folder(
    folder: Path, policy: PolicyModel, tensors: Mapping[str, Tensor], precision: Precision
) -> None:
    partial = folder.with_name(folder.name + ".partial")
    outdated = folder.with_name(folder.name + ".outdated")
    for leftover in (partial, outdated):
        shutil.rmtree(leftover, ignore_errors=True)
    policy.causal_lm.save_pretrained(partial, state_dict=dict(tensors))
    config = policy.causal_lm.config.__class__.from_pretrained(partial)
    config.dtype = getattr(torch, precision)
    config.save_pretrained(partial)
    if folder.exists():
        os.replace(folder, outdated)
    os.replace(partial, folder)
    shutil.rmtree(outdated, ignore_errors=True)


def _state(roles: Roles) -> State:
    """Live tensors under stable names: loading into them restores the learner."""
    state: State = {}
    for role, (model, optimizer) in roles.items():
        named = dict(model.trained_parameters())
        state[role] = {
            "model": {name: parameter.detach() for name, parameter in named.items()},
            "optimizer": {name: optimizer.state[parameter] for name, parameter in named.items()},
        }
    return state


def _check_shapes(folder: str, roles: Roles) -> None:
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    for role, (model, _) in roles.items():
        for name, parameter in model.trained_parameters():
            found = saved.get(f"{role}.model.{name}")
            shape = tuple(found.size) if isinstance(found, TensorStorageMetadata) else None
            if shape != tuple(parameter.shape):
                raise CheckpointError(
                    f"the learner checkpoint in {folder} has shape {shape} for {name} of the "
                    f"{role}, the model has {tuple(parameter.shape)}: it belongs to another model "
                    "or algorithm"
                )
