"""A small model that was trained: peaked where its language is, open where that is, in seconds.

Its language is a chain over symbols with one table of transitions for each topic, and a text's
first token says which. So a right next token needs attention to the beginning of the text (a stale
or misplaced key would show), and greedy texts are not one token over and over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from paceline.configs.schema.model import ModelConfig
from paceline.learner.model.model import write_initial_model

NUM_SYMBOLS = 40
NUM_TOPICS = 6
VOCABULARY = NUM_SYMBOLS + NUM_TOPICS
NUM_STEPS = 150
BATCH, LENGTH = 48, 32
"""Texts a training step sees, and their tokens."""


@dataclass(frozen=True)
class Language:
    """``transitions`` float [topics, symbols, symbols]: probability of a symbol after another."""

    transitions: Tensor

    @classmethod
    def of_seed(cls, seed: int) -> Language:
        """Draw a language: some symbols nearly always have one follower, others any of several.

        The likeliest followers of a topic make one cycle through all symbols.
        """
        generator = torch.Generator().manual_seed(seed)
        shape = (NUM_TOPICS, NUM_SYMBOLS, NUM_SYMBOLS)
        scores = torch.randn(shape, generator=generator)
        for table in scores:
            cycle = torch.randperm(NUM_SYMBOLS, generator=generator)
            table[cycle, cycle.roll(1)] = table.max(dim=-1).values[cycle] + 0.3
        sharpness = 1.0 + 4.0 * torch.rand(shape[:2], generator=generator)
        return cls((sharpness[..., None] * scores).softmax(-1))

    def texts(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Draw texts int64 [count, length]: a topic and then symbols."""
        topics = torch.randint(NUM_TOPICS, (count,), generator=generator)
        symbols = torch.randint(NUM_SYMBOLS, (count,), generator=generator)
        columns = [topics + NUM_SYMBOLS]
        for _ in range(length - 1):
            columns.append(symbols)
            following = self.transitions[topics, symbols]
            symbols = torch.multinomial(following, 1, generator=generator)[:, 0]
        return torch.stack(columns, dim=1)

    @property
    def entropy(self) -> float:
        """Mean entropy of the next symbol, in nats: no model's loss can fall below it."""
        return float(-(self.transitions * self.transitions.clamp_min(1e-30).log()).sum(-1).mean())


def architecture(max_length: int) -> ModelConfig:
    """Return a Qwen3 of two layers, small enough for engine steps of a few milliseconds."""
    shape = {
        "model_type": "qwen3",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "intermediate_size": 128,
        "tie_word_embeddings": True,
    }
    return ModelConfig(architecture=shape, tokenizer="characters", max_length=max_length)


def train_tiny_model(folder: str, *, seed: int, max_length: int) -> float:
    """Write a model of ``Language.of_seed(seed)`` to a folder; returns its last training loss."""
    write_initial_model(architecture(max_length), VOCABULARY, 0, seed, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    language, generator = Language.of_seed(seed), torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=NUM_STEPS)
    for _ in range(NUM_STEPS):
        texts = language.texts(BATCH, LENGTH, generator)
        loss = model(texts, labels=texts).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    return loss.item()
