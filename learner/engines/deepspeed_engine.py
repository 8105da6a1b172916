"""The engine of DeepSpeed's ZeRO, which divides a model's training state over the data ranks.

DeepSpeed divides, reduces and gathers; everything that decides a number is the learner's own: the
loss, torch's AdamW with the learner's schedule, the clipping bound of each step, float32 master
weights. So a run gives what it gives under FSDP2, and reads the same checkpoints.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Rows
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from paceline.configs.errors import NonFiniteError
from paceline.configs.schema.learner import DeepSpeedConfig, OptimizerConfig
from paceline.configs.schema.model import Precision
from paceline.learner.batch.microbatch import Microbatch
from paceline.learner.checkpoints.shards import boxes
from paceline.learner.engines.mesh import RankMesh
from paceline.learner.engines.optimizer import parameter_groups, reset_state, set_hyperparameters
from paceline.learner.engines.sharded import WholeModel
from paceline.learner.engines.training_engine import LossOf, StateDict
from paceline.learner.model.model import Head, PolicyModel
from paceline.weights_sync.layout import Layout
from paceline.weights_sync.shared_memory import Shard

# DeepSpeed tells of every buffer and warns of every machine without a GPU, the first time while it
# is imported.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
# it calls collectives by names that torch is about to retire
warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)

import deepspeed  # noqa: E402
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer  # noqa: E402
from deepspeed.runtime.zero.stage_1_and_2 import (  # noqa: E402
    INITIAL_MICRO_STEP_ID,
    DeepSpeedZeroOptimizer,
)
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state  # noqa: E402

MOMENTS = ("exp_avg", "exp_avg_sq")
LARGEST_BUCKET = 50_000_000
"""Elements that are reduced or gathered at once; a buffer of this size is held in float32."""


class ZeroEngine:
    """A model and its optimiser under ZeRO of stage 1, 2 or 3; see `TrainingEngine`."""

    def __init__(
        self, policy: PolicyModel, mesh: RankMesh, precision: Precision, config: DeepSpeedConfig
    ) -> None:
        assert mesh.devices is not None, "DeepSpeed needs a process group"
        whole = WholeModel.of(policy)
        self.model_config = whole.config
        self.quadratic_cost = whole.quadratic_cost
        self._whole = whole
        self._policy = policy
        self._mesh = mesh
        self._stage = config.stage
        self._has_gradients = False
        named = dict(policy.trained_parameters())
        # DeepSpeed would take its float32 master weights from the model's rounded ones
        rounds = precision != "float32"
        masters = {name: p.detach() for name, p in named.items()} if rounds else {}
        self._base = torch.optim.AdamW(parameter_groups(policy.parameters()), fused=True)
        self._engine = _initialize(policy, self._base, _settings(config, precision, policy, mesh))
        self._zero = self._engine.optimizer
        self._engine.set_gradient_accumulation_boundary(False)
        self._allocate_moments()
        for name, master in masters.items():
            self._fill(named[name], master)

    def layout(self, dtype: str) -> Layout:
        """See `TrainingEngine`."""
        return self._whole.layout(dtype)

    def add_gradients(
        self, microbatches: Sequence[Microbatch], head: Head, loss_of: LossOf
    ) -> None:
        """See `TrainingEngine`."""
        self._has_gradients = True
        for microbatch in microbatches:
            loss = loss_of(microbatch, self._engine(microbatch.row, head))
            # the mean over ranks that is taken of gradients is to be their sum
            self._engine.backward(loss * self._mesh.num_averaged)

    @torch.no_grad()
    def evaluate(
        self, microbatches: Sequence[Microbatch], head: Head
    ) -> Iterator[tuple[Microbatch, Tensor]]:
        """See `TrainingEngine`."""
        for microbatch in microbatches:
            yield microbatch, self._engine(microbatch.row, head)[0]

    def take_expert_counts(self) -> None:
        """See `TrainingEngine`; models with experts are refused."""

    def has_gradients(self) -> bool:
        """See `TrainingEngine`."""
        return self._has_gradients

    def drop_gradients(self) -> None:
        """See `TrainingEngine`."""
        self._has_gradients = False
        _forget_gradients(self._zero)

    def take_step(self, config: OptimizerConfig, step: int, num_steps: int) -> dict[str, float]:
        """See `TrainingEngine`."""
        assert self._has_gradients, "an optimiser step needs a forward_backward before it"
        rate = set_hyperparameters(self._base, config, step, num_steps)
        self._zero.clip_grad = config.max_grad_norm
        self._finish_gradients()
        # it writes nothing and drops the gradients where their norm is not finite
        self._engine.step()
        self._engine.set_gradient_accumulation_boundary(False)
        self._has_gradients = False
        if not self._engine.was_step_applied():
            raise NonFiniteError(
                f"the gradient norm of step {step} is not finite: no weight was changed; lower "
                "the learning rate or look at the batch's samples"
            )
        norm = float(self._engine.get_global_grad_norm())
        return {"grad_norm": norm, "learning_rate": rate}

    def reset_optimizer(self) -> None:
        """See `TrainingEngine`."""
        reset_state(self._base)

    def shards(self) -> Iterator[Shard]:
        """See `TrainingEngine`."""
        for name, parameter in self._policy.causal_lm.named_parameters():
            start, values = self._piece(parameter)
            for index, size in boxes(self._whole.shapes[name], start, len(values)):
                shape = [stop.stop - stop.start for stop in index]
                piece, values = values[:size], values[size:]
                yield Shard(name, index, piece.view(shape))

    def whole_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `TrainingEngine`."""
        for name, parameter in self._policy.causal_lm.named_parameters():
            tensor = safe_get_full_fp32_param(parameter)
            if self._mesh.is_first:
                yield name, tensor.cpu()

    def state(self) -> StateDict:
        """Return a copy of this rank's rows of every tensor; tensors are gathered one at a time."""
        step = next(iter(self._base.state.values()))["step"]
        model, optimizer = {}, {}
        for name, parameter in self._policy.trained_parameters():
            model[name] = self._rows(safe_get_full_fp32_param(parameter))
            optimizer[name] = {"step": step.clone()}
            for key in MOMENTS:
                optimizer[name][key] = self._rows(safe_get_full_optimizer_state(parameter, key))
        return {"model": model, "optimizer": optimizer}

    def restore(self, state: StateDict) -> None:
        """See `TrainingEngine`; DeepSpeed counts steps once for all parameters, so all continue
        from the largest count."""
        for name, parameter in self._policy.trained_parameters():
            moments = state["optimizer"][name]
            self._fill(parameter, moments["exp_avg"].full_tensor(), "exp_avg")
            self._fill(parameter, moments["exp_avg_sq"].full_tensor(), "exp_avg_sq")
            self._fill(parameter, state["model"][name].full_tensor())
        step = max(float(found["step"]) for found in state["optimizer"].values())
        for of_flat in self._base.state.values():
            of_flat["step"].fill_(step)
        _write_weights(self._zero, self._stage)

    def _piece(self, parameter: Any, moment: str | None = None) -> tuple[int, Tensor]:
        """Return where this rank's elements of the flattened parameter begin, and its live master
        weights, or a moment, of them.

        The parameter is a module's, on which DeepSpeed wrote what it knows of it.
        """
        if self._stage == 3:
            padded, _ = self._zero._get_fp32_opt_state_partition(parameter, True, moment)
            start = min(len(padded) * self._mesh.data_rank, parameter.ds_numel)
            return start, padded.detach()[: parameter.ds_numel - start]
        if parameter._hp_mapping is None:
            return 0, torch.zeros(0)
        mapping = parameter._hp_mapping
        return mapping.lp_fragment_address.start, mapping.get_hp_fragment(moment).detach()

    def _fill(self, parameter: nn.Parameter, whole: Tensor, moment: str | None = None) -> None:
        start, piece = self._piece(parameter, moment)
        piece.copy_(whole.flatten()[start : start + len(piece)])

    def _rows(self, whole: Tensor) -> DTensor:
        """Copy a whole tensor into shards by rows, as other engines write theirs."""
        assert self._mesh.devices is not None
        mesh = self._mesh.devices["shard"]
        shape, offset = compute_local_shape_and_global_offset(whole.shape, mesh, [Rows(0)])
        mine = whole[offset[0] : offset[0] + shape[0]].clone()
        size, stride = whole.shape, whole.stride()
        return DTensor.from_local(mine, mesh, [Rows(0)], run_check=False, shape=size, stride=stride)

    def _finish_gradients(self) -> None:
        """Reduce the gradients: no backward pass follows before the step."""
        self._engine.set_gradient_accumulation_boundary(True)
        if self._stage == 1:
            self._engine.allreduce_gradients()
        else:
            self._zero.finalize_gradient_accumulation_boundary()

    def _allocate_moments(self) -> None:
        """Allocate AdamW's whole state, and DeepSpeed's views of it, as for a plain optimiser."""
        flats = (
            self._zero.fp32_partitioned_groups_flat
            if self._stage == 3
            else [flat for group in self._base.param_groups for flat in group["params"]]
        )
        for flat in flats:
            step = torch.zeros((), dtype=torch.float32, device=flat.device)
            moments = {name: torch.zeros_like(flat, requires_grad=False) for name in MOMENTS}
            self._base.state[flat] = {"step": step, **moments}
        if self._stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()


