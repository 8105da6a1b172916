"""Runs beside each other."""

from __future__ import annotations

import xml.dom.minidom
from pathlib import Path

import pytest

from paceline.configs.errors import ConfigError
from paceline.controller.observe.files.folder import RunFolder
from paceline.controller.observe.report.comparison import compare_runs, drawing, held_out_curve
from tests.controller.observe.conftest import write_synthetic_run


def test_a_curve_has_the_held_out_evaluations_of_its_run(tmp_path: Path) -> None:
    write_synthetic_run(tmp_path / "one", train_steps=80)
    curve = held_out_curve(tmp_path / "one")
    assert sorted(curve) == [0, 40, 80]
    assert all(0 <= accuracy <= 1 for accuracy in curve.values())


def test_a_comparison_prints_every_run_and_draws_it(tmp_path: Path, capsys) -> None:
    for seed, name in enumerate(("one", "two<three")):
        write_synthetic_run(tmp_path / name, seed=seed, train_steps=80)
    output = tmp_path / "curves.svg"
    compare_runs([tmp_path / "one", tmp_path / "two<three"], output)
    printed = capsys.readouterr().out
    assert "one" in printed and "two<three" in printed
    document = xml.dom.minidom.parse(str(output))
    lines = [each for each in document.getElementsByTagName("g") if "mark-line" in
             each.getAttribute("class")]  # fmt: skip
    assert len(lines) == 2
    texts = [node.firstChild.data for node in document.getElementsByTagName("text")]
    assert {"one", "two<three", "held-out accuracy, greedy"} <= set(texts)
    assert "prefers-color-scheme: dark" in document.getElementsByTagName("style")[0].firstChild.data


def test_what_cannot_be_compared_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "empty").write_config("name: empty\n")
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="never evaluated on held-out prompts"):
        compare_runs([tmp_path / "empty"], tmp_path / "curves.svg")
    with pytest.raises(ConfigError, match="8 runs cannot be told apart, give at most 7"):
        compare_runs([tmp_path / str(i) for i in range(8)], tmp_path / "curves.svg")
    assert not (tmp_path / "curves.svg").exists()


def test_points_lie_where_their_accuracy_is() -> None:
    document = xml.dom.minidom.parseString(drawing("t", {"a": {0: 0.0, 10: 1.0}}))
    paths = document.getElementsByTagName("path")
    (line,) = [each for each in paths if "mark-line" in each.parentNode.getAttribute("class")]
    (x0, y0), (x1, y1) = (p.split(",") for p in line.getAttribute("d").strip("M").split("L"))
    assert float(x0) < float(x1)
    assert float(y0) > float(y1), "higher is better, and further up"
