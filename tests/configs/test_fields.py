from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from paceline.configs.fields import reference_markdown, walk


def test_every_key_is_documented() -> None:
    undocumented = [
        ".".join(field.path)
        for field in walk()
        if not field.info.description and field.path[-1] != "type"
    ]
    assert undocumented == []


def test_the_reference_has_a_row_for_every_key_and_a_heading_for_every_variant() -> None:
    text = reference_markdown()
    rows = [line.split("|")[1].strip(" `") for line in text.splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(field.path[-1] for field in walk())
    for heading in (
        "## Top level",
        "## `learner.optimizer`",
        "## `data.source` with `type` `dataset`",
        "## `reward` with `type` `math`",
        "## `warm_start`",
    ):
        assert text.count(f"{heading}\n") == 1
    assert "| `every_steps` | integer or null | `25` | Save this often;" in text
    assert "| `betas` | list of 2 number | `[0.9, 0.95]` |" in text


def test_the_reference_in_docs_is_the_schemas() -> None:
    written = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert written.read_text() == reference_markdown(), (
        "write it anew: python -m paceline.configs.fields > docs/configuration.md"
    )


def test_checking_a_configuration_imports_no_framework() -> None:
    script = (
        "import sys\n"
        "from paceline.configs.forecast.estimate import estimate\n"
        "from paceline.configs.load import load_config\n"
        "estimate(load_config('quickstart'))\n"
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'reasoning_gym'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
