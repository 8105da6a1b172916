"""Whole steps of TRL's trainers, from rewards and log-probabilities to a loss, without a model.

What a model, a reward function and an engine would give is handed in; everything in between is the
trainers' own code: padding, advantages, weights for what the engine and the learner disagree about,
the loss and its average. Samples are flat, as everywhere in our learner: their tokens lie one after
the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer


class OneProcess:
    """The little of an accelerator that losses ask for."""

    num_processes = 1
    sync_gradients = True

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor


@dataclass(frozen=True)
class Samples:
    """n samples in groups of equal size, T tokens in all.

    ``lengths`` int64 [n], ``rewards`` float64 [n]. Of tokens, float64 [T], log-probabilities under
    the policy that is trained (``logprobs``, with gradient), the one that sampled
    (``behaviour_logprobs``), the one at the start of the step (``proximal_logprobs``) and the
    reference; ``entropy`` (with gradient) of the one that is trained.
    """

    lengths: Tensor
    rewards: Tensor
    group_size: int
    logprobs: Tensor
    behaviour_logprobs: Tensor
    proximal_logprobs: Tensor
    reference_logprobs: Tensor
    entropy: Tensor

    def padded(self, of_tokens: Tensor) -> Tensor:
        """[n, C] from [T], zeros behind each sample's end; differentiable."""
        return pad_sequence(of_tokens.split(self.lengths.tolist()), batch_first=True)


@dataclass(frozen=True)
class Step:
    """``loss``: scalar; ``batch``: what the trainer prepared, among it ``advantages`` [n]."""

    loss: Tensor
    batch: dict[str, Tensor]


class Policy:
    """Stands for a model: ``columns`` is what it says of padded samples."""

    training = True
    is_gradient_checkpointing = False

    def __init__(self, logprobs: Tensor, entropy: Tensor) -> None:
        self.columns = (logprobs, entropy, None)


def grpo_step(samples: Samples, loss_type: str, max_tokens: int, **settings: Any) -> Step:
    """A step of `GRPOTrainer` whose samples an engine made, one update of one microbatch.

    ``settings`` are attributes of the trainer: ``beta``, ``epsilon_low``, ``epsilon_high``,
    ``scale_rewards``, ``importance_sampling_level``, ``entropy_coef``,
    ``vllm_importance_sampling_correction``, ``..._mode``, ``..._clip_min``, ``..._clip_max``.
    Further keys are those of its arguments: ``delta``.
    """
    arguments = {"delta": settings.pop("delta", None), "use_bias_correction_kl": False}
    trainer = _trainer(GRPOTrainer, samples, arguments)
    prompt_ids, completion_ids, texts = _generation(samples)
    # lists of scalars keep the precision
    engine = [list(column) for column in samples.behaviour_logprobs.split(samples.lengths.tolist())]
    trainer.__dict__ |= {
        "environment_factories": None,
        "environments": None,
        "tools": None,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "multi_objective_aggregation": "sum_then_normalize",
        "scale_rewards": "group",
        "loss_type": loss_type,
        "max_completion_length": max_tokens,
        "_entropy_bonus_enabled": "entropy_coef" in settings,
        "use_adaptive_entropy": False,
        # aligned with the optimiser, it would take what is trained for what sampled
        "num_iterations": 2,
        "use_vllm": True,
        "vllm_importance_sampling_correction": False,
        "vllm_importance_sampling_clip_min": None,
        "_generate": lambda prompts: (
            prompt_ids,
            completion_ids,
            None,
            texts,
            engine,
            {},
            None,
            [],
        ),
    }
    trainer.__dict__ |= settings
    return _run(trainer, samples)


def rloo_step(samples: Samples, **settings: Any) -> Step:
    """A step of `RLOOTrainer`; ``settings`` are its ``beta``, ``epsilon_low``, ``epsilon_high``.

    It knows no engine: the policy that sampled is the one at the start of the step.
    """
    trainer = _trainer(RLOOTrainer, samples, {})
    trainer.__dict__ |= {
        "reward_clip_range": None,
        "normalize_advantages": False,
        "_generate": lambda prompts: _generation(samples),
    }
    trainer.__dict__ |= settings
    return _run(trainer, samples)


