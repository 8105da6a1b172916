"""The models that one rank of the learner holds, and passes over them without training.

The policy is always there; an algorithm may want a critic, with a backbone of its own or the
policy's, and a frozen reference policy. All of them are sharded alike and see the same packed rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim import AdamW

from paceline.configs.errors import ClusterError
from paceline.configs.schema.algorithm_parts import CriticConfig
from paceline.configs.schema.learner import LearnerConfig
from paceline.configs.schema.model import ModelConfig
from paceline.configs.vocabulary import TrainSample
from paceline.kernels.token_logprobs import token_logprobs
from paceline.learner.bundles import bundle_samples
from paceline.learner.mesh import gather_objects, join_process_group, shard_policy
from paceline.learner.microbatch import Microbatch, build_microbatch
from paceline.learner.model import Head, PolicyModel, load_policy, no_head
from paceline.learner.optimizer import build_optimizer
from paceline.learner.packing import plan_packing

HeadOf = Callable[[Microbatch], Head]


class RankModels:
    """A rank's shards of every model, with the optimisers of those that are trained.

    ``value_model`` predicts values where there is a critic: the policy itself where it shares its
    backbone, else ``critic``.

    Raises:
        ModelError: the model cannot be read or trained on packed rows.
        ClusterError: the other ranks, or the GPU asked for, are not there.
    """

    def __init__(
        self,
        model_folder: str,
        model: ModelConfig,
        config: LearnerConfig,
        critic: CriticConfig | None,
        *,
        rank: int,
        rendezvous: str | None,
    ) -> None:
        self._config = config
        self._precision = model.precision
        self._rank = rank
        self.device = _device(config)
        # One rank in bfloat16 is sharded over itself: FSDP's mixed precision is then the same
        # arithmetic on any number of ranks.
        self.is_sharded = config.num_ranks > 1 or model.precision != "float32"
        if self.is_sharded:
            join_process_group(config, rank, rendezvous, self.device)
        is_shared = critic is not None and critic.backbone == "shared"
        self.policy = self._load(model_folder, has_values=is_shared)
        self.critic: PolicyModel | None = None
        if critic is not None and not is_shared:
            self.critic = self._load(model_folder, has_values=True)
        self.value_model = self.policy if is_shared else self.critic
        self.reference: PolicyModel | None = None
        self._moves_reference = False
        self._quadratic_cost = self.policy.quadratic_cost()
        self.policy_optimizer = build_optimizer(list(self.policy.parameters()))
        self.critic_optimizer: AdamW | None = None
        if self.critic is not None:
            self.critic_optimizer = build_optimizer(list(self.critic.parameters()))

    def trained(self) -> dict[str, tuple[PolicyModel, AdamW]]:
        """Every model that is trained, with its optimiser, by its role's name."""
        roles = {"policy": (self.policy, self.policy_optimizer)}
        if self.critic is not None:
            assert self.critic_optimizer is not None
            roles["critic"] = (self.critic, self.critic_optimizer)
        return roles

    def load_reference(self, folder: str, offload: bool) -> None:
        """Hold the model of a Hugging Face folder, frozen; in host memory where it is offloaded.

        Raises:
            ModelError: it cannot be read.
        """
        self.reference = self._load(folder, offload=offload).requires_grad_(False)
        self._moves_reference = offload and not self.is_sharded

    def microbatches(self, samples: Sequence[TrainSample]) -> Iterator[Microbatch]:
        """This rank's share of the samples that train anything."""
        capacity, num_ranks = self._config.tokens_per_microbatch, self._config.num_ranks
        bundles = bundle_samples(samples, capacity, num_ranks)
        sizes = [bundle.size for bundle in bundles]
        costs = [bundle.cost(self._quadratic_cost) for bundle in bundles]
        for chosen in plan_packing(sizes, costs, num_ranks, capacity)[self._rank]:
            yield build_microbatch([bundles[i] for i in chosen], samples, self.device)

    def logprobs(
        self, model: PolicyModel, samples: Sequence[TrainSample], temperature: float
    ) -> list[NDArray[np.float32]]:
        """Log-probabilities under a model of each sample's trained tokens; on every rank."""

        def head(microbatch: Microbatch) -> Head:
            return partial(token_logprobs, targets=microbatch.targets, temperature=temperature)

        return self.everywhere(samples, self.evaluate(model, samples, head))

    def reference_logprobs(
        self, samples: Sequence[TrainSample], temperature: float
    ) -> list[NDArray[np.float32]]:
        """The same under the reference policy."""
        assert self.reference is not None, "load_reference() comes first"
        if not self._moves_reference:
            return self.logprobs(self.reference, samples, temperature)
        try:
            return self.logprobs(self.reference.to(self.device), samples, temperature)
        finally:
            self.reference.to("cpu")

    def values(self, samples: Sequence[TrainSample]) -> list[NDArray[np.float32]]:
        """Values of the states before each sample's trained tokens; on every rank."""
        assert self.value_model is not None, "there is no critic"
        return self.everywhere(
            samples, self.evaluate(self.value_model, samples, lambda microbatch: no_head)
        )

    @torch.no_grad()
    def evaluate(
        self, model: PolicyModel, samples: Sequence[TrainSample], head_of: HeadOf
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """This rank's share: sample, and the first output for its trained tokens."""
        for microbatch in self.microbatches(samples):
            values = model(microbatch.row, head_of(microbatch))[0].float().cpu().numpy()
            pieces = np.split(values, np.cumsum(microbatch.lengths.cpu().numpy())[:-1])
            yield from zip(microbatch.samples, pieces, strict=False)

    def everywhere(
        self,
        samples: Sequence[TrainSample],
        found_here: Iterator[tuple[int, NDArray[np.float32]]],
    ) -> list[NDArray[np.float32]]:
        """What all ranks found, in the order of the samples; empty where one trains nothing."""
        result = [np.zeros(0, dtype=np.float32)] * len(samples)
        for found in gather_objects(list(found_here)):
            for index, values in found:
                result[index] = values
        return result

    def _load(self, folder: str, *, has_values: bool = False, offload: bool = False) -> PolicyModel:
        model = load_policy(
            folder,
            activation_checkpointing=self._config.activation_checkpointing,
            has_values=has_values,
        )
        if self.is_sharded:
            shard_policy(
                model, self.device, self._config.num_ranks, self._precision, offload=offload
            )
        return model if offload else model.to(self.device)


def _device(config: LearnerConfig) -> torch.device:
    if not config.gpus_per_rank:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ClusterError(
            f"learner.gpus_per_rank is {config.gpus_per_rank:g} but torch sees no GPU here: "
            "install with CUDA, or set it to 0"
        )
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)
