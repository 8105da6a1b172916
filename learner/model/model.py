"""The policy: a Hugging Face causal language model run on packed rows, and its initial weights.

Initial weights come from one folder in Hugging Face format: the engines serve it and the learner
trains it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from paceline.configs.errors import BatchError, ModelError
from paceline.configs.schema.learner import Checkpointing
from paceline.configs.schema.model import ModelConfig
from paceline.learner.engines.parallel.sequence import SequenceRanks
from paceline.learner.model.attention import (
    ATTENTION_NAME,
    PackedSegments,
    Segment,
    register_packed_attention,
)
from paceline.learner.model.chunked_layers import chunk_layers
from paceline.learner.model.experts import (
    ExpertCounts,
    Routing,
    attach_routers,
    has_experts,
    parameters_per_token,
)

Head = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
"""Function of hidden states [N, H], output embedding [V, H] and targets int64 [N]; its tensors
[N] have a number for each target."""

UNDECLARED = {"qwen3_moe": {"head_dim"}}
"""Keys that a model reads although its configuration class does not declare them."""

PACKING_TOLERANCE = 1e-3
"""Largest relative error of logits that passes for float32 rounding over many layers."""


@dataclass(frozen=True)
class PackedRow:
    """A microbatch for the model: T tokens of S segments, N of which predict a trained token.

    ``token_ids`` and ``positions`` are int64 [1, T]. ``predictors`` int64 [N] are the places in the
    row whose hidden states predict a trained token, ``targets`` int64 [N] those tokens.
    ``routed_experts`` int64 [T, layers, K] are those that routers must choose; where they are
    ``NOT_ROUTED`` the router's own choice stands.
    """

    token_ids: Tensor
    positions: Tensor
    segments: PackedSegments
    predictors: Tensor
    targets: Tensor
    routed_experts: Tensor | None = None


class PolicyModel(nn.Module):
    """A causal language model whose vocabulary logits exist only inside the ``head`` it is handed.

    The head runs within ``forward`` because the output embedding, sharded over ranks, is whole
    only there. ``has_values`` adds a scalar value head, for a critic. A mixture of experts has its
    ``expert_counts`` over the predictors of rows that were run with gradients.
    """

    def __init__(self, causal_lm: PreTrainedModel, *, has_values: bool = False) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self._sequence_ranks: SequenceRanks | None = None
        self.expert_counts = ExpertCounts()
        self._has_experts = has_experts(causal_lm.config)
        if self._has_experts:
            attach_routers(self.decoder_layers)
        self.value_head: nn.Linear | None = None
        if has_values:
            self.value_head = nn.Linear(causal_lm.config.hidden_size, 1)
            # the value of every state begins at zero
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def divide_tokens(self, ranks: SequenceRanks | None) -> None:
        """Give each of these ranks a share of a row's tokens, and all outputs; None: all to each.

        Called before the first row.
        """
        self._sequence_ranks = ranks

    def forward(self, row: PackedRow, head: Head) -> tuple[Tensor, ...]:
        """Apply ``head`` to the hidden states at ``row.predictors``.

        With a value head, values float32 [N] come last.
        """
        return self.outputs(self.hidden_states(row), row, head)

    def hidden_states(self, row: PackedRow, before: Tensor | None = None) -> Tensor:
        """Return the last hidden states [1, T, H], from those ``before`` or the embedding."""
        token_ids, positions = row.token_ids, row.positions
        if self._sequence_ranks is not None:
            token_ids, positions = map(self._sequence_ranks.share, (token_ids, positions))
        source = {"input_ids": token_ids} if before is None else {"inputs_embeds": before}
        routing = self._routing(row) if self._has_experts else {}
        output = self.causal_lm.base_model(
            **source,
            position_ids=positions,
            packed_segments=row.segments,
            sequence_ranks=self._sequence_ranks,
            use_cache=False,
            **routing,
        )
        if routing and torch.is_grad_enabled():
            self.expert_counts.add(routing["routing"].counts)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _routing(self, row: PackedRow) -> dict[str, Routing]:
        """Return the further arguments of a mixture of experts.

        Raises:
            BatchError: samples come with experts of a model of another shape.
        """
        config, given = self.causal_lm.config, row.routed_experts
        expected = (config.num_hidden_layers, config.num_experts_per_tok)
        if given is not None and given.shape[1:] != expected:
            raise BatchError(
                f"samples come with experts of {given.shape[1]} layers, {given.shape[2]} a token, "
                f"and the model has {expected[0]} and {expected[1]}: the engine served another one"
            )
        return {"routing": Routing(row.predictors, given)}

    def outputs(self, hidden: Tensor, row: PackedRow, head: Head) -> tuple[Tensor, ...]:
        """Return what ``forward`` does, from the last hidden states [1, T, H]."""
        ranks = self._sequence_ranks
        if ranks is None:
            return self._outputs(hidden[0].index_select(0, row.predictors), row.targets, head)
        which, places = ranks.own_places(row.predictors, hidden.shape[1])
        own = self._outputs(hidden[0].index_select(0, places), row.targets[which], head)
        return tuple(ranks.bring_together(output, which, len(row.targets)) for output in own)

    def _outputs(self, hidden: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, ...]:
        """Apply head and value head to hidden states [N, H] and their targets [N]."""
        outputs = head(hidden, self.causal_lm.get_output_embeddings().weight, targets)
        if self.value_head is None:
            return outputs
        return (*outputs, self.value_head(hidden)[:, 0].float())

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield every parameter by its Hugging Face name; the value head's as ``value_head.*``."""
        yield from self.causal_lm.named_parameters()
        if self.value_head is not None:
            yield from self.value_head.named_parameters(prefix="value_head")

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The transformer blocks, in order."""
        layers = self.causal_lm.base_model.layers
        assert isinstance(layers, nn.ModuleList)
        return layers

    def quadratic_cost(self) -> float:
        """Return c in the cost ``length + c * length ** 2`` of a sequence, in units of one token's.

        Causal attention takes ``2 * query_width`` operations a layer and a pair of tokens (half of
        all pairs), everything else 2 a token and a parameter that it is multiplied with.
        """
        config = self.causal_lm.config
        head_dim = getattr(config, "head_dim", None)
        width = config.num_attention_heads * (
            head_dim or config.hidden_size // config.num_attention_heads
        )
        return config.num_hidden_layers * width / parameters_per_token(self.causal_lm)


def write_initial_model(
    config: ModelConfig, vocab_size: int, eos_token_id: int, seed: int, folder: str
) -> str:
    """Return the folder (or hub name) that engines and learner both start from.

    With ``config.architecture`` a randomly initialised float32 model is written to ``folder``. With
    ``config.path`` nothing is written: the path itself is returned, after a check that it is
    readable and fits the tokenizer and ``config.max_length``.

    Raises:
        ModelError: the model cannot be read or built, or does not fit.
    """
    transformers_logging.disable_progress_bar()
    if config.architecture is None:
        assert config.path is not None
        _check_fits(_read_config(config.path), config, vocab_size)
        return config.path
    _check_architecture_keys(config.architecture)
    # no padding token: an architecture's default one may lie outside the vocabulary
    ids = {"vocab_size": vocab_size, "eos_token_id": eos_token_id}
    no_ids = {"bos_token_id": None, "pad_token_id": None}
    settings = {"max_position_embeddings": config.max_length} | config.architecture | ids | no_ids
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model_config = AutoConfig.for_model(**settings)
            causal_lm = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
        except (
            StrictDataclassError,
            ValueError,
            TypeError,
            ArithmeticError,
            RuntimeError,
        ) as error:
            raise ModelError(
                f"model.architecture cannot be built: {_first_line(error)}; check its numbers"
            ) from error
    _check_fits(model_config, config, vocab_size)
    # Saving lets accelerate import deepspeed, which warns on every machine without a GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    causal_lm.save_pretrained(folder)
    return folder


def empty_policy(folder: str, *, has_values: bool) -> PolicyModel:
    """Return a folder's model without its weights: names and shapes, on torch's meta device.

    Raises:
        ModelError: there is no such model.
    """
    config = _read_config(folder)
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(config)
        return PolicyModel(causal_lm, has_values=has_values)


def require_same_vocabulary(teacher: str, model_folder: str) -> None:
    """Refuse a teacher whose tokens are not the policy's.

    Raises:
        ModelError: it cannot be read, or embeds another number of tokens.
    """
    found, expected = (_read_config(path).vocab_size for path in (teacher, model_folder))
    if found != expected:
        raise ModelError(
            f"the teacher {teacher} embeds {found} tokens, the policy {expected}: a teacher must "
            "have the policy's tokenizer; choose another one"
        )


def no_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Return no outputs: the head of a critic, which needs no logits."""
    return ()


