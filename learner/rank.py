"""The models that one rank of the learner holds, and passes over them without training.

The policy is always there; an algorithm may want a critic, with a backbone of its own or the
policy's, and a frozen reference policy. All of them are sharded alike and see the same packed rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paceline.configs.errors import ClusterError
from paceline.configs.schema.algorithm_parts import CriticConfig
from paceline.configs.schema.learner import LearnerConfig
from paceline.configs.schema.model import ModelConfig
from paceline.configs.vocabulary import TrainSample
from paceline.learner.activity import Activity
from paceline.learner.batch.bundles import bundle_samples
from paceline.learner.batch.microbatch import Microbatch, build_microbatch
from paceline.learner.batch.packing import imbalance, plan_packing
from paceline.learner.engines.mesh import RankMesh, join_process_group
from paceline.learner.engines.sharded import ShardedEngine, shard
from paceline.learner.engines.training_engine import TrainingEngine
from paceline.learner.model.experts import require_whole_experts
from paceline.learner.model.heads import logprobs_and_entropy
from paceline.learner.model.model import Head, load_policy, no_head


@dataclass(frozen=True)
class Share:
    """A rank's microbatches, and the share of time that ranks wait for each other
    (``packing.imbalance``)."""

    microbatches: list[Microbatch]
    imbalance: float


class RankModels:
    """A rank's shards of every model.

    ``value_model`` predicts values where there is a critic: the policy itself where it shares its
    backbone, else ``critic``. ``activity`` says which pass this rank is in.

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
        self.activity = Activity()
        self._config = config
        self._precision = model.precision
        device = _device(config)
        # One rank in bfloat16 is sharded over itself: FSDP's mixed precision is then the same
        # arithmetic on any number of ranks. FSDP off-loads, too, and DeepSpeed is never alone.
        is_distributed = (
            config.num_ranks > 1
            or model.precision != "float32"
            or config.offload_optimizer
            or config.engine == "deepspeed"
        )
        if is_distributed:
            join_process_group(config, rank, rendezvous, device)
        self.mesh = RankMesh(config, device, is_distributed=is_distributed)
        is_shared = critic is not None and critic.backbone == "shared"
        self.policy = self._train(model_folder, has_values=is_shared)
        self.critic: TrainingEngine | None = None
        if critic is not None and not is_shared:
            self.critic = self._train(model_folder, has_values=True)
        self.value_model = self.policy if is_shared else self.critic
        self.reference: ShardedEngine | None = None
        self._moves_reference = False

    def trained(self) -> dict[str, TrainingEngine]:
        """Every model that is trained, by its role's name."""
        roles = {"policy": self.policy}
        if self.critic is not None:
            roles["critic"] = self.critic
        return roles

    def load_reference(self, folder: str, offload: bool) -> None:
        """Hold the model of a Hugging Face folder, frozen; in host memory where it is offloaded.

        Raises:
            ModelError: it cannot be read.
        """
        policy = load_policy(folder)
        self.reference = shard(policy, self.mesh, self._precision, trains=False, offload=offload)
        self._moves_reference = offload and self.mesh.devices is None

    def share(self, samples: Sequence[TrainSample]) -> Share:
        """What this rank computes of the samples that train anything."""
        capacity, num_ranks = self._config.tokens_per_microbatch, self.mesh.num_data_ranks
        num_stages = self.mesh.sizes["pipeline"]
        bundles = bundle_samples(
            samples,
            capacity,
            num_ranks * num_stages,
            shares_prompts=self._config.share_prompts,
        )
        costs = [bundle.cost(self.policy.quadratic_cost) for bundle in bundles]
        plan = plan_packing(
            [bundle.size for bundle in bundles],
            costs,
            num_ranks,
            capacity,
            fewest=num_stages,
            multiple_of=num_stages if self.mesh.stages_per_rank > 1 else 1,
        )
        microbatches = [
            build_microbatch(
                [bundles[i] for i in chosen], samples, self.mesh.device, self.mesh.num_token_ranks
            )
            for chosen in plan[self.mesh.data_rank]
        ]
        return Share(microbatches, imbalance(plan, costs))

    def logprobs(
        self, model: TrainingEngine, samples: Sequence[TrainSample], temperature: float
    ) -> list[NDArray[np.float32]]:
        """Log-probabilities under a model of each sample's trained tokens; on every rank."""
        head = partial(logprobs_and_entropy, temperature=temperature)
        return self.evaluate(model, samples, head)

    def reference_logprobs(
        self, samples: Sequence[TrainSample], temperature: float
    ) -> list[NDArray[np.float32]]:
        """The same under the reference policy."""
        assert self.reference is not None, "load_reference() comes first"
        if not self._moves_reference:
            return self.logprobs(self.reference, samples, temperature)
        self.reference.to(self.mesh.device)
        try:
            return self.logprobs(self.reference, samples, temperature)
        finally:
            self.reference.to("cpu")

    def values(self, samples: Sequence[TrainSample]) -> list[NDArray[np.float32]]:
        """Values of the states before each sample's trained tokens; on every rank."""
        assert self.value_model is not None, "there is no critic"
        return self.evaluate(self.value_model, samples, no_head)

    def evaluate(
        self, model: TrainingEngine, samples: Sequence[TrainSample], head: Head
    ) -> list[NDArray[np.float32]]:
        """The first output for each sample's trained tokens, on every rank; empty where one trains
        nothing."""
        with self.activity.during("evaluation"):
            here = self._pieces(model.evaluate(self.share(samples).microbatches, head))
            result = [np.zeros(0, dtype=np.float32)] * len(samples)
            for found in self.mesh.gather(list(here)):
                for index, values in found:
                    result[index] = values
        return result

    def _pieces(
        self, found: Iterable[tuple[Microbatch, Tensor]]
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """By sample: its index and what was found for its tokens."""
        for number, (microbatch, output) in enumerate(found, 1):
            self.activity.tell(f"evaluated {number} microbatches")
            values = output.float().cpu().numpy()
            pieces = np.split(values, np.cumsum(microbatch.lengths.cpu().numpy())[:-1])
            yield from zip(microbatch.samples, pieces, strict=False)

    def _train(self, folder: str, *, has_values: bool) -> TrainingEngine:
        policy = load_policy(
            folder,
            checkpointing=self._config.activation_checkpointing,
            tokens_per_chunk=self._config.tokens_per_chunk,
            has_values=has_values,
        )
        require_whole_experts(policy.causal_lm.config, self._config)
        if self._config.engine == "deepspeed":
            # importing DeepSpeed takes seconds
            from paceline.learner.engines.deepspeed_engine import ZeroEngine

            return ZeroEngine(policy, self.mesh, self._precision, self._config.deepspeed)
        offload = self._config.offload_optimizer
        return shard(policy, self.mesh, self._precision, offload=offload)


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
