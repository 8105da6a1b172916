"""What is verified: one model behind engines that are drafted for in different ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from paceline.configs.schema.rollout import DraftingConfig, RolloutConfig
from paceline.configs.vocabulary import Completion, RolloutRequest, SamplingParameters
from paceline.controller.verify.checks.evidence import Sample
from paceline.controller.verify.drafters import (
    NUM_DRAFTED,
    Script,
    ScriptedDrafter,
    drafted,
    drafting,
    nothing,
)
from paceline.controller.verify.reference import Reference
from paceline.rollout.vllm_engine import VLLMEngine

MAX_SEQUENCES = 64

OWN_DRAFTING = DraftingConfig(max_tokens=NUM_DRAFTED, budget="none")
"""Whether a draft pays is not the question here: everything that can be drafted is."""

SCRIPTED = {
    "method": "custom_class",
    "model": f"{ScriptedDrafter.__module__}.{ScriptedDrafter.__name__}",
    "num_speculative_tokens": NUM_DRAFTED,
}


@dataclass(frozen=True)
class Drafter:
    """An engine and what drafts for it; ``script`` is for engines with a ``ScriptedDrafter``."""

    name: str
    engine: VLLMEngine
    script: Script = nothing
    drafts: bool = True

    @property
    def counts(self) -> tuple[int, int]:
        """Tokens drafted and accepted so far."""
        own = self.engine.draft_counters
        if own:
            return (
                int(own["num_drafted_siblings"] + own["num_drafted_history"]),
                int(own["num_accepted_siblings"] + own["num_accepted_history"]),
            )
        return ScriptedDrafter.counters.num_drafted, ScriptedDrafter.counters.num_accepted


@dataclass(frozen=True)
class Run:
    """Samples of a drafter's engine, and how many tokens were drafted and accepted."""

    drafter: Drafter
    samples: Sequence[Sample]
    num_drafted: int
    num_accepted: int

    @property
    def num_tokens(self) -> int:
        """Tokens sampled."""
        return sum(len(sample.completion.token_ids) for sample in self.samples)

    def faults(self, *, accepts: bool | None = None) -> list[str]:
        """Return what is wrong with the drafting; ``accepts`` says whether any had to be right."""
        if not self.drafter.drafts:
            return [] if not self.num_drafted else ["it was drafted for"]
        if not self.num_drafted:
            return ["nothing was drafted: nothing was verified"]
        if accepts is not None and accepts != bool(self.num_accepted):
            return [f"{self.num_accepted} of {self.num_drafted} drafted tokens were accepted"]
        return []


def joined_runs(runs: Sequence[Run]) -> Run:
    """Join several runs of one drafter into one."""
    return Run(
        runs[0].drafter,
        [sample for run in runs for sample in run.samples],
        sum(run.num_drafted for run in runs),
        sum(run.num_accepted for run in runs),
    )


@dataclass(frozen=True)
class Size:
    """Size of a check: samples of a prompt, and tokens of a sample."""

    num_samples: int
    num_tokens: int
    num_greedy_tokens: int


FULL = Size(num_samples=12, num_tokens=40, num_greedy_tokens=96)
QUICK = Size(num_samples=6, num_tokens=32, num_greedy_tokens=64)


class Subject:
    """A model under verification, and engines of it: undrafted, drafted for by us, by a script."""

    def __init__(
        self,
        folder: str,
        shared: str,
        *,
        prompts: Sequence[tuple[int, ...]],
        size: Size,
        seed: int,
        kv_cache_mb: int,
    ) -> None:
        self.reference = Reference(folder, shared)
        self.prompts = prompts
        self.size = size
        self.generator = torch.Generator().manual_seed(seed)
        self._folder = folder
        self._kv_cache_mb = kv_cache_mb
        self._seed = seed
        self._next_seed = seed * 1_000_000  # generators take no more than 32 bits
        self._num_requests = 0
        self._scripted = self.engine(speculative_config=SCRIPTED)
        self.undrafted = Drafter("none", self.engine(), drafts=False)
        self.ours = Drafter("ours", self.engine(drafting=OWN_DRAFTING))

    def engine(
        self, *, speculative_config: Mapping[str, Any] | None = None, **rollout: Any
    ) -> VLLMEngine:
        """Build an engine of the model that serves version 0, in this process.

        ``rollout`` are settings of ``RolloutConfig``; ``speculative_config`` is one of vLLM's own.
        """
        config = RolloutConfig(
            max_num_seqs=MAX_SEQUENCES,
            kv_cache_mb=self._kv_cache_mb,
            gpu_memory_utilization=0.2,  # several engines share the device
            **rollout,
        )
        engine = VLLMEngine(
            self._folder,
            config,
            max_length=self.max_length,
            dtype="float32",
            seed=self._seed,
            speculative_config=speculative_config,
        )
        engine.update_weights(self.reference.publish(0))
        return engine

    @property
    def max_length(self) -> int:
        """Context of the engines: greedy completions fill it to the last token."""
        return max(map(len, self.prompts)) + self.size.num_greedy_tokens

    def scripted(self, name: str, script: Script) -> Drafter:
        """Return a drafter that follows a script."""
        return Drafter(name, self._scripted, script)

    def request(
        self, prompt: tuple[int, ...], sampling: SamplingParameters, num_samples: int
    ) -> RolloutRequest:
        """Return a request with a name and seeds that no other has."""
        self._num_requests += 1
        self._next_seed += num_samples
        return RolloutRequest(
            f"verify-{self._num_requests}",
            prompt,
            sampling,
            num_samples,
            self._next_seed - num_samples,
        )

    def run(
        self,
        drafter: Drafter,
        requests: Sequence[RolloutRequest],
        between: Callable[[int], None] = lambda step: None,
    ) -> Run:
        """Sample requests together; ``between`` is called after each step with its number."""
        before = drafter.counts
        answers: dict[str, tuple[Completion, ...]] = {}
        with drafting(drafter.script):
            for request in requests:
                drafter.engine.add(request)
            step = 0
            while drafter.engine.has_work():
                answers |= {found.request_id: found.completions for found in drafter.engine.step()}
                step += 1
                between(step)
        samples = [
            Sample(
                request,
                completion,
                drafted(request.prompt_token_ids, completion.token_ids.tolist()),
            )
            for request in requests
            for completion in answers[request.request_id]
        ]
        num_drafted, num_accepted = (
            now - then for now, then in zip(drafter.counts, before, strict=True)
        )
        return Run(drafter, samples, num_drafted, num_accepted)
