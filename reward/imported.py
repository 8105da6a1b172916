"""Graders of users."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.configs.imports import build_imported
from paceline.reward.grader import Grader


def build_imported_grader(import_path: str, parameters: Mapping[str, Any]) -> Grader:
    """Build the grader that `reward.import_path` names, with ``parameters`` as keyword arguments.

    Raises:
        ConfigError: it cannot be imported or built, or has no method `grade`.
    """
    grader: Grader = build_imported("reward.import_path", import_path, parameters, "grade")
    return grader
