"""Learner workers for tests: one in this process, or several in processes of their own."""

from __future__ import annotations

import socket
import sys
from contextlib import closing
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.tensor import DTensor

from paceline.configs.errors import CheckpointError
from paceline.configs.schema.learner import LearnerConfig, OptimizerConfig
from paceline.configs.vocabulary import TrainBatch
from paceline.kernels import token_logprobs
from paceline.kernels.vocab_parallel_logprobs import vocab_parallel_logprobs
from paceline.learner.objective.advantages import GeneralizedAdvantage, Outcome
from paceline.learner.objective.losses.policy import Clip
from paceline.learner.objective.objective import Objective, ReferencePenalty
from paceline.learner.worker import LearnerWorker
from tests.learner.conftest import model_config

LOSS = Objective(Outcome(), Clip(0.2, 0.28), "token_mean", max_tokens=64)
"""A sample's reward is its advantage: any batch tests any gradient."""
ACTOR_CRITIC = Objective(
    GeneralizedAdvantage(trace_decay=0.9),
    Clip(0.2, 0.28),
    "sequence_mean",
    max_tokens=64,
    reference=ReferencePenalty(0.1),
    num_updates=2,
    old_policy="recomputed",
)
"""What an algorithm can want at once: a critic, a reference, several updates and every pass."""
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant")


def make_worker(
    model_folder,
    weights_folder,
    rank=0,
    num_ranks=1,
    port=None,
    precision="float32",
    critic=None,
    **settings,
):
    settings = {"tokens_per_microbatch": 64, "collective_timeout_seconds": 30} | settings
    config = LearnerConfig(num_ranks=num_ranks, **settings)
    return LearnerWorker(
        str(model_folder),
        model_config(precision=precision),
        config,
        critic,
        rank=rank,
        rendezvous=f"tcp://127.0.0.1:{port}" if port else None,
        weights_folder=str(weights_folder),
        seed=0,
    )


def free_port():
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def be_imported():
    """Coming here takes a process seconds."""


def run_rank(program, arguments, worker_arguments):
    """In a rank's process: build the worker, run ``program(worker, *arguments)``, leave."""
    torch.set_num_threads(1)
    worker = make_worker(**worker_arguments)
    try:
        return program(worker, *arguments)
    finally:
        worker.close()
        forget_deepspeeds_past()


def forget_deepspeeds_past():
    """DeepSpeed keeps the process group it first saw, and numbers the parameters and modules of
    all models: a run has one group and builds its models once, these processes many."""
    if "deepspeed" in sys.modules:
        sys.modules["deepspeed.utils.groups"]._release_process_group_references()
        sys.modules["deepspeed.runtime.zero.partition_parameters"].Init.param_id = 0
        offload = sys.modules["deepspeed.runtime.zero.parameter_offload"].DeepSpeedZeRoOffload
        (last_module,) = offload._register_deepspeed_module.__defaults__
        last_module[0] = 0


def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone().numpy()


def gradients(worker, batch, loss=LOSS):
    """The report and every parameter's gradient."""
    report = worker.forward_backward(batch, loss)
    found = {name: whole(parameter.grad) for name, parameter in parameters(worker)}
    worker._drop_gradients()
    return report, found


def gradients_and_logprobs(worker, batch):
    return *gradients(worker, batch), worker.logprobs(batch.samples, batch.temperature)


def parameters(worker):
    """The policy's, as far as this rank has pieces of them."""
    for part in worker._models.policy.parts:
        yield from part.causal_lm.named_parameters()


def weights(worker):
    return master_weights(worker._models.policy)


def master_weights(engine):
    return {name: whole(tensor) for name, tensor in engine.state()["model"].items()}


def train(worker, batches, start=0):
    """Steps on every batch; the reports, and the weights after them."""
    reports = []
    for step, batch in enumerate(batches, start):
        report = worker.forward_backward(batch, LOSS)
        reports.append((report, worker.optimizer_step(OPTIMIZER, step, 100)))
    return reports, weights(worker)


def train_roles(worker, batches, algorithm, reference_folder):
    """Steps of an algorithm with critic and reference; metrics, and weights of both models."""
    worker.load_reference(reference_folder)
    reports = []
    for step, batch in enumerate(batches):
        report = worker.forward_backward(batch, algorithm)
        applied = worker.optimizer_step(OPTIMIZER, step, 100)
        reports.append({**report.metrics, **applied})
    return reports, weights(worker), master_weights(worker._models.value_model)


