"""What both sides of the end-to-end benchmark train on: model, problems and settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

RECIPE = "quickstart"


@dataclass(frozen=True)
class Workload:
    """A task with the settings that Paceline and its peer share; lengths are in tokens.

    ``task`` are overrides of the quick start that define the task, ``warm_start`` those of the
    supervised run that makes the initial model. The rest is equal on both sides.
    """

    name: str
    description: str
    max_length: int
    max_tokens: int
    groups_per_step: int
    samples_per_group: int = 16
    learning_rate: float = 3e-4
    clip_low: float = 0.2
    clip_high: float = 0.28
    adam_betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    temperature: float = 1.0
    seed: int = 0
    peer_microbatch_size: int = 128
    task: Mapping[str, str] = field(default_factory=dict)
    warm_start: Mapping[str, str] = field(default_factory=dict)

    @property
    def samples_per_step(self) -> int:
        """Completions of one optimiser step."""
        return self.groups_per_step * self.samples_per_group

    def shared_overrides(self) -> dict[str, str]:
        """Return the quick start's keys that make it this workload, on either side."""
        return {
            "seed": str(self.seed),
            "model.max_length": str(self.max_length),
            "rollout.sampling.max_tokens": str(self.max_tokens),
            "rollout.sampling.temperature": str(self.temperature),
            "data.num_held_out": "16",
            **self.task,
        }

    def training_overrides(self, num_steps: int) -> dict[str, str]:
        """Return the keys of a timed run: training alone, at a constant learning rate."""
        return {
            **self.shared_overrides(),
            "warm_start": "null",
            "loop.num_steps": str(num_steps),
            "loop.groups_per_step": str(self.groups_per_step),
            "loop.samples_per_group": str(self.samples_per_group),
            "algorithm.loss.clip_low": str(self.clip_low),
            "algorithm.loss.clip_high": str(self.clip_high),
            "learner.optimizer.learning_rate": str(self.learning_rate),
            "learner.optimizer.betas": f"[{self.adam_betas[0]}, {self.adam_betas[1]}]",
            "learner.optimizer.max_grad_norm": str(self.max_grad_norm),
            "learner.optimizer.schedule": "constant",
            "learner.optimizer.warmup_steps": "0",
            "evaluation.every_steps": "null",
            "evaluation.num_examples": "0",
            "checkpoint.every_steps": "null",
            "observability.live": "false",
            # A check of the first updates only; it would fall into the warm-up steps.
            "observability.self_check_steps": "0",
        }


SHORT = Workload(
    name="short",
    description="quick start: words of 3-10 letters spelt backward",
    max_length=32,
    max_tokens=16,
    groups_per_step=32,
)

LONG = Workload(
    name="long",
    description="labelled digits written out: answers of 3 to 156 tokens, most of them short",
    max_length=272,
    max_tokens=160,
    groups_per_step=32,
    samples_per_group=8,
    task={
        "data.source": (
            "{type: import, import_path: 'paceline.controller.bench.e2e.transcripts:Transcripts', "
            "parameters: {median: 9, sigma: 0.75, max_terms: 52}, prompt_template: '{question}='}"
        ),
        "reward": "{type: exact}",
    },
    warm_start={"warm_start.target_accuracy": "0.3", "warm_start.evaluate_every": "20"},
)

LONG_WIDE = replace(
    LONG,
    name="long-wide",
    description=f"{LONG.description}; a wider model, so that training takes as long",
    task={
        **LONG.task,
        "model.architecture": (
            "{model_type: qwen3, hidden_size: 256, num_hidden_layers: 2, num_attention_heads: 4, "
            "num_key_value_heads: 2, head_dim: 32, intermediate_size: 768, "
            "tie_word_embeddings: true}"
        ),
    },
)
