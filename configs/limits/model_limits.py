"""Checks before a run that its models are there, whole, and can do what is asked of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from paceline.configs.errors import ConfigError, ModelError
from paceline.configs.forecast.model_shape import CHARACTERS_VOCABULARY, model_keys, model_shape
from paceline.configs.limits.parallel_limits import EXPERT_FAMILIES, require_divisible
from paceline.configs.schema.algorithm import reference_of
from paceline.configs.schema.run import RunConfig

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
LENGTH_BYTES = 8
"""Before a safetensors file's header: how long it is, an unsigned little-endian number."""


def require_usable_models(config: RunConfig) -> None:
    """Refuse what is known to fail once processes are started; of a hub name, nothing is known.

    Raises:
        ConfigError: the learner cannot divide the model, or there are no routers to replay.
        ModelError: a folder is not there or not whole, or its weights are another model's.
    """
    model, keys = config.model, model_keys(config.model)
    for key, path in _paths(config):
        _require_whole(key, path)
    if model.path is not None and "model_type" in keys:
        _require_own_weights(config, keys)
    require_divisible(config)
    model_type = keys.get("model_type")
    if config.rollout.router_replay and model_type not in (None, *EXPERT_FAMILIES):
        raise ConfigError(
            f"rollout.router_replay replays the routers of {', '.join(EXPERT_FAMILIES)}, and "
            f"{model_type} has none that are known: set it to false"
        )


def _paths(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield every folder or hub name of weights, with the key that gives it."""
    reference = reference_of(config.algorithm)
    given = {
        "model.path": config.model.path,
        "teacher.path": None if config.teacher is None else config.teacher.path,
        "the reference's path": None if reference is None else reference.path,
    }
    yield from ((key, path) for key, path in given.items() if path is not None)


def _require_whole(key: str, path: str) -> None:
    """Refuse a folder in which something is missing; what may be a hub name is left alone."""
    folder = Path(path)
    if not folder.exists() and not path.startswith(("/", ".", "~")):
        return
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{key} {path} is no folder with a config.json: give a folder in Hugging Face format"
        )
    files = _weight_files(folder)
    if not files and not any(folder.glob("*.bin")):
        raise ModelError(
            f"{key} {path} has no weights: expected {SINGLE}, or the files that {INDEX} names; "
            "copy them there"
        )
    for file in files:
        expected = sum(_extent(file)) if file.is_file() else None
        if expected is None or file.stat().st_size < expected:
            found = "is missing" if expected is None else f"has {file.stat().st_size} bytes"
            wanted = "" if expected is None else f", expected {expected}"
            raise ModelError(
                f"{key} {path} is incomplete: {file.name} {found}{wanted}; copy the folder again"
            )


def _weight_files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    except OSError:
        return []
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{folder / INDEX} cannot be read as an index of weights; copy the folder again"
        ) from error


def _extent(file: Path) -> tuple[int, int]:
    """Return the bytes before the tensors of a safetensors file, and those of all its tensors."""
    tensors = _header(file)
    with file.open("rb") as opened:
        before = LENGTH_BYTES + int.from_bytes(opened.read(LENGTH_BYTES), "little")
    return before, max((int(each["data_offsets"][1]) for each in tensors.values()), default=0)


def _header(file: Path) -> dict[str, Any]:
    """Return a safetensors file's description of its tensors, by name."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(LENGTH_BYTES), "little")
            header = json.loads(opened.read(min(length, file.stat().st_size)))
        header.pop("__metadata__", None)
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{file} is no whole safetensors file: copy it again, or the folder it is in"
        ) from error
    return dict(header)


def _require_own_weights(config: RunConfig, keys: Mapping[str, Any]) -> None:
    """Refuse weights of another size than ``config.json`` says: of another architecture, say.

    Quantised weights are packed, and are left to who loads them.
    """
    model, shape = config.model, model_shape(config.model)
    if shape is None:
        return
    if model.tokenizer == "characters" and shape.vocabulary < CHARACTERS_VOCABULARY:
        raise ModelError(
            f"the tokenizer has {CHARACTERS_VOCABULARY} tokens but {model.path} embeds "
            f"{shape.vocabulary}: use the model's own tokenizer"
        )
    tied = {"lm_head.weight"} if shape.tied_embeddings else set()
    sizes = {
        name: prod(tensor["shape"])
        for file in _weight_files(Path(str(model.path)))
        for name, tensor in _header(file).items()
        if name not in tied and not name.endswith("rotary_emb.inv_freq")
    }
    found, expected = sum(sizes.values()), shape.num_parameters
    if sizes and found != expected and "quantization_config" not in keys:
        raise ModelError(
            f"model.path {model.path} holds {found:,} parameters, its config.json describes a "
            f"{keys['model_type']} of {expected:,}: the weights are of another architecture, depth "
            "or vocabulary; give a folder whose files belong together"
        )
