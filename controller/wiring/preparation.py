"""Whatever a run needs to know, and can get wrong, before any process starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from paceline.configs.schema import RunConfig
from paceline.configs.schema.algorithm import critic_of
from paceline.configs.schema.data import DatasetSource, ReasoningGymSource
from paceline.configs.vocabulary import DraftText
from paceline.controller.data.feed import PromptSet
from paceline.controller.data.rendering import PromptRenderer
from paceline.controller.data.sources import (
    DatasetPromptSource,
    PromptSource,
    load_imported_source,
)
from paceline.controller.data.tokenizer import load_tokenizer, stop_token_ids
from paceline.controller.wiring.drafting import external_draft_texts
from paceline.learner.checkpoints import checkpoint
from paceline.learner.model.model import (
    empty_policy,
    require_same_vocabulary,
    write_initial_model,
)
from paceline.reward.reasoning_gym_task import ReasoningGymTaskSource


@dataclass(frozen=True)
class RunInputs:
    """The inputs of a run, which can be known, and be wrong, before any process is started."""

    tokenizer: PreTrainedTokenizerBase
    model_folder: str
    stop_token_ids: tuple[int, ...]
    prompts: PromptSet
    draft_texts: tuple[DraftText, ...] = ()


def prepare(config: RunConfig, initial_folder: Path) -> RunInputs:
    """Load tokenizer, model configuration and prompts.

    ``initial_folder`` receives the initial model where the configuration gives an architecture.

    Raises:
        UserError: one of them is missing, unreadable or does not fit the others.
    """
    tokenizer = load_tokenizer(config.model)
    eos = int(tokenizer.eos_token_id)
    prompts = prompt_set(config, tokenizer)
    model_folder = write_initial_model(
        config.model, len(tokenizer), eos, config.seed, str(initial_folder)
    )
    if config.teacher is not None:
        require_same_vocabulary(config.teacher.path, model_folder)
    stop_ids = stop_token_ids(tokenizer, model_folder)
    texts = external_draft_texts(config, tokenizer)
    return RunInputs(tokenizer, model_folder, stop_ids, prompts, texts)


def prompt_set(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """Draw held-out and validation prompts; those for training come after them."""
    source = config.data.source
    held_out_split = source.held_out_split if isinstance(source, DatasetSource) else None
    max_tokens = config.rollout.sampling.max_tokens
    return PromptSet(
        prompt_source(config),
        PromptRenderer(source, tokenizer, config.model.max_length, max_tokens),
        config.data.num_held_out,
        config.warm_start.num_validation if config.warm_start else 0,
        prompt_source(config, held_out_split) if held_out_split else None,
        config.data.curriculum,
        config.data.seed,
    )


def prompt_source(config: RunConfig, split: str | None = None) -> PromptSource:
    """Return the configured source; ``split`` names another split of a dataset."""
    source = config.data.source
    if isinstance(source, ReasoningGymSource):
        return ReasoningGymTaskSource(source.task, source.parameters, config.data.seed)
    if isinstance(source, DatasetSource):
        return DatasetPromptSource(source, split or source.split, config.data.seed)
    return load_imported_source(source.import_path, source.parameters)


def require_loadable(config: RunConfig, learner_folder: Path, initial_folder: Path) -> None:
    """Refuse a checkpoint that the learner would refuse, before anything is started or written.

    ``learner_folder`` is the learner's part of it. Where the run's initial model was removed, only
    that it is whole is looked at: the model will be written anew.

    Raises:
        UserError: it is incomplete or of another model, or the model cannot be read.
    """
    critic = critic_of(config.algorithm)
    is_shared = critic is not None and critic.backbone == "shared"
    roles = {"policy": is_shared} | ({"critic": True} if critic and not is_shared else {})
    if config.model.path is None and not initial_folder.exists():
        roles = {}
    folder = config.model.path or str(initial_folder)
    state = {
        role: {"model": dict(empty_policy(folder, has_values=has_values).trained_parameters())}
        for role, has_values in roles.items()
    }
    checkpoint.require_loadable(str(learner_folder), state)
