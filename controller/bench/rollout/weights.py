"""The versions of the widened model, published as a learner publishes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from paceline.controller.bench.rollout.training import Training, load, save, trained_versions
from paceline.controller.bench.rollout.widened_model import Shape, widened
from paceline.learner.checkpoints.shards import layout_of, local_shards
from paceline.weights_sync.handle import WeightHandle
from paceline.weights_sync.shared_memory import SharedMemoryPublisher


@dataclass(frozen=True)
class Published:
    """A widened model's folder in Hugging Face format and its versions, in order."""

    model_folder: Path
    handles: Sequence[WeightHandle]
    num_small: int
    num_wide: int


def publish_versions(training: Training, shape: Shape, cache: Path, folder: Path) -> Published:
    """Widen every version, trained or found in ``cache``, and publish it below ``folder``."""
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
    publisher = SharedMemoryPublisher(str(folder), layout_of(model, "float32"))
    publisher.write(version, local_shards(model))
    return publisher.commit(version)
