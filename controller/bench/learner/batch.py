"""What every side of the learner's benchmark trains on: one model and one long-tailed batch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paceline.configs.schema.model import ModelConfig
from paceline.configs.vocabulary import Completion, Group, Prompt, Sample, TrainBatch
from paceline.controller.data.tokenizer import characters_tokenizer
from paceline.learner.model.model import write_initial_model

FIRST_PRINTABLE, AFTER_PRINTABLE = 33, 127


@dataclass(frozen=True)
class LearnerWorkload:
    """A Qwen3 and groups of completions whose lengths are log-normal: ``median`` tokens, the
    logarithm's standard deviation ``sigma``, at most ``longest``. Prompts are of ``num_prompt``
    tokens. The vocabulary is larger than what is sampled: real ones are large."""

    hidden: int = 256
    layers: int = 6
    vocabulary: int = 2048
    num_groups: int = 8
    samples_per_group: int = 8
    num_prompt: int = 48
    median: float = 32
    sigma: float = 0.8
    longest: int = 256
    seed: int = 0

    @property
    def num_samples(self) -> int:
        """Completions of the batch."""
        return self.num_groups * self.samples_per_group

    def model_config(self) -> ModelConfig:
        """Return the configuration of the model, whose weights are random."""
        architecture = {
            "model_type": "qwen3",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": self.hidden // 128,
            "head_dim": 64,
            "intermediate_size": 3 * self.hidden,
            "tie_word_embeddings": True,
            "vocab_size": self.vocabulary,
        }
        return ModelConfig(
            architecture=architecture,
            tokenizer="characters",
            max_length=self.num_prompt + self.longest,
        )

    def write_model(self, folder: Path) -> Path:
        """Write model and tokenizer in Hugging Face format, unless they are there."""
        if not (folder / "config.json").exists():
            tokenizer = characters_tokenizer()
            config, end = self.model_config(), tokenizer.eos_token_id
            assert end is not None
            write_initial_model(config, self.vocabulary, end, self.seed, str(folder))
            tokenizer.save_pretrained(str(folder))
        return folder

    def batch(self) -> TrainBatch:
        """Draw the groups: printable characters, random rewards, nothing to filter."""
        generator = np.random.default_rng(self.seed)
        groups = []
        for index in range(self.num_groups):
            prompt = Prompt("", "", tuple(self._characters(generator, self.num_prompt).tolist()))
            samples = tuple(self._sample(generator) for _ in range(self.samples_per_group))
            groups.append(Group(index, prompt, samples))
        return TrainBatch(0, tuple(groups))

    def required_flops(self) -> float:
        """Count the floating-point operations that a step needs at least, forward and (twice that)
        backward: prompts and completions once, causal pairs, logits of trained tokens only."""
        lengths = [sample.num_tokens for sample in self.batch().samples]
        num_tokens = self.num_groups * self.num_prompt + sum(lengths)
        heads, width = self.hidden // 64, self.hidden
        matrices = self.hidden * (2 * width + 2 * width * (heads // 2) // heads)
        matrices += 3 * self.hidden * 3 * self.hidden
        pairs = self.num_groups * self.num_prompt**2 / 2
        pairs += sum(n * self.num_prompt + n**2 / 2 for n in lengths)
        per_layer = 2 * matrices * num_tokens + 4 * width * pairs
        return 3 * (self.layers * per_layer + 2 * self.hidden * self.vocabulary * sum(lengths))

    def _sample(self, generator: np.random.Generator) -> Sample:
        drawn = self.median * np.exp(self.sigma * generator.standard_normal())
        token_ids = self._characters(generator, int(np.clip(drawn, 2, self.longest)))
        completion = evenly_sampled(token_ids, self.vocabulary)
        return Sample(completion, reward=float(generator.normal()))

    def _characters(self, generator: np.random.Generator, count: int) -> np.ndarray:
        return generator.integers(FIRST_PRINTABLE, AFTER_PRINTABLE, count).astype(np.int32)


def evenly_sampled(token_ids: np.ndarray, vocabulary: int) -> Completion:
    """Return a completion of tokens int32 [C], as likely as random weights make them."""
    logprobs = np.full(len(token_ids), -np.log(vocabulary), dtype=np.float32)
    return Completion(token_ids, logprobs, (), "stop")


LONG_TAILED = LearnerWorkload()
BRIEF = LearnerWorkload(layers=2, num_groups=4, longest=128)