def dpo_loss(samples: Samples, beta: float) -> Tensor:
    """`DPOTrainer`'s sigmoid loss of pairs: of each two samples the one with the higher reward is
    preferred."""
    pairs = samples.rewards.view(-1, 2).argsort(dim=1, descending=True)
    first = 2 * torch.arange(len(pairs))
    order = torch.cat([first + pairs[:, 0], first + pairs[:, 1]])
    ones = torch.ones(int(samples.lengths.sum()), dtype=torch.int64)
    # the prompt is one token, which is not trained
    mask = torch.nn.functional.pad(samples.padded(ones), (1, 0))[order]

    def outputs_of(logprobs: Tensor) -> Callable[..., SimpleNamespace]:
        padded = samples.padded(logprobs)[order]
        zeros = torch.zeros_like(padded)
        outputs = SimpleNamespace(
            log_probs=padded, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )
        return lambda **inputs: outputs

    accelerator = OneProcess()
    accelerator.device = torch.device("cpu")
    accelerator.gather_for_metrics = accelerator.gather
    trainer = object.__new__(DPOTrainer)
    trainer.__dict__ |= {
        "accelerator": accelerator,
        "model": Policy(samples.logprobs, samples.entropy),
        "ref_model": outputs_of(samples.reference_logprobs),
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
        "aux_loss_enabled": False,
        "ld_alpha": None,
        "precompute_ref_logps": False,
        "f_divergence_type": "reverse_kl",
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "beta": beta,
        "use_weighting": False,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    return trainer._compute_loss(outputs_of(samples.logprobs), inputs, return_outputs=False)


def _trainer(kind: type, samples: Samples, arguments: dict[str, Any]) -> Any:
    """A trainer with what GRPO's and RLOO's share."""
    accelerator = OneProcess()
    accelerator.device = torch.device("cpu")
    accelerator.process_index = 0
    trainer = object.__new__(kind)
    trainer.__dict__ |= {
        "accelerator": accelerator,
        "model": Policy(samples.padded(samples.proximal_logprobs), samples.padded(samples.entropy)),
        "ref_model": Policy(
            samples.padded(samples.reference_logprobs), samples.padded(samples.entropy)
        ),
        "args": SimpleNamespace(
            per_device_train_batch_size=len(samples.lengths),
            gradient_checkpointing_kwargs=None,
            gradient_accumulation_steps=1,
            steps_per_generation=1,
            **arguments,
        ),
        "_tokenizer": SimpleNamespace(pad_token_id=0),
        "pad_to_multiple_of": None,
        "mask_truncated_completions": False,
        "current_gradient_accumulation_steps": 1,
        "aux_loss_enabled": False,
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "num_generations": samples.group_size,
        "reward_weights": torch.ones(1, dtype=torch.float64),
        "reward_func_names": ["reward"],
        "_calculate_rewards": lambda *batch: samples.rewards[:, None],
        "_get_per_token_logps_and_entropies": lambda policy, *batch, **named: policy.columns,
        "_metrics": {"train": defaultdict(list)},
        "_logs": defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        "_pending_extra_logs": {},
        "_pending_metrics": {},
    }
    return trainer


def _generation(samples: Samples) -> tuple[list[list[int]], list[list[int]], list[str]]:
    """Ids of prompts and completions, and texts: nobody looks at what they are."""
    completion_ids = [[1] * length for length in samples.lengths.tolist()]
    return [[1] for _ in completion_ids], completion_ids, ["" for _ in completion_ids]


def _run(trainer: Any, samples: Samples) -> Step:
    prompts = [{"prompt": ""} for _ in samples.lengths]
    batch = trainer._generate_and_score_completions(prompts)
    current = Policy(samples.padded(samples.logprobs), samples.padded(samples.entropy))
    return Step(trainer._compute_loss(current, batch), batch)
