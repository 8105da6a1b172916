"""An engine in a process of its own, whose epochs of rollouts are timed step by step.

Only the process that was asked is busy; the others wait. So the modes of the benchmark can take
turns epoch by epoch, seconds apart, and each keeps what it has learned.

What is sampled is fixed by a sample's seed and the weights (``rollout/coupled_sampling.py``): all
modes sample the same tokens, but for rounding, and their seconds tell of steps, not of who was
lucky enough to have short answers. A draft that does not know the noise is accepted with the
probability that the model gives it, as under vLLM's own rule.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from paceline.configs.schema.rollout import RolloutConfig
from paceline.configs.vocabulary import Completion, RolloutRequest
from paceline.controller.bench.rollout.oracle import ReplayDrafter
from paceline.rollout.process_environment import engine_environment
from paceline.weights_sync.handle import WeightHandle

if TYPE_CHECKING:
    from paceline.rollout.vllm_engine import VLLMEngine


@dataclass(frozen=True)
class EngineSettings:
    """Settings of an engine; ``speculative`` replaces what ``config.drafting`` says.

    Whatever ``config.coupled_sampling`` tells the drafter, samples are coupled.
    """

    model_folder: str
    config: RolloutConfig
    max_length: int
    speculative: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Step:
    """An engine step: sequences and tokens (drafted ones included) it computed.

    ``seconds`` are those in which its process had a core: on a quiet machine all of them.
    """

    num_sequences: int
    num_tokens: int
    seconds: float


@dataclass(frozen=True)
class Epoch:
    """Answers to every request: wall seconds from the first to the last, and all steps.

    In ``seconds_busy`` of them its process had a core; in ``seconds_proposing`` the drafter worked.
    """

    seconds: float
    seconds_busy: float
    seconds_proposing: float
    steps: tuple[Step, ...]
    completions: Mapping[str, tuple[Completion, ...]]

    @property
    def lengths(self) -> list[int]:
        """Tokens of every completion."""
        return [len(each.token_ids) for group in self.completions.values() for each in group]

    @property
    def num_tokens(self) -> int:
        """Tokens sampled."""
        return sum(self.lengths)

    @property
    def num_drafted(self) -> int:
        """Drafted tokens that were verified."""
        return sum(step.num_tokens - step.num_sequences for step in self.steps)

    @property
    def num_accepted(self) -> int:
        """Sampled tokens beyond one a sequence and step: those that a draft had right."""
        return self.num_tokens - sum(step.num_sequences for step in self.steps)

    @property
    def entropy(self) -> float:
        """Mean negative log-probability of what was sampled, in nats a token."""
        groups = self.completions.values()
        return float(-np.concatenate([each.logprobs for group in groups for each in group]).mean())


class EngineProcess:
    """Engine in a process of its own; each call waits for its end."""

    def __init__(self, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(
            max_workers=1, mp_context=context, initializer=_write_to, initargs=(str(log),)
        )

    def build(self, settings: EngineSettings) -> None:
        """Build a new engine in place of the one that was there: nothing is remembered."""
        with _environment():
            self._pool.submit(_build, settings).result()

    def run(
        self,
        weights: WeightHandle,
        requests: Sequence[RolloutRequest],
        foretold: Epoch | None = None,
    ) -> Epoch:
        """Serve these weights and answer the requests, all handed in at once.

        ``foretold`` is what an oracle is told of them.
        """
        futures = {} if foretold is None else _by_sample(foretold)
        return self._pool.submit(_run, weights, tuple(requests), futures).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


@contextmanager
def _environment() -> Iterator[None]:
    """Give processes that are started within the environment of an engine."""
    before = dict(os.environ)
    os.environ.update(engine_environment(on_gpu=False))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _write_to(log: str) -> None:
    """Send this process's output to a file: the benchmark's own last line is for programs."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)


class _DraftMeter:
    """Meter before a drafter's ``propose``: tokens of the last drafts, seconds of all."""

    def __init__(self, drafter: Any) -> None:
        self._propose: Callable[..., list[list[int]]] = drafter.propose
        self.num_drafted = 0
        self.seconds = 0.0
        drafter.propose = self

    def __call__(self, *arguments: Any, **named: Any) -> list[list[int]]:
        started = time.perf_counter()
        drafts = self._propose(*arguments, **named)
        self.seconds += time.perf_counter() - started
        self.num_drafted = sum(map(len, drafts))
        return drafts


class _NoDrafter:
    """Stand-in that is metered where nothing is drafted."""

    def propose(self) -> list[list[int]]:
        """Return nothing."""
        return []


@dataclass
class _Live:
    """Engine of this process, with the meter before its drafter if it has one."""

    engine: VLLMEngine
    meter: _DraftMeter | None = None
    oracle: ReplayDrafter | None = None


_live: _Live | None = None


def _build(settings: EngineSettings) -> None:
    global _live
    from paceline.rollout.coupled_sampling import sample_coupled
    from paceline.rollout.vllm_engine import VLLMEngine
    from paceline.rollout.vllm_patches import model_runner

    _live = None
    gc.collect()
    engine = VLLMEngine(
        settings.model_folder,
        settings.config,
        max_length=settings.max_length,
        dtype="float32",
        seed=0,
        speculative_config=settings.speculative,
    )
    engine._engine.collective_rpc(sample_coupled)
    _live = _Live(engine)
    runner = model_runner(engine._engine)
    if settings.speculative is not None or settings.config.drafting is not None:
        if isinstance(runner.drafter, ReplayDrafter):
            _live.oracle = runner.drafter
            _live.oracle.attach(lambda: _rows(engine, runner.input_batch))
        _live.meter = _DraftMeter(runner.drafter)


def _rows(engine: VLLMEngine, batch: Any) -> list[tuple[str, int]]:
    """Name every row's sample, with the length of its prompt in tokens."""
    names = {sample.vllm_id: name for name, sample in engine._running.items()}
    return [
        (names[vllm_id], int(batch.num_prompt_tokens[row]))
        for row, vllm_id in enumerate(batch.req_ids)
    ]


def _by_sample(epoch: Epoch) -> dict[str, NDArray[np.int32]]:
    """Return the tokens int32 [C] of every sample, by the name that the engine gives it."""
    return {
        f"{request}/{index}": completion.token_ids
        for request, group in epoch.completions.items()
        for index, completion in enumerate(group)
    }


def _run(
    weights: WeightHandle,
    requests: tuple[RolloutRequest, ...],
    futures: Mapping[str, NDArray[np.int32]],
) -> Epoch:
    assert _live is not None, "no engine was built"
    engine, meter = _live.engine, _live.meter or _DraftMeter(_NoDrafter())
    engine.update_weights(weights)
    if _live.oracle is not None:
        _live.oracle.foretell(futures)
    meter.num_drafted, meter.seconds = 0, 0.0
    completions, steps = {}, []
    started, busy_before = time.perf_counter(), time.process_time()
    for request in requests:
        engine.add(request)
    while engine.has_work():
        num_sequences = len(engine._running)
        num_tokens = num_sequences + meter.num_drafted
        before = time.process_time()
        results = engine.step()
        steps.append(Step(num_sequences, num_tokens, time.process_time() - before))
        completions.update({result.request_id: result.completions for result in results})
    seconds, busy = time.perf_counter() - started, time.process_time() - busy_before
    return Epoch(seconds, busy, meter.seconds, tuple(steps), completions)
