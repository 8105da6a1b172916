"""Decoder layers that process a row in chunks: exact, in memory that hardly grows with the row.

A layer saves nothing for the backward pass but its input. Forward, chunks of tokens pass through
the whole layer one after the other; of each only keys and values are kept. Backward, keys and
values of the row are computed once more. Then chunks are taken last to first. Each is recomputed
with a graph of its own and its gradients are summed; a chunk's keys and values have their whole
gradient when its turn comes, because only later chunks attend to them. This is the chain rule in
another order (StreamBP, Luo et al. 2025, arXiv 2506.03077, section 3), so results are those of the
whole row. Held at a time are one chunk's activations and a few tensors [T, H].

The modelling code is transformers' own: it runs on a chunk as it would on a row, and
`packed_attention` is given the keys and values of earlier chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from paceline.configs.errors import ModelError
from paceline.configs.limits.parallel_limits import unknown_to_chunks
from paceline.learner.model.attention import PackedSegments, RowKeys, chunks_of


def chunk_layers(causal_lm: PreTrainedModel, tokens_per_chunk: int) -> None:
    """Make every decoder layer and the final norm process ``tokens_per_chunk`` tokens at a time.

    Raises:
        ModelError: the architecture is not one whose layers are known.
    """
    problem = unknown_to_chunks(causal_lm.config.model_type)
    if problem is not None:
        raise ModelError(problem)
    base = causal_lm.base_model
    for layer in base.layers:
        _replace_forward(layer, partial(_layer_forward, tokens_per_chunk=tokens_per_chunk))
    _replace_forward(base.norm, partial(_norm_forward, tokens_per_chunk=tokens_per_chunk))


def _replace_forward(module: nn.Module, forward: Any) -> None:
    # of the instance: parameter names, and the hooks that shard parameters, stay as they are
    module.forward = MethodType(forward, module)


def _layer_forward(
    layer: nn.Module, hidden: Tensor, *, tokens_per_chunk: int, **arguments: Any
) -> Tensor:
    chunked = _ChunkedPass(layer, tokens_per_chunk, arguments)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    output = _ChunkedLayer.apply(chunked, hidden, *parameters)
    assert isinstance(output, Tensor)
    return output


def _norm_forward(norm: nn.Module, hidden: Tensor, *, tokens_per_chunk: int) -> Tensor:
    """Recompute the norm in the backward pass: else it would save several tensors [T, H]."""
    whole = partial(type(norm).forward, norm)
    chunks = hidden.split(tokens_per_chunk, dim=1)
    return torch.cat([checkpoint(whole, chunk, use_reentrant=False) for chunk in chunks], dim=1)


class _RowKeys:
    """Keys and values of a row, filled chunk by chunk; each [T, num_kv_heads, head_dim]."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._num_known = 0
        self.row: tuple[Tensor, ...] = ()

    def extended(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Extend as `RowKeys` describes; called without gradients."""
        if not self.row:
            self.row = tuple(t.new_empty(self._num_tokens, *t.shape[1:]) for t in (key, value))
        chunk = slice(self._num_known, self._num_known + len(key))
        for row, own in zip(self.row, (key, value), strict=True):
            row[chunk] = own
        self._num_known = chunk.stop
        known_key, known_value = (row[: chunk.stop] for row in self.row)
        return known_key, known_value


class _KnownKeys:
    """Known keys and values of a row, for a chunk that is differentiated by the ``earlier`` ones
    and by its ``own``."""

    def __init__(self, row: tuple[Tensor, ...], chunk: slice) -> None:
        self._known = [tensor[: chunk.stop] for tensor in row]
        self.earlier = [tensor[: chunk.start].detach().requires_grad_() for tensor in row]
        self.own: tuple[Tensor, ...] = ()

    def extended(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Extend as `RowKeys` describes."""
        self.own = key, value
        both = zip(self.earlier, self.own, self._known, strict=True)
        known_key, known_value = (_Joined.apply(*tensors) for tensors in both)
        return known_key, known_value


class _Joined(torch.autograd.Function):
    """Concatenation of ``earlier`` and ``own`` keys without a copy: ``known`` holds it already."""

    @staticmethod
    def forward(ctx: Any, earlier: Tensor, own: Tensor, known: Tensor) -> Tensor:
        ctx.num_earlier = len(earlier)
        return known

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad[: ctx.num_earlier], grad[ctx.num_earlier :], None


@dataclass(frozen=True)
class _ChunkedPass:
    """A layer and its other ``arguments`` beside the hidden states [1, T, H] of a row."""

    layer: nn.Module
    tokens_per_chunk: int
    arguments: dict[str, Any]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Trained parameters of the layer; under FSDP they are whole while the layer runs."""
        return [p for p in self.layer.parameters() if p.requires_grad]

    def chunks(self, num_tokens: int) -> list[slice]:
        """Return the slices of the row's tokens."""
        step = self.tokens_per_chunk
        return [slice(i, min(i + step, num_tokens)) for i in range(0, num_tokens, step)]

    def output(self, hidden: Tensor, chunk: slice, keys: RowKeys) -> Tensor:
        """Apply the layer to a chunk of the row; hidden states and result are [1, chunk, H]."""
        row: PackedSegments = self.arguments["packed_segments"]
        described = chunks_of(row.segments, self.tokens_per_chunk, hidden.device)
        output = type(self.layer).forward(
            self.layer,
            hidden,
            **self._of_chunk(chunk),
            packed_segments=described[chunk.start // self.tokens_per_chunk],
            row_keys=keys,
        )
        assert isinstance(output, Tensor)
        return output

    def add_keys(self, hidden: Tensor, chunk: slice, keys: RowKeys) -> None:
        """Compute only the keys and values of a chunk, into ``keys``."""
        attention = self.layer.get_submodule("self_attn")
        attention(
            hidden_states=self.layer.get_submodule("input_layernorm")(hidden),
            **self._of_chunk(chunk),
            packed_segments=None,
            row_keys=keys,
        )

    def _of_chunk(self, chunk: slice) -> dict[str, Any]:
        cos, sin = self.arguments["position_embeddings"]
        return {
            "attention_mask": self.arguments["attention_mask"],
            "position_ids": self.arguments["position_ids"][:, chunk],
            "position_embeddings": (cos[:, chunk], sin[:, chunk]),
        }


class _ChunkedLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chunked: _ChunkedPass, hidden: Tensor, *_: Tensor) -> Tensor:
        keys = _RowKeys(hidden.shape[1])
        output = torch.empty_like(hidden)
        for chunk in chunked.chunks(hidden.shape[1]):
            output[:, chunk] = chunked.output(hidden[:, chunk], chunk, keys)
        ctx.save_for_backward(hidden)
        ctx.chunked = chunked
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        chunked: _ChunkedPass = ctx.chunked
        (hidden,) = ctx.saved_tensors
        chunks = chunked.chunks(hidden.shape[1])
        keys = _RowKeys(hidden.shape[1])
        for chunk in chunks:
            chunked.add_keys(hidden[:, chunk], chunk, keys)
        parameters = chunked.parameters
        grad_hidden = torch.empty_like(hidden)
        # sums over chunks, in float32 whatever the precision
        of_keys, of_parameters = _zeros_like(keys.row), _zeros_like(parameters)
        for chunk in reversed(chunks):
            known = _KnownKeys(keys.row, chunk)
            own_hidden = hidden[:, chunk].detach().requires_grad_()
            with torch.enable_grad():
                output = chunked.output(own_hidden, chunk, known)
            grad_hidden[:, chunk], *grads = torch.autograd.grad(
                (output, *known.own),
                (own_hidden, *known.earlier, *parameters),
                (grad_output[:, chunk], *(total[chunk].to(output.dtype) for total in of_keys)),
            )
            totals = [*(total[: chunk.start] for total in of_keys), *of_parameters]
            for total, grad in zip(totals, grads, strict=True):
                total += grad
        cast = [t.to(p.dtype) for t, p in zip(of_parameters, parameters, strict=True)]
        return None, grad_hidden, *cast


def _zeros_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(tensor, dtype=torch.float32) for tensor in tensors]
