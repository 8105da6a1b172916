"""AdamW, its learning-rate schedule and global gradient clipping, for plain and sharded tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from paceline.configs.errors import NonFiniteError
from paceline.configs.schema.learner import OptimizerConfig


def learning_rate(step: int, config: OptimizerConfig, num_steps: int) -> float:
    """Return the learning rate of ``step`` (from 0) of ``num_steps``.

    It rises linearly over ``warmup_steps`` and reaches the peak at the last of them, then decays to
    ``final_fraction`` of the peak at step ``num_steps - 1`` and stays there. Warm-up takes
    precedence where it is longer than the run.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = min(1.0, (step - config.warmup_steps) / max(1, num_steps - 1 - config.warmup_steps))
    height = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * height)


def build_optimizer(parameters: Sequence[nn.Parameter]) -> torch.optim.AdamW:
    """Build AdamW over float32 master weights, with its whole state allocated at once.

    State that exists from the start makes saving, loading and resetting the same at every step.
    Hyperparameters are set by ``take_step``.
    """
    optimizer = torch.optim.AdamW(parameter_groups(parameters), fused=True)
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def parameter_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Split parameters into those that ``weight_decay`` applies to and the others, without empty
    groups."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in parameters:
        groups[parameter.ndim >= 2].append(parameter)
    return [{"params": found, "decays": decays} for decays, found in groups.items() if found]


def reset_state(optimizer: torch.optim.AdamW) -> None:
    """Forget both moments and the step count."""
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()


def has_gradients(optimizer: torch.optim.AdamW) -> bool:
    """Return whether any parameter has a gradient."""
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def take_step(
    optimizer: torch.optim.AdamW,
    config: OptimizerConfig,
    step: int,
    num_steps: int,
    norm: Tensor | None = None,
) -> dict[str, float]:
    """Clip the gradients to a global 2-norm, write the weights, drop the gradients.

    ``norm`` is that of all gradients, where the optimiser's parameters are not the whole model.

    Returns:
        ``grad_norm`` before clipping, and ``learning_rate``.

    Raises:
        NonFiniteError: on every rank, before anything is written, if the norm is not finite.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    assert gradients, "an optimiser step needs a forward_backward before it"
    norm = global_norm(gradients) if norm is None else norm
    if not torch.isfinite(norm):
        optimizer.zero_grad()
        raise NonFiniteError(
            f"the gradient norm of step {step} is {norm.item()}: no weight was changed; lower "
            "the learning rate or look at the batch's samples"
        )
    nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, norm)
    rate = set_hyperparameters(optimizer, config, step, num_steps)
    optimizer.step()
    optimizer.zero_grad()
    return {"grad_norm": norm.item(), "learning_rate": rate}


def set_hyperparameters(
    optimizer: torch.optim.AdamW, config: OptimizerConfig, step: int, num_steps: int
) -> float:
    """Prepare ``step`` of ``num_steps``; returns its learning rate."""
    rate = learning_rate(step, config, num_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
        group["betas"] = config.betas
        group["eps"] = config.epsilon
        group["weight_decay"] = config.weight_decay if group["decays"] else 0.0
    return rate


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm of all gradients, over all ranks where sharded, as a plain scalar."""
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