def load_policy(
    folder: str,
    *,
    checkpointing: Checkpointing = "none",
    tokens_per_chunk: int = 1024,
    has_values: bool = False,
) -> PolicyModel:
    """Load a folder in Hugging Face format as float32 master weights on the CPU.

    ``tokens_per_chunk`` is for ``checkpointing`` of chunks.

    Raises:
        ModelError: it cannot be read, or computes something else in packed rows than alone.
    """
    transformers_logging.disable_progress_bar()
    register_packed_attention()
    _read_config(folder)
    try:
        causal_lm, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation=ATTENTION_NAME,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"the weights in {folder} cannot be loaded: {_first_line(error)}"
        ) from error
    if missing := sorted(found["missing_keys"]):  # transformers would begin with random ones
        raise ModelError(
            f"{folder} lacks {len(missing)} weights of a {causal_lm.config.model_type}, such as "
            f"{missing[0]}: its files are of another model, or not all there"
        )
    # Never in training mode: dropout would train on other log-probabilities than were sampled.
    policy = PolicyModel(causal_lm, has_values=has_values).eval()
    _check_packing(policy)
    if checkpointing == "chunks":
        chunk_layers(causal_lm, tokens_per_chunk)
    if checkpointing == "layers":
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in policy.decoder_layers:
            layer.training = True  # the layer itself, not its dropout: else it is not recomputed
    return policy


