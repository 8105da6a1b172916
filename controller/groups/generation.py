"""What fills a claimed group: sampling and grading, or a demonstration."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from paceline.configs.errors import GraderError
from paceline.configs.vocabulary import (
    Completion,
    Group,
    Prompt,
    RolloutRequest,
    Sample,
    SamplingParameters,
    UnfinishedGroup,
)
from paceline.controller.data.rendering import Demonstration
from paceline.controller.groups.buffer import Work
from paceline.controller.groups.concurrency import gather_or_cancel

logger = logging.getLogger(__name__)

Sampler = Callable[[RolloutRequest], Awaitable[tuple[Completion, ...]]]
Grade = Callable[[Prompt, Sequence[str]], Awaitable[list[float]]]
Decode = Callable[[np.ndarray], str]
Teach = Callable[[Prompt, Sequence[Completion]], Awaitable[Sequence[np.ndarray]]]
"""Log-probabilities, float32 each, that a teacher gives the tokens of a prompt's completions."""


def request_seed(run_seed: int, stream: int, index: int) -> int:
    """Return a seed for a request's samples: each (run, stream, index) is independent."""
    return int(np.random.SeedSequence([run_seed, stream, index]).generate_state(1)[0])


async def sample_to_end(sample: Sampler, request: RolloutRequest) -> tuple[Completion, ...]:
    """Ask again, with what there is, until every sample is finished.

    Raises:
        WorkerLost: a worker died over it.
    """
    name = request.request_id
    for segment in itertools.count():
        completions = await sample(replace(request, request_id=f"{name}.{segment}"))
        request = replace(request, partial=completions)
        if all(completion.is_finished for completion in completions):
            break
    return completions


@dataclass
class Rollouts:
    """Samples a group's prompt on the workers and grades what came back whole.

    ``segment_tokens`` is the most tokens a call may add to a sample; 0 means no such limit.
    ``teach``, where there is one, looks at finished samples while they are graded.
    """

    sample: Sampler
    grade: Grade
    decode: Decode
    sampling: SamplingParameters
    num_samples: int
    seed: int
    stream: int = 0
    segment_tokens: int = 0
    require_finish: bool = True
    drop_on_error: bool = False
    teach: Teach | None = None
    _attempts: Iterator[int] = field(default_factory=itertools.count)

    async def __call__(self, work: Work) -> Group | UnfinishedGroup:
        """Return the finished group.

        With ``require_finish`` samples that the token limit cut off get reward 0.

        Where a sample is unfinished, nothing is graded: the group is to be continued.

        Raises:
            WorkerLost: the worker died; another attempt can succeed.
            GraderError: the grader raised or hung, and such groups are not to be dropped.
        """
        request = RolloutRequest(
            request_id=f"{self.stream}-{work.group_id}-{next(self._attempts)}",
            prompt_token_ids=work.prompt.token_ids,
            sampling=self.sampling,
            num_samples=self.num_samples,
            seed=request_seed(self.seed, self.stream, work.group_id),
            partial=work.partial,
            segment_tokens=self.segment_tokens,
        )
        completions = await self.sample(request)
        if not all(completion.is_finished for completion in completions):
            return UnfinishedGroup(work.group_id, completions)
        if self.teach is None:
            return await self._graded(work, completions)
        group, taught = await gather_or_cancel(
            self._graded(work, completions), self.teach(work.prompt, completions)
        )
        pairs = zip(group.samples, taught, strict=True)
        samples = tuple(replace(sample, teacher_logprobs=found) for sample, found in pairs)
        return replace(group, samples=samples)

    async def _graded(self, work: Work, completions: Sequence[Completion]) -> Group:
        texts = [self.decode(completion.token_ids) for completion in completions]
        fault = None
        try:
            rewards = await self.grade(work.prompt, texts)
        except GraderError as error:
            if not self.drop_on_error:
                raise
            logger.warning("dropping group %d: %s", work.group_id, error)
            rewards, fault = [0.0] * len(texts), "grader_error"
        samples = tuple(
            Sample(completion, 0.0 if self._is_cut_off(completion) else reward, text)
            for completion, reward, text in zip(completions, rewards, texts, strict=True)
        )
        return Group(work.group_id, work.prompt, samples, fault)

    def _is_cut_off(self, completion: Completion) -> bool:
        return self.require_finish and completion.finish_reason != "stop"


@dataclass(frozen=True)
class Demonstrations:
    """Completions of a data set in place of samples: learning without sampling, in the same loop.

    ``given`` is a prompt's: a gold one alone, or a better and a worse one.
    """

    given: Callable[[Prompt], tuple[Demonstration, ...]]

    async def __call__(self, work: Work) -> Group:
        """Return a group of them, the first with reward 1, others 0.

        No version sampled them, and their log-probabilities are 0.
        """
        samples = tuple(
            Sample(unsampled(demonstration), float(index == 0), demonstration.text)
            for index, demonstration in enumerate(self.given(work.prompt))
        )
        return Group(work.group_id, work.prompt, samples)


def unsampled(demonstration: Demonstration) -> Completion:
    """Return a completion that no version sampled, with log-probabilities of 0."""
    return Completion(
        token_ids=demonstration.token_ids,
        logprobs=np.zeros(len(demonstration.token_ids), dtype=np.float32),
        versions=(),
        finish_reason="stop",
    )
