"""Imports of large libraries, and of users' classes, named as `package.module:ClassName`."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from paceline.configs.errors import ConfigError


def build_imported(
    key: str, import_path: str, parameters: Mapping[str, Any], required_method: str
) -> Any:
    """Import the class that ``key`` of the configuration names, and call it with ``parameters``.

    Modules are looked up on Python's path and, after it, in the working directory.

    Raises:
        ConfigError: the path is malformed, cannot be imported, cannot be called so, or what it
            builds lacks ``required_method``.
    """
    module_name, separator, attribute = import_path.partition(":")
    if not (module_name and separator and attribute):
        raise ConfigError(f"{key}: expected package.module:ClassName, got {import_path!r}")
    builder = _find(key, module_name, attribute)
    try:
        built = builder(**parameters)
    except Exception as error:
        raise ConfigError(
            f"{key}: {import_path}(**{dict(parameters)!r}) raised {type(error).__name__}: "
            f"{_one_line(error)}"
        ) from error
    if not callable(getattr(built, required_method, None)):
        raise ConfigError(f"{key}: {import_path} must offer a method {required_method}, has none")
    return built


@contextmanager
def imports_uncollected() -> Iterator[None]:
    """Import large libraries while the garbage collector pauses, and never look at them again.

    Modules live as long as the process. Looking through them for garbage while they grow takes a
    sixth of the time to import torch and vLLM, and a fifth of a second in each later collection.
    The collection at the process's end sees them: compiled modules complain of what is left.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)
        if was_enabled:
            gc.enable()


def _find(key: str, module_name: str, attribute: str) -> Any:
    try:
        with _working_directory_importable():
            module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"{key}: cannot import {module_name} ({type(error).__name__}: {_one_line(error)}); "
            f"install it or run from the folder that holds it"
        ) from error
    if not hasattr(module, attribute):
        raise ConfigError(f"{key}: module {module_name} has no {attribute}")
    return getattr(module, attribute)


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    """Search the working directory for modules, which console scripts do not.

    It is the last place to be searched, and only meanwhile: for good it would make folders such as
    ``kernels/`` of a checkout importable as top-level packages, which transformers probes for.
    """
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        yield
    finally:
        # The last one is ours; an equal entry may stand before it.
        for position in reversed(range(len(sys.path))):
            if sys.path[position] == folder:
                del sys.path[position]
                break


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
