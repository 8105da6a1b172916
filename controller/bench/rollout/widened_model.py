"""A trained model whose steps cost what a larger one's cost, and that computes what it computed.

What drafting saves depends on how long a step takes and on how sure the model is of its tokens. A
model of 50 million parameters cannot be trained to be sure of anything on two cores in minutes; one
of half a million can. So a small model is trained and then widened: the residual stream, the heads,
the units of the MLPs and the layers become more, all of them compute, and nothing that is new
reaches the output. (Net2Net, arXiv 1511.05641, widens by copies; here what is added is multiplied
by zeros.)

Let h be the small width, H the large one and c = (H / h)^.5. Values of the residual stream are
multiplied by c and the dimensions beyond h are 0, so that the mean square that RMSNorm divides by
is the same, epsilon included; its weights then divide by c, and the last one once more, for the
output embedding is the input's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

INITIAL_DEVIATION = 0.08
"""Of random weights. Small models learn several times faster from it than from the usual 0.02."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen3 model; heads have 32 dimensions."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int

    def config(self, vocab_size: int, max_length: int, end_token_id: int) -> Qwen3Config:
        """Return the transformers configuration; embeddings are tied."""
        return Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=32,
            initializer_range=INITIAL_DEVIATION,
            tie_word_embeddings=True,
            max_position_embeddings=max_length,
            eos_token_id=end_token_id,
            bos_token_id=None,
            pad_token_id=None,
        )


SMALL = Shape(128, 384, num_layers=2, num_heads=4, num_key_value_heads=2)
WIDE = Shape(512, 1664, num_layers=16, num_heads=16, num_key_value_heads=8)
"""51 million parameters."""


def build(config: Qwen3Config, seed: int) -> PreTrainedModel:
    """Build a float32 model with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    return model.eval()


@torch.no_grad()
def widened(small: PreTrainedModel, shape: Shape, seed: int = 0) -> PreTrainedModel:
    """Return a model of ``shape`` with the logits of ``small``, up to rounding.

    Raises:
        ValueError: the shape is smaller somewhere, or another number of heads shares keys.
    """
    config = small.config
    _check_larger(config, shape)
    wide = build(
        shape.config(config.vocab_size, config.max_position_embeddings, config.eos_token_id), seed
    )
    factor = (shape.hidden_size / config.hidden_size) ** 0.5
    source, target = small.base_model, wide.base_model
    _place(target.embed_tokens, source.embed_tokens.weight * factor)
    target.norm.weight[: config.hidden_size] = source.norm.weight / factor**2
    for layer in target.layers:
        # what is new writes nothing
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    for old, new in zip(source.layers, target.layers, strict=False):
        _place_layer(old, new, factor)
    return wide


def _place_layer(old: Any, new: Any, factor: float) -> None:
    """Put a trained layer into the first units of a wider one."""
    width = old.input_layernorm.weight.numel()
    for name in ("q_proj", "k_proj", "v_proj"):
        _place_inputs(getattr(new.self_attn, name), getattr(old.self_attn, name).weight)
    for name in ("gate_proj", "up_proj"):
        _place_inputs(getattr(new.mlp, name), getattr(old.mlp, name).weight)
    _place(new.self_attn.o_proj, old.self_attn.o_proj.weight * factor)
    _place(new.mlp.down_proj, old.mlp.down_proj.weight * factor)
    for name in ("q_norm", "k_norm"):
        getattr(new.self_attn, name).weight.copy_(getattr(old.self_attn, name).weight)
    for name in ("input_layernorm", "post_attention_layernorm"):
        getattr(new, name).weight[:width] = getattr(old, name).weight / factor


def _place(module: nn.Module, weight: Tensor) -> None:
    """Write a matrix into the upper left corner of one that is 0 elsewhere."""
    target = module.weight
    assert isinstance(target, Tensor)
    target.zero_()
    target[: weight.shape[0], : weight.shape[1]] = weight


def _place_inputs(module: nn.Module, weight: Tensor) -> None:
    """Write a matrix there, and leave new units and what reads the dimensions of 0 random."""
    target = module.weight
    assert isinstance(target, Tensor)
    target[: weight.shape[0], : weight.shape[1]] = weight


def _check_larger(config: Any, shape: Shape) -> None:
    pairs = {
        "hidden_size": (config.hidden_size, shape.hidden_size),
        "intermediate_size": (config.intermediate_size, shape.intermediate_size),
        "num_layers": (config.num_hidden_layers, shape.num_layers),
        "num_heads": (config.num_attention_heads, shape.num_heads),
        "num_key_value_heads": (config.num_key_value_heads, shape.num_key_value_heads),
    }
    for name, (small, large) in pairs.items():
        if large < small:
            raise ValueError(f"{name} shrinks from {small} to {large}")
    if config.num_attention_heads * shape.num_key_value_heads != (
        config.num_key_value_heads * shape.num_heads
    ):
        raise ValueError("another number of heads would share a key: heads would change partners")
