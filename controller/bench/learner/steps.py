"""The learner's step, on one rank or several, and a plain one: what people write by hand around a
transformers model."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from paceline.configs.schema.learner import LearnerConfig, OptimizerConfig
from paceline.controller.bench.harness.subprocesses import side_by_side
from paceline.controller.bench.learner.batch import LearnerWorkload
from paceline.learner.batch.sequences import TokenSequence, token_sequences
from paceline.learner.objective.advantages import GroupRelative
from paceline.learner.objective.losses.policy import Clip
from paceline.learner.objective.objective import Objective
from paceline.learner.worker import LearnerWorker

OPTIMIZER = OptimizerConfig(learning_rate=1e-5, schedule="constant", warmup_steps=0)
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
MATMUL_SIZE = 1024
ALONE = LearnerConfig(tokens_per_microbatch=4096)


def learner_worker(
    workload: LearnerWorkload,
    model: Path,
    weights: str,
    config: LearnerConfig = ALONE,
    rank: int = 0,
    rendezvous: str | None = None,
) -> LearnerWorker:
    """Build a rank in float32, without checkpointing, as the other sides."""
    return LearnerWorker(
        str(model),
        workload.model_config(),
        config,
        rank=rank,
        rendezvous=rendezvous,
        weights_folder=weights,
        seed=workload.seed,
    )


def algorithm(workload: LearnerWorkload) -> Objective:
    """Return GRPO with DAPO's mean over tokens."""
    clip = Clip(CLIP_LOW, CLIP_HIGH)
    return Objective(GroupRelative(), clip, "token_mean", max_tokens=workload.longest)


def paceline_steps(workload: LearnerWorkload, model: Path, num_steps: int) -> list[float]:
    """Time the learner's steps on one rank, as in a run."""
    with tempfile.TemporaryDirectory() as weights:
        return rank_steps(workload, num_steps, learner_worker(workload, model, weights))


def divided_steps(
    workload: LearnerWorkload, model: Path, num_steps: int, config: LearnerConfig
) -> list[float]:
    """Time the same steps on the ranks of ``config``, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            partial(one_of_ranks, workload, model, num_steps, config, folder, rank)
            for rank in range(config.num_ranks)
        ]
        return [max(seconds) for seconds in zip(*side_by_side(ranks), strict=True)]


def one_of_ranks(
    workload: LearnerWorkload,
    model: Path,
    num_steps: int,
    config: LearnerConfig,
    folder: str,
    rank: int,
) -> list[float]:
    """Time one rank's steps; ranks meet in ``folder``."""
    torch.set_num_threads(1)
    worker = learner_worker(workload, model, folder, config, rank, f"file://{folder}/rendezvous")
    try:
        return rank_steps(workload, num_steps, worker)
    finally:
        worker.close()


def rank_steps(workload: LearnerWorkload, num_steps: int, worker: LearnerWorker) -> list[float]:
    """Time a rank's steps."""
    batch = workload.batch()

    def step(index: int) -> None:
        worker.forward_backward(batch, algorithm(workload))
        worker.optimizer_step(OPTIMIZER, index, num_steps)

    return timed(step, num_steps)


def plain_steps(
    workload: LearnerWorkload, model: Path, num_steps: int, microbatch_size: int
) -> list[float]:
    """Time the same steps by padded batches and whole logits."""
    causal_lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(causal_lm.parameters(), lr=OPTIMIZER.learning_rate, fused=True)

    def step(_: int) -> None:
        plain_gradients(causal_lm, workload, microbatch_size)
        torch.nn.utils.clip_grad_norm_(causal_lm.parameters(), OPTIMIZER.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, num_steps)


def plain_gradients(
    causal_lm: torch.nn.Module, workload: LearnerWorkload, microbatch_size: int
) -> None:
    """Add the gradients of the batch to the model's."""
    batch = workload.batch()
    rewards = torch.tensor([s.reward for s in batch.samples]).view(-1, workload.samples_per_group)
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    advantages = (centred / (rewards.std(dim=1, keepdim=True) + 1e-6)).flatten()
    sequences = token_sequences(batch.groups)
    sampled = [torch.from_numpy(sample.completion.logprobs) for sample in batch.samples]
    for start in range(0, len(sequences), microbatch_size):
        some = slice(start, start + microbatch_size)
        loss = plain_loss(
            causal_lm, sequences[some], sampled[some], advantages[some], batch.num_trained_tokens
        )
        torch.autograd.backward(loss)


def plain_loss(
    causal_lm: torch.nn.Module,
    sequences: Sequence[TokenSequence],
    sampled_logprobs: Sequence[Tensor],
    advantages: Tensor,
    num_trained: int,
) -> Tensor:
    """Return the clipped policy loss of padded sequences [B, L] from whole logits [B, L, V].

    ``sampled_logprobs`` are float32 [C] each.
    """

    def padded(arrays: Sequence[Tensor]) -> Tensor:
        return pad_sequence(list(arrays), batch_first=True)

    def behind_prompts(values: Sequence[Tensor]) -> Tensor:
        pairs = zip(sequences, values, strict=True)
        return padded([pad(value, (s.num_prompt, 0)) for s, value in pairs])[:, 1:]

    tokens = padded([torch.from_numpy(s.token_ids).long() for s in sequences])
    attended = padded([torch.ones(len(s.token_ids), dtype=torch.int64) for s in sequences])
    trained = behind_prompts([torch.ones(s.num_completion, dtype=torch.bool) for s in sequences])
    sampled = behind_prompts(sampled_logprobs)
    logits = causal_lm(input_ids=tokens, attention_mask=attended, use_cache=False).logits[:, :-1]
    logprobs = logits.log_softmax(dim=-1).gather(2, tokens[:, 1:, None])[..., 0]
    ratio = (logprobs - sampled).exp()
    clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    gains = torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
    return -(gains * trained).sum() / num_trained


def matmul_flops(num_rounds: int = 8) -> float:
    """Measure the floating-point operations a second of a large float32 product on one thread: the
    ceiling of a step."""
    torch.set_num_threads(1)
    one, other = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE).unbind()
    seconds = min(timed(lambda _: one @ other, num_rounds))
    return 2 * MATMUL_SIZE**3 / seconds


def timed(step: Callable[[int], object], num_steps: int) -> list[float]:
    """Return the seconds of each of ``num_steps`` steps, after one that is not timed."""
    step(0)
    seconds = []
    for index in range(1, num_steps + 1):
        started = time.perf_counter()
        step(index)
        seconds.append(time.perf_counter() - started)
    return seconds