def train_and_save(worker, batches, folder):
    result = train(worker, batches)
    save_whole(worker, folder)
    return result


def save_whole(worker, folder):
    worker.save(folder)
    worker.finish_save()


def whole_state(worker):
    """Weights and optimiser state, by their names in a checkpoint."""
    state = worker._models.policy.state()
    found = {name: whole(tensor) for name, tensor in state["model"].items()}
    for name, values in state["optimizer"].items():
        found |= {f"{name}.{key}": whole(value) for key, value in values.items()}
    return found


def train_save_and_look(worker, batches, folder):
    train_and_save(worker, batches, folder)
    return whole_state(worker)


def load_and_look(worker, folder):
    worker.load(folder)
    return worker.version, whole_state(worker)


def save_where_rank_1_fails(worker, folder, batch):
    """What the save's error says on this rank, after a step that was not disturbed by it."""

    def full(*_):
        raise OSError("disk of rank 1 is full")

    with pytest.MonkeyPatch.context() as patch:
        if worker._rank == 1:
            patch.setattr(FileSystemWriter, "write_data", full)
        worker.save(folder)
        train(worker, [batch])
        with pytest.raises(CheckpointError) as caught:
            worker.finish_save()
    return str(caught.value)


def progress_of_a_step(worker, batch):
    """What the rank says of itself at every loss, and after the step."""
    seen = []

    class Looking:
        passes = LOSS.passes
        prepare = LOSS.prepare

        def loss(self, inputs):
            seen.append(worker.progress())
            return LOSS.loss(inputs)

    worker.forward_backward(batch, Looking())
    worker.optimizer_step(OPTIMIZER, 0, 100)
    return seen, worker.progress()


def collectives_of_a_save(worker, batch, folder):
    """What has been begun before a save and after it."""
    train(worker, [batch])
    before = worker.progress().collectives
    save_whole(worker, folder)
    return before, worker.progress().collectives


def load_and_train(worker, folder, batches):
    worker.load(folder)
    return worker.version, train(worker, batches, start=worker.version)


def train_and_publish(worker, batches, export_folder):
    _, after = train(worker, batches)
    handle = worker.publish(len(batches))
    worker.export(export_folder)
    return after, handle


def publish_pieces(worker, batches, export_folder):
    """What `train_and_publish` returns, and this rank's pieces by name and place."""
    result = train_and_publish(worker, batches, export_folder)
    return *result, [(shard.name, shard.index) for shard in worker._models.policy.shards()]


def divided_logprobs(worker, hidden, weight, targets, scales, temperature):
    """Outputs of the op over this rank's rows, and gradients by ``scales`` of the outputs."""
    group = worker._models.mesh.devices.get_group("tensor")
    inputs = [hidden.requires_grad_(), weight.chunk(2)[worker._rank].clone().requires_grad_()]
    with mock.patch.multiple(token_logprobs, MIN_ROWS_PER_CHUNK=7, LOGITS_PER_CHUNK=1):
        outputs = vocab_parallel_logprobs(*inputs, targets, group, temperature)
        gradients = torch.autograd.grad(outputs, inputs, list(scales))
    return [tensor.detach() for tensor in (*outputs, *gradients)]


def logprobs_between_steps(worker, batch: TrainBatch):
    """Look at the weights after the gradient and before the update, then after it."""
    before = worker.logprobs(batch.samples)
    worker.forward_backward(batch, LOSS)
    unchanged = worker.logprobs(batch.samples)
    worker.optimizer_step(OPTIMIZER, 0, 100)
    return before, unchanged, worker.logprobs(batch.samples)


def look_and_train(worker, batch, num_steps):
    """Each step's metrics, log-probabilities having been looked at before it."""
    found = []
    for step in range(num_steps):
        worker.logprobs(batch.samples)
        found.append(dict(worker.forward_backward(batch, LOSS).metrics))
        worker.optimizer_step(OPTIMIZER, step, 100)
    return found


def greedy_mismatches(worker, sequences, tolerance):
    return worker.greedy_mismatches(sequences, tolerance)


def failing_step(worker, batch):
    """The error's name, and whether a later healthy call of this rank still works."""
    try:
        worker.forward_backward(batch, LOSS)
    except Exception as error:
        return type(error).__name__, len(worker.logprobs(batch.samples))
    return None, 0


def of_training(metrics):
    """What does not depend on the number of ranks: all but how evenly they share the work."""
    return {name: value for name, value in metrics.items() if name != "rank_imbalance"}
