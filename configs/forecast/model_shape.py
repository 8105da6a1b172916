"""Size of a decoder, from its configuration alone: no torch, no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.configs.schema.model import ModelConfig

CHARACTERS_VOCABULARY = 128
"""Tokens of the `characters` tokenizer: one for each ASCII code."""

# What transformers assumes where a configuration leaves a key out (a test compares them).
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 11008, "num_key_value_heads": None, "head_dim": None},
    "qwen2": {"intermediate_size": 22016, "num_key_value_heads": 32, "head_dim": None},
    "qwen3": {"intermediate_size": 22016, "num_key_value_heads": 32, "head_dim": 128},
    "qwen3_moe": {
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "intermediate_size": 6144,
        "num_key_value_heads": 4,
        "head_dim": None,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": (),
    },
}
_COMMON = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


@dataclass(frozen=True)
class ExpertShape:
    """Experts of a model: in ``layers`` of its layers, a router chooses ``per_token`` of ``count``
    gated MLPs of ``intermediate`` features for each token."""

    layers: int
    count: int
    per_token: int
    intermediate: int


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Llama-like decoder (RMSNorm, rotary positions, gated MLP, grouped queries)."""

    vocabulary: int
    hidden: int
    layers: int
    query_heads: int
    key_value_heads: int
    head_dim: int
    intermediate: int
    tied_embeddings: bool
    biases_per_layer: int
    norms_per_layer: int
    experts: ExpertShape | None = None

    @property
    def num_parameters(self) -> int:
        """All parameters; tied embeddings count once."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied_embeddings else 2)
        sparse = 0 if self.experts is None else self.experts.layers
        layers = (self.layers - sparse) * self._dense_layer + sparse * self._sparse_layer
        return embeddings + layers + self.hidden

    @property
    def parameters_per_layer(self) -> int:
        """Attention, gated MLP or experts, norms and biases of one layer; of the largest."""
        return max(self._dense_layer, self._sparse_layer)

    @property
    def intermediate_per_token(self) -> int:
        """Intermediate features that a layer computes of a token, in the layer with the most."""
        if self.experts is None:
            return self.intermediate
        of_experts = self.experts.per_token * self.experts.intermediate
        is_mixed = self.experts.layers < self.layers
        return max(of_experts, self.intermediate if is_mixed else 0)

    @property
    def _beside_mlp(self) -> int:
        attention = 2 * self.hidden * (self.query_heads + self.key_value_heads) * self.head_dim
        return attention + self.norms_per_layer + self.biases_per_layer

    @property
    def _dense_layer(self) -> int:
        if self.experts is not None and self.experts.layers == self.layers:
            return 0
        return self._beside_mlp + 3 * self.hidden * self.intermediate

    @property
    def _sparse_layer(self) -> int:
        if self.experts is None or not self.experts.layers:
            return 0
        router, expert = self.hidden, 3 * self.hidden * self.experts.intermediate
        return self._beside_mlp + self.experts.count * (router + expert)

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Return the bytes that one token takes in the KV cache, over all layers."""
        return 2 * self.layers * self.key_value_heads * self.head_dim * bytes_per_value


def model_shape(model: ModelConfig) -> ModelShape | None:
    """Return the shape that ``model`` will have, None if it cannot be known without loading it.

    Known are `architecture` with the `characters` tokenizer or a `vocab_size`, and a `path` whose
    local folder holds a `config.json`, of the model types llama, qwen2, qwen3 and qwen3_moe.
    """
    keys = model_keys(model)
    if keys.get("model_type") not in _DEFAULTS or "vocab_size" not in keys:
        return None
    return _shape(keys)


def model_keys(model: ModelConfig) -> dict[str, Any]:
    """Return what is known of ``model``'s transformers configuration: for a hub name, nothing."""
    if model.architecture is None:
        return _read_config(Path(str(model.path)).expanduser())
    keys = dict(model.architecture)
    if model.tokenizer == "characters":
        keys["vocab_size"] = CHARACTERS_VOCABULARY
    return keys


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        keys = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return keys if isinstance(keys, dict) else {}


def _shape(keys: Mapping[str, Any]) -> ModelShape:
    family = str(keys["model_type"])
    given = {key: value for key, value in keys.items() if value is not None}
    full = {**_COMMON, **_DEFAULTS[family], **given}
    hidden, heads = int(full["hidden_size"]), int(full["num_attention_heads"])
    kv_heads = int(full["num_key_value_heads"] or heads)
    head_dim = int(full["head_dim"] or hidden // heads)
    intermediate = int(full["intermediate_size"])
    query_width, kv_width = heads * head_dim, kv_heads * head_dim
    biases = 0
    if family == "qwen2":
        biases = query_width + 2 * kv_width
    elif full["attention_bias"]:
        biases = query_width + 2 * kv_width + hidden
    if family == "llama" and full["mlp_bias"]:
        biases += 2 * intermediate + hidden
    return ModelShape(
        vocabulary=int(full["vocab_size"]),
        hidden=hidden,
        layers=int(full["num_hidden_layers"]),
        query_heads=heads,
        key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        tied_embeddings=bool(full["tie_word_embeddings"]),
        biases_per_layer=biases,
        norms_per_layer=2 * hidden + (2 * head_dim if family.startswith("qwen3") else 0),
        experts=_experts(full) if family == "qwen3_moe" else None,
    )


def _experts(full: Mapping[str, Any]) -> ExpertShape:
    """Count layers with experts: every ``decoder_sparse_step``-th but ``mlp_only_layers``."""
    dense, step = set(full["mlp_only_layers"]), int(full["decoder_sparse_step"])
    layers = range(int(full["num_hidden_layers"]))
    count = int(full.get("num_local_experts", full["num_experts"]))
    return ExpertShape(
        layers=sum(i not in dense and not (i + 1) % step for i in layers) if count else 0,
        count=count,
        per_token=int(full["num_experts_per_tok"]),
        intermediate=int(full["moe_intermediate_size"]),
    )
