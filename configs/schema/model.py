"""The model that is trained, and its tokenizer."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from paceline.configs.schema.base import Section

Precision = Literal["float32", "bfloat16"]


class ModelConfig(Section):
    """Exactly one of ``path`` (weights to start from) and ``architecture`` (random weights)."""

    path: str | None = None
    """Local folder in Hugging Face format, or a hub name."""

    architecture: dict[str, Any] | None = None
    """Keyword arguments of a transformers configuration, `model_type` among them; the weights start
    random and `vocab_size` comes from the tokenizer."""

    tokenizer: str | None = None
    """`characters` (one token an ASCII character), or a local folder or hub name; the model's own
    when absent."""

    max_length: int = Field(default=512, ge=2)
    """Context length in tokens, prompt and completion together."""

    precision: Precision = "float32"
    """Number format of forward and backward passes and of the engines; master weights, reductions
    and the optimiser stay float32."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.architecture is None):
            raise ValueError("give exactly one of model.path and model.architecture")
        if self.architecture is not None and "model_type" not in self.architecture:
            raise ValueError("model.architecture needs model_type, for example qwen3")
        if self.architecture is not None and self.tokenizer is None:
            raise ValueError("model.architecture needs model.tokenizer, for example characters")
        return self
