"""Large libraries are imported without looking through them for garbage."""

from __future__ import annotations

import gc
import importlib
import subprocess
import sys

import pytest

from paceline.configs.imports import imports_uncollected


def test_the_collector_pauses_for_imports_and_goes_on_though_one_fails():
    with imports_uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ModuleNotFoundError), imports_uncollected():
        importlib.import_module("no_such_module")
    assert gc.isenabled()
    gc.unfreeze()


def test_what_was_imported_is_left_out_of_collections_until_the_process_ends():
    program = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count()))  # runs last
from paceline.configs.imports import imports_uncollected
with imports_uncollected():
    import json
print(gc.get_freeze_count())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    frozen, at_the_end = map(int, done.stdout.split())
    assert frozen > 1000
    assert at_the_end == 0
