"""Tokenizers by name, and the `characters` tokenizer that needs no files.

transformers and tokenizers are imported inside the functions: the command line starts without them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from paceline.configs.errors import DataError, ModelError
from paceline.configs.schema.model import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CHARACTERS = "characters"
_PAD, _EOS = "<pad>", "<eos>"


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer that ``model`` names: `characters`, or one of a local folder or the hub.

    Raises:
        ModelError: it is missing or unreadable, or has no end-of-sequence token.
    """
    if model.tokenizer == CHARACTERS:
        return characters_tokenizer()
    source = model.tokenizer or model.path
    assert source is not None, "the schema asks for a tokenizer beside an architecture"
    tokenizer = _load_pretrained(source)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"tokenizer {source} has no end-of-sequence token: completions could never end; "
            f"set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def characters_tokenizer() -> PreTrainedTokenizerFast:
    """Return one token for each printable ASCII character, tab and newline; 128 ids in all.

    The id of a character is its ASCII code. Id 0 is ``<pad>`` and id 1 ``<eos>``; the other control
    codes are reserved: no text encodes to them, and they decode to visible names, so that a
    completion that contains one is not taken for the text around it.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {_token_of(code): code for code in range(128)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_EOS,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerBase, text: str, special_tokens: bool) -> tuple[int, ...]:
    """Return token ids of ``text``, with ``special_tokens`` those the tokenizer begins texts with.

    Raises:
        DataError: the text holds characters that the tokenizer has no token for.
    """
    try:
        return tuple(tokenizer.encode(text, add_special_tokens=special_tokens))
    except Exception as error:
        # The tokenizers library raises bare Exceptions, which do not name the character.
        unknown = sorted({character for character in text if not _encodable(tokenizer, character)})
        raise DataError(
            f"the tokenizer has no token for {', '.join(map(repr, unknown)) or 'a part'} of "
            f"{text[:60]!r}; choose another model.tokenizer or another prompt_template"
        ) from error


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, model_folder: str) -> tuple[int, ...]:
    """Return the ids that end a completion: the tokenizer's end of sequence and the model's own.

    The model has some in ``generation_config.json``: chat models end a turn and a text differently.
    """
    from transformers import GenerationConfig

    try:
        own = GenerationConfig.from_pretrained(model_folder).eos_token_id
    except OSError:
        own = None
    listed = own if isinstance(own, list) else [own]
    return tuple(sorted({int(i) for i in (tokenizer.eos_token_id, *listed) if i is not None}))


def decode_completion(
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Collection[int],
    token_ids: Sequence[int] | NDArray[np.int32],
) -> str:
    """Return the text of a completion without the stop token that ends it.

    Special tokens before the end stay visible: a grader must not see a right answer where the model
    wrote one with padding inside.
    """
    ids = [int(token) for token in token_ids]
    if ids and ids[-1] in stop_ids:
        ids.pop()
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _token_of(code: int) -> str:
    character = chr(code)
    if character.isprintable() or character in "\t\n":
        return character
    return {0: _PAD, 1: _EOS}.get(code, f"<reserved_{code}>")


def _encodable(tokenizer: PreTrainedTokenizerBase, character: str) -> bool:
    try:
        tokenizer.encode(character, add_special_tokens=False)
    except Exception:
        return False
    return True


def _load_pretrained(source: str) -> Any:
    from transformers import AutoTokenizer

    folder = Path(source).expanduser()
    if source.startswith(("/", "./", "../", "~")) and not folder.is_dir():
        raise ModelError(
            f"tokenizer {source}: no such folder; correct the path in the model section"
        )
    try:
        return AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else source)
    except Exception as error:
        # transformers raises OSError, ValueError, KeyError or tokenizers' own for broken files.
        reason = " ".join(str(error).split())[:200]
        what = "the folder holds none" if folder.is_dir() else "no such folder, nor on the hub"
        raise ModelError(
            f"tokenizer {source}: {what} ({type(error).__name__}: {reason}); "
            f"set model.tokenizer to a folder with tokenizer.json, or to {CHARACTERS}"
        ) from error
