"""Mixtures of experts: layers in which a router chooses, for each token, a few of many MLPs.

A router's choices are counted, and may be given to it: a `Routing` goes with a row through the
model's keyword arguments, and every layer hands it to its router.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from paceline.configs.errors import ModelError
from paceline.configs.limits.parallel_limits import EXPERT_FAMILIES, divided_experts
from paceline.configs.schema.learner import LearnerConfig
from paceline.configs.vocabulary import NOT_ROUTED


class Routing:
    """One pass of a row through the routers.

    ``counted`` int64 [N] are the places in the row whose choices are counted. ``counts`` holds an
    int64 [E] for each layer; a layer that is recomputed in the backward pass overwrites its own.
    ``given`` int64 [T, layers, K] are experts to choose in place of the routers' own choice, which
    stands where it is ``NOT_ROUTED``.
    """

    # not a dataclass: FSDP copies dataclasses among a module's arguments

    def __init__(self, counted: Tensor, given: Tensor | None = None) -> None:
        self.counted = counted
        self.given = given
        self.counts: dict[int, Tensor] = {}


class ExpertCounts:
    """Number of tokens that each expert was chosen for, summed over rows."""

    def __init__(self) -> None:
        self._counts: dict[int, Tensor] = {}

    def add(self, counts: Mapping[int, Tensor]) -> None:
        """Add a row's counts [E] by layer; nothing is read from the device."""
        for layer, found in counts.items():
            self._counts[layer] = self._counts[layer] + found if layer in self._counts else found

    def take(self) -> NDArray[np.int64] | None:
        """Return and reset the counts, int64 [layers with experts, E]; None without any."""
        counts, self._counts = self._counts, {}
        return torch.stack([*counts.values()]).cpu().numpy() if counts else None


def has_experts(config: PreTrainedConfig) -> bool:
    """Tell whether the architecture is one of ``EXPERT_FAMILIES``."""
    return config.model_type in EXPERT_FAMILIES


def require_whole_experts(config: PreTrainedConfig, learner: LearnerConfig) -> None:
    """Refuse to divide a model with experts in other ways than FSDP and over samples.

    Raises:
        ModelError: ``learner`` asks for it.
    """
    problem = divided_experts(config.model_type, learner)
    if problem is not None:
        raise ModelError(problem)


def parameters_per_token(model: PreTrainedModel) -> int:
    """Return how many parameters a token is multiplied with: of experts those it is sent to."""
    total = sum(parameter.numel() for parameter in model.parameters())
    if not has_experts(model.config):
        return total
    named = model.named_parameters()
    in_experts = sum(parameter.numel() for name, parameter in named if ".mlp.experts." in name)
    used = in_experts * model.config.num_experts_per_tok // model.config.num_experts
    return total - in_experts + used


def attach_routers(layers: nn.ModuleList) -> None:
    """Make every router use the ``routing`` that its layer is called with, if there is one.

    Hooks do it: they run again where a layer is recomputed, and parameters keep their names.
    """
    for index, layer in enumerate(layers):
        if (gate := getattr(layer.mlp, "gate", None)) is not None:
            router = _Router(index)
            layer.register_forward_pre_hook(router.receive, with_kwargs=True)
            gate.register_forward_hook(router.choose)


class _Router:
    """Hooks of one layer and its router, with the routing of the pass that is running."""

    def __init__(self, layer: int) -> None:
        self._layer = layer
        self._routing: Routing | None = None

    def receive(self, _: nn.Module, __: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        """Keep the layer's ``routing`` argument; called before the layer."""
        self._routing = arguments.get("routing")

    def choose(
        self, gate: nn.Module, _: tuple[Any, ...], chosen: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Replace and count choices; called after the router, with its logits [T, E], and
        weights and experts [T, K]."""
        if self._routing is None:
            return chosen
        if self._routing.given is not None:
            chosen = _replayed(gate, chosen, self._routing.given[:, self._layer])
        logits, experts = chosen[0], chosen[2]
        counted = experts.index_select(0, self._routing.counted).flatten()
        counts = counted.new_zeros(logits.shape[-1])
        self._routing.counts[self._layer] = counts.index_add_(0, counted, torch.ones_like(counted))
        return chosen


def _replayed(
    gate: nn.Module, chosen: tuple[Tensor, Tensor, Tensor], given: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the router's choice with ``given`` experts [T, K] in place of its own.

    Their weights are the router's own probabilities of them, so that it is trained on every token
    (Rollout Routing Replay, Ma et al. 2025, arXiv 2510.11370).
    """
    logits, weights, experts = chosen
    experts = torch.where(given == NOT_ROUTED, experts, given)
    replayed = logits.softmax(-1, dtype=torch.float32).gather(1, experts)
    if gate.norm_topk_prob:
        replayed = replayed / replayed.sum(-1, keepdim=True)
    return logits, replayed.to(weights.dtype), experts


def router_metrics(counts: NDArray[np.int64]) -> dict[str, float]:
    """Return how evenly tokens were spread over experts, as means over the layers of [layers, E].

    ``router_load_max``: the largest share of tokens, times E: 1 where all are equal, E / K at most;
    ``router_entropy``: of the shares, in nats, ln E where all are equal; ``router_dead_experts``:
    the share of experts that nothing was sent to.
    """
    shares = counts / counts.sum(axis=1, keepdims=True)
    logs = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
    return {
        "router_load_max": float(shares.max(axis=1).mean() * counts.shape[1]),
        "router_entropy": float(-(shares * logs).sum(axis=1).mean()),
        "router_dead_experts": float((counts == 0).mean()),
    }
