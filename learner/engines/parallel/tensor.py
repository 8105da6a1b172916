"""Tensor parallelism: every matrix divided over ranks that work on the same tokens.

Attention heads, intermediate features and vocabulary are divided as in Megatron-LM (Shoeybi et al.
2019, arXiv 1909.08053), and between matrices each rank holds a share of the row's tokens (sequence
parallelism, Korthikanti et al. 2022, arXiv 2205.05198): norms and residuals are not computed
everywhere, and an all-gather before a block and a reduce-scatter after it cost what an all-reduce
would. The vocabulary stays divided in the loss (`kernels/vocab_parallel_logprobs.py`).

Every parameter becomes a DTensor, also those that every rank holds whole: each sees only part of
the tokens or heads, so that its gradient is a partial sum, which a plain tensor would not know.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import PreTrainedConfig

from paceline.configs.errors import ModelError
from paceline.configs.limits.parallel_limits import undivided_by_tensor, unknown_to_tensor
from paceline.learner.engines.mesh import RankMesh
from paceline.learner.model.model import PolicyModel

TOKENS = Shard(1)
HEADS = Shard(2)
"""Dimension of features of [1, T, H] and of heads of [1, T, heads, head_dim]."""

ParallelPlan = dict[str, ParallelStyle]
"""Style by name of module."""


def divide_matrices(policy: PolicyModel, mesh: RankMesh) -> None:
    """Divide a model, or a stage of one, over the tensor ranks, in place; before FSDP.

    It then takes rows whose length is a multiple of the ranks.

    Raises:
        ModelError: the plan does not know the architecture, or the ranks do not divide it.
    """
    causal_lm = policy.causal_lm
    require_divisible(causal_lm.config, mesh.sizes["tensor"])
    assert mesh.devices is not None, "tensor ranks need a process group"
    ranks = mesh.devices["tensor"]
    held = dict(causal_lm.named_parameters(remove_duplicate=False))
    head, embedding = held.get("lm_head.weight"), held.get("model.embed_tokens.weight")
    for layer in policy.decoder_layers:
        _divide(layer, ranks, _layer_plan())
    _divide(causal_lm, ranks, _ends_plan())
    if head is embedding and head is not None:  # a stage in the middle has neither
        causal_lm.lm_head.weight = causal_lm.base_model.embed_tokens.weight
    if policy.value_head is not None:
        _divide(policy, ranks, {"value_head": _Whole()})
    assert all(isinstance(parameter, DTensor) for parameter in policy.parameters())


def require_divisible(config: PreTrainedConfig, num_ranks: int) -> None:
    """Refuse what cannot be divided over ``num_ranks`` tensor ranks.

    Raises:
        ModelError: names the architecture, or the number that is no multiple of the ranks.
    """
    problem = unknown_to_tensor(config.model_type, num_ranks)
    if problem is not None:
        raise ModelError(problem)
    problem = undivided_by_tensor(
        num_ranks,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
        config.vocab_size,
    )
    if problem is not None:
        raise ModelError(problem)


def _layer_plan() -> ParallelPlan:
    """Return styles for both blocks of a layer: from a share of the tokens to all and back."""
    gathers_tokens = PrepareModuleInput(
        input_kwarg_layouts={"hidden_states": TOKENS},
        desired_input_kwarg_layouts={"hidden_states": Replicate()},
    )
    norms_heads = SequenceParallel(sequence_dim=HEADS.dim, use_local_output=True)
    return {
        "input_layernorm": SequenceParallel(),
        "self_attn": gathers_tokens,
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.q_norm": norms_heads,
        "self_attn.k_norm": norms_heads,
        "self_attn.o_proj": RowwiseParallel(output_layouts=TOKENS),
        "post_attention_layernorm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=TOKENS, desired_input_layouts=Replicate()),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=TOKENS),
    }


def _ends_plan() -> ParallelPlan:
    """Return styles around the layers: all tokens in, all hidden states out."""
    return {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=TOKENS),
        "model.norm": _NormOfShares(),
        "lm_head": ColwiseParallel(),
    }


class _Whole(ParallelStyle):
    """Style of a module that is the same on every rank: parameters, inputs and outputs."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        same = PrepareModuleInputOutput(
            input_layouts=Replicate(),
            desired_input_layouts=Replicate(),
            output_layouts=Replicate(),
            desired_output_layouts=Replicate(),
        )
        return same._apply(distribute_module(module, device_mesh), device_mesh)


class _NormOfShares(ParallelStyle):
    """Style of a norm over each rank's share of the tokens, gathered afterwards."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        gathers = PrepareModuleOutput(output_layouts=TOKENS, desired_output_layouts=Replicate())
        return gathers._apply(SequenceParallel()._apply(module, device_mesh), device_mesh)


def _divide(module: nn.Module, ranks: DeviceMesh, plan: ParallelPlan) -> None:
    """Apply the styles of modules that exist: families differ in norms, stages lack an end."""
    children = dict(module.named_modules())
    for name, style in plan.items():
        if name in children and list(children[name].parameters()):
            # every rank has read the same weights: nothing is sent
            parallelize_module(children[name], ranks, style, src_data_rank=None)