@torch.no_grad()
def _check_packing(policy: PolicyModel) -> None:
    """Check that two short sequences and a continuation in one row give the model's own logits.

    Some architectures mix tokens of different sequences outside attention (convolutions,
    recurrences) or do more to logits than one matrix product. Three small passes reveal both.
    """
    tokens = torch.arange(7)[None] % policy.causal_lm.config.vocab_size
    segments = [Segment(0, 3), Segment(3, 2), Segment(5, 2, prefix_start=0, prefix=3)]
    packed = PackedSegments.from_segments(segments, tokens.device)
    row = PackedRow(tokens, packed.positions()[None], packed, torch.arange(7), tokens[0])
    found = policy(row, lambda hidden, weight, targets: (hidden @ weight.T,))[0]
    causal_lm = policy.causal_lm
    causal_lm.set_attn_implementation("eager")
    first = causal_lm(tokens[:, [0, 1, 2, 5, 6]], use_cache=False).logits[0]
    second = causal_lm(tokens[:, [3, 4]], use_cache=False).logits[0]
    causal_lm.set_attn_implementation(ATTENTION_NAME)
    expected = torch.cat([first[:3], second, first[3:]])
    error = (found - expected).abs().max() / expected.abs().max()
    if not error < PACKING_TOLERANCE:
        raise ModelError(
            f"{causal_lm.config.model_type} computes other logits in packed rows than alone "
            f"(relative error {error:.1e}): its layers mix neighbouring sequences or it transforms "
            "its logits; use a plain attention model, for example of the Qwen or Llama families"
        )


def _read_config(path: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        found = "has no readable config.json" if Path(path).is_dir() else "is no folder here"
        raise ModelError(
            f"model {path} {found} and cannot be fetched by that name: "
            "give a folder in Hugging Face format"
        ) from error


def _check_fits(model_config: PreTrainedConfig, config: ModelConfig, vocab_size: int) -> None:
    if vocab_size > model_config.vocab_size:
        raise ModelError(
            f"the tokenizer has {vocab_size} tokens but the model embeds {model_config.vocab_size}:"
            " use the model's own tokenizer"
        )
    longest = getattr(model_config, "max_position_embeddings", None)
    if longest is not None and config.max_length > longest:
        raise ModelError(
            f"model.max_length ({config.max_length}) exceeds the {longest} positions of the model: "
            "lower it"
        )


def _check_architecture_keys(architecture: Mapping[str, Any]) -> None:
    """Refuse unknown keys, which transformers silently keeps: a misspelt size must show."""
    model_type = architecture["model_type"]
    try:
        known = AutoConfig.for_model(model_type)
    except (ValueError, KeyError) as error:
        raise ModelError(
            f"model.architecture.model_type {model_type!r} is not a transformers architecture: "
            "use for example qwen3 or llama"
        ) from error
    undeclared = UNDECLARED.get(model_type, ())
    if unknown := sorted(k for k in architecture if not hasattr(known, k) and k not in undeclared):
        raise ModelError(
            f"model.architecture has keys that {model_type} does not know: {', '.join(unknown)}"
        )


def _first_line(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, StrictDataclassError) else error
    return str(cause).strip().split("\n")[0] or type(error).__name__