def _initialize(
    policy: PolicyModel, base: torch.optim.Optimizer, settings: dict[str, Any]
) -> deepspeed.DeepSpeedEngine:
    # a rank sees no GPU but its own
    os.environ["LOCAL_RANK"] = "0"
    # Else it compiles collectives in shared memory when it first sees gloo: minutes, a compiler,
    # and a lock file that hangs every later run if the first one was interrupted.
    deepspeed.ops.__compatible_ops__ = {}
    with redirect_stdout(StringIO()):  # stage 1 in bfloat16 prints what memory is in use
        engine, *_ = deepspeed.initialize(
            model=policy, optimizer=base, config=settings, dist_init_required=False
        )
    return engine


def _settings(
    config: DeepSpeedConfig, precision: Precision, policy: PolicyModel, mesh: RankMesh
) -> dict[str, Any]:
    """Return DeepSpeed's configuration: gradients are averaged over ranks only."""
    bucket = min(LARGEST_BUCKET, sum(parameter.numel() for parameter in policy.parameters()))
    zero: dict[str, Any] = {
        "stage": config.stage,
        "overlap_comm": False,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket + bucket % 2,
        "stage3_prefetch_bucket_size": bucket,
    }
    if config.offload_optimizer:
        pinned = mesh.device.type == "cuda"
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": precision == "bfloat16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        # torch's AdamW in host memory too: DeepSpeed's own wants compiling
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def _forget_gradients(zero: Any) -> None:
    """Drop the gradients as DeepSpeed does on overflow; it has no public call for that."""
    if isinstance(zero, BF16_Optimizer):
        zero.clear_lp_grads(set_to_none=True)
        zero.clear_hp_grads()
        return
    zero.zero_grad(set_to_none=True)
    if isinstance(zero, DeepSpeedZeroOptimizer):
        zero.micro_step_id = INITIAL_MICRO_STEP_ID
        for held in (zero.averaged_gradients, zero.all_grad_tensors):
            held.update(dict.fromkeys(held))
        if zero.cpu_offload:
            zero._offload_accumulated_param_ids = set()
            zero.reset_cpu_buffers()
    elif zero.offload_optimizer:
        zero._offload_boundary_param_ids = set()
        zero.reset_cpu_buffers()


def _write_weights(zero: Any, stage: int) -> None:
    """Copy master weights to those that the model computes with."""
    if stage < 3:
        zero.update_lp_params()
        return
    zero._partition_all_parameters()
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
