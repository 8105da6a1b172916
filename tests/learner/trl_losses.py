"""TRL's own loss code, fed with tensors instead of a model."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import torch
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer


class OneProcess:
    """The little of an accelerator that losses ask for."""

    num_processes = 1
    sync_gradients = True

    def gather(self, tensor):
        return tensor

    def reduce(self, tensor, reduction):
        return tensor


def grpo_loss(
    loss_type: str,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    level: str = "token",
    max_tokens: int = 0,
    beta: float = 0.0,
    reference: Tensor | None = None,
    delta: float | None = None,
) -> Tensor:
    """``GRPOTrainer._compute_loss`` of padded samples: tensors [n, C], advantages [n] or [n, C]."""
    trainer = object.__new__(GRPOTrainer)
    trainer.__dict__ |= {
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": level,
        "beta": beta,
        "loss_type": loss_type,
        "epsilon_low": clip_low,
        "epsilon_high": clip_high,
        "use_vllm": False,
        "max_completion_length": max_tokens,
        "current_gradient_accumulation_steps": 1,
        "accelerator": OneProcess(),
        "model": SimpleNamespace(training=True),
        "args": SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
        "_entropy_bonus_enabled": False,
        "_metrics": {"train": defaultdict(list)},
        "_get_per_token_logps_and_entropies": lambda *given, **named: (
            logprobs,
            torch.zeros_like(logprobs),
            None,
        ),
    }
    inputs = _inputs(old_logprobs, advantages, mask)
    inputs |= {"num_items_in_batch": mask.sum(), "ref_per_token_logps": reference}
    return trainer._compute_loss(None, inputs)


def rloo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """``RLOOTrainer._compute_loss``: its ratio is that of the whole sample, a product."""
    trainer = object.__new__(RLOOTrainer)
    trainer.__dict__ |= {
        "beta": 0.0,
        "epsilon_low": clip_low,
        "epsilon_high": clip_high,
        "current_gradient_accumulation_steps": 1,
        "accelerator": OneProcess(),
        "model": SimpleNamespace(training=True),
        "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list)},
        "_get_per_token_logps_and_entropies": lambda *given, **named: (
            logprobs,
            torch.zeros_like(logprobs),
            None,
        ),
    }
    inputs = _inputs(old_logprobs, advantages, mask)
    return trainer._compute_loss(None, inputs | {"old_logps": (old_logprobs * mask).sum(1)})


def _inputs(old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> dict[str, Tensor]:
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    return {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones(len(mask), 1),
        "completion_ids": ids,
        "completion_mask": mask,
        "old_per_token_logps": old_logprobs,
        "advantages": advantages,
    }
