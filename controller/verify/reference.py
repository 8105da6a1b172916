"""The model itself, by transformers: what engines must agree with, under any weight version."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from paceline.learner.checkpoints.shards import layout_of, local_shards
from paceline.weights_sync.handle import WeightHandle
from paceline.weights_sync.shared_memory import SharedMemoryPublisher

MOST_TOKENS = 4096
"""Tokens of one forward pass, padding included."""

RELATIVE_NOISE = 0.4
"""Noise that makes another version, next to each tensor's own standard deviation."""


class Reference:
    """A causal language model in float32 whose version 0 is the folder's.

    Every other version is version 0 with noise of its own, far enough from the others to be told
    apart by what it samples. ``shared`` is the folder in which versions are published.
    """

    def __init__(self, folder: str, shared: str) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model = model.eval().to(device)
        self._initial = copy.deepcopy(self._model.state_dict())
        self._version = 0
        self._publisher = SharedMemoryPublisher(shared, layout_of(self._model, "float32"))
        self.vocabulary: int = self._model.config.vocab_size

    def publish(self, version: int) -> WeightHandle:
        """Put a version where engines can load it from, until the next but one."""
        self.load(version)
        self._publisher.write(version, local_shards(self._model))
        return self._publisher.commit(version)

    @torch.no_grad()
    def load(self, version: int) -> None:
        """Compute with a version's weights from here on."""
        if version == self._version:
            return
        self._model.load_state_dict(self._initial)
        generator = torch.Generator().manual_seed(version)
        for parameter in self._model.parameters() if version else ():
            # a constant tensor, as norms begin, has none: then next to its size
            scale = parameter.std() if parameter.std() > 0 else parameter.abs().mean()
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.add_(noise * RELATIVE_NOISE * scale)
        self._version = version

    @torch.no_grad()
    def next_logits(self, contexts: Sequence[Sequence[int]]) -> Tensor:
        """Return logits float32 [rows, V] of the token that follows each context."""
        rows = []
        for batch in _batches(contexts):
            logits = self._forward(batch)
            last = torch.tensor([len(context) - 1 for context in batch], device=logits.device)
            rows.append(logits[torch.arange(len(batch), device=logits.device), last].cpu())
        return torch.cat(rows)

    @torch.no_grad()
    def completion_logits(
        self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[Tensor]:
        """Return logits float32 [C, V] of the places of each completion [C] after its prompt."""
        found: list[Tensor] = []
        for batch in _batches([[*prompt, *completion] for prompt, completion in texts]):
            for row in self._forward(batch):
                prompt, completion = texts[len(found)]
                start = len(prompt) - 1
                found.append(row[start : start + len(completion)].cpu())
        return found

    def _forward(self, contexts: Sequence[Sequence[int]]) -> Tensor:
        """Compute logits [rows, L, V]; those after a context's end mean nothing."""
        longest = max(map(len, contexts))
        # attention looks back only, so padding after the end changes nothing before it
        padded = [[*context, *[0] * (longest - len(context))] for context in contexts]
        return self._model(torch.tensor(padded, device=self._model.device)).logits


def _batches(contexts: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    """Yield consecutive contexts, as many as fit ``MOST_TOKENS`` or one."""
    rows = max(1, MOST_TOKENS // max(map(len, contexts)))
    for start in range(0, len(contexts), rows):
        yield contexts[start : start + rows]
