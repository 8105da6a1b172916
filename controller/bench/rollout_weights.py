"""The versions of the widened model, published as a learner publishes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from paceline.controller.bench.rollout_training import Training, load, save, trained_versions
from paceline.controller.bench.widened_model import Shape, widened
from paceline.weights_sync.handle import WeightHandle
from paceline.weights_sync.layout import Layout, TensorSpec
from paceline.weights_sync.shared_memory import Shard, SharedMemoryPublisher


@dataclass(frozen=True)
class Published:
    """A widened model's folder in Hugging Face format and its versions, in order."""

    model_folder: Path
    handles: Sequence[WeightHandle]
    num_small: int
    num_wide: int


def publish_versions(training: Training, shape: Shape, cache: Path, folder: Path) -> Published:
    """Train, or find what was trained in ``cache``; widen every version and write it below
    ``folder``."""
    handles, sizes = [], (0, 0)
    for version, path in enumerate(trained_versions(training, cache)):
        small = load(path)
        wide = widened(small, shape)
        if version == 0:
            save(wide, folder / "model")
            sizes = (small.num_parameters(), wide.num_parameters())
        handles.append(_publish(wide, version, folder / f"version-{version}"))
    return Published(folder / "model", handles, *sizes)


def _publish(model: PreTrainedModel, version: int, folder: Path) -> WeightHandle:
    parameters = dict(model.named_parameters())
    specs = [TensorSpec(name, tuple(p.shape), "float32") for name, p in parameters.items()]
    publisher = SharedMemoryPublisher(str(folder), Layout(tuple(specs)))
    whole = [
        Shard(name, tuple(slice(0, size) for size in parameter.shape), parameter)
        for name, parameter in parameters.items()
    ]
    publisher.write(version, whole)
    return publisher.commit(version)
