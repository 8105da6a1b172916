"""Layouts of ranks, and the run that those of each go through once for all laws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from paceline.configs.errors import NonFiniteError
from tests.learner import ranks
from tests.learner.conftest import random_batch
from tests.learner.test_worker import spoil


@dataclass(frozen=True)
class Layout:
    """Ranks and what divides the work over them; ``model`` is a key of ``model_folders``."""

    num_ranks: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: str = "shallow"


def divided(num_ranks, model="shallow", **parallel):
    return Layout(num_ranks, {"parallel": parallel}, model)


def zero(stage, num_ranks=2, **settings):
    return Layout(num_ranks, {"engine": "deepspeed", "deepspeed": {"stage": stage, **settings}})


INTERLEAVED = {"pipeline": 2, "schedule": "interleaved", "stages_per_rank": 2}
LAYOUTS = {
    "fsdp": Layout(2),
    "fsdp_offload": Layout(2, {"offload_optimizer": True}),
    "hsdp": divided(4, replicate=2),
    "tensor": divided(2, tensor=2),
    "tensor_fsdp": divided(4, tensor=2),
    "sequence": divided(2, sequence=2),
    "pipeline": divided(2, "deep", pipeline=2),
    "interleaved": divided(2, "deep_untied", **INTERLEAVED),
    "zero1": zero(1),
    "zero2": zero(2),
    "zero2_offload": zero(2, offload_optimizer=True),
    "zero3": zero(3),
    "zero3_offload": zero(3, offload_optimizer=True),
}
"""Every engine and every dimension of a mesh; on four ranks where only these nest two of them."""

FIRST, SECOND = random_batch(num_samples=15, temperature=0.9), random_batch(seed=2)
"""Whose gradients add up."""
STEPS = [random_batch(seed=seed) for seed in range(4)]
SAVED = 2
"""Steps before the checkpoint."""


def bad_batches():
    """One rank's data holds a reward that is no number; or a likelihood that overflows."""
    sound = spoil(random_batch(), "reward", -1.0)
    return spoil(sound, "reward", float("nan")), spoil(sound, "logprobs", -1e4)


class Run:
    """What the ranks of a layout found in a run; its checkpoint and exported model."""

    def __init__(self, folder, found):
        self.folder, self.ranks = folder, found

    def __getitem__(self, name):
        """What every rank found."""
        return [found[name] for found in self.ranks]

    def tensors(self, name):
        """Those of all ranks by name; where two have the same, they are equal."""
        return ranks.merged(self[name])


def go_through_a_run(worker, folder, other_folder):
    """What every law asks of a rank; ``other_folder`` holds a checkpoint of other ranks."""
    return {
        **added_gradients(worker),
        "logprobs": worker.logprobs(FIRST.groups, FIRST.temperature),
        "bad_numbers": [ranks.failing_step(worker, batch) for batch in bad_batches()],
        **refused_step(worker),
        "between": ranks.logprobs_between_steps(worker, STEPS[0]),
        **trained_and_saved(worker, folder),
        **(resumed(worker, other_folder) if other_folder else {}),
    }


def added_gradients(worker):
    """Metrics and gradients of two batches, after others were dropped."""
    worker.forward_backward(SECOND, ranks.LOSS)
    worker._drop_gradients()
    report = worker.forward_backward(FIRST, ranks.LOSS)
    other = worker.forward_backward(SECOND, ranks.LOSS)
    gradients = ranks.gradients_so_far(worker)
    worker._drop_gradients()
    assert not worker._models.policy.has_gradients()
    return {"metrics": [report.metrics, other.metrics], "gradients": gradients}


def refused_step(worker):
    """The weights before and after a step whose gradients are not finite, and its error."""
    engine = worker._models.policy
    before, healthy = ranks.weights(worker), engine.add_gradients

    def spoilt(microbatches, head, loss_of):
        healthy(microbatches, head, lambda *found: loss_of(*found) * float("nan"))

    with mock.patch.object(engine, "add_gradients", spoilt):
        worker.forward_backward(FIRST, ranks.LOSS)
    try:
        worker.optimizer_step(ranks.OPTIMIZER, 0, 100)
        error = ""
    except NonFiniteError as caught:
        error = str(caught)
    return {"initial": before, "unchanged": ranks.weights(worker), "refusal": error}


def trained_and_saved(worker, folder):
    """The steps after the first, in the middle of which everything leaves the ranks."""
    reports, weights = ranks.train(worker, STEPS[1:SAVED], start=1)
    found = {
        "mismatches": worker.greedy_mismatches(random_batch().groups, 1e-4),
        "handle": worker.publish(SAVED),
        "pieces": [(shard.name, shard.index) for shard in worker._models.policy.shards()],
    }
    worker.export(f"{folder}/model")
    ranks.save_whole(worker, f"{folder}/checkpoint")
    later, trained = ranks.train(worker, STEPS[SAVED:], start=SAVED)
    steps = [{**report.metrics, **applied} for report, applied in reports + later]
    return {**found, "steps": steps, "saved": weights, "trained": trained}


def resumed(worker, folder):
    worker.load(f"{folder}/checkpoint")
    version = worker.version
    return {"version": version, "resumed": ranks.train(worker, STEPS[SAVED:], start=SAVED)[1]}


def load_and_train(worker, folder):
    return resumed(worker, folder)["resumed"]
