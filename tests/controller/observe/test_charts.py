"""Charts: what lies where, and what is drawn."""

from __future__ import annotations

import xml.dom.minidom

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.controller.observe.report.charts import (
    MAX_AREA_POINTS,
    MAX_POINTS,
    Chart,
    Point,
    Series,
    StepAxis,
    Style,
)
from paceline.controller.observe.report.vega_lite import svg, vega_lite

BOTH = StepAxis(num_warm=100, num_train=200)


def curve(style: Style = "smooth", num_steps: int = 200, name: str = "a") -> Series:
    points = [Point("warm_start", step, 2.0) for step in range(1, 101)]
    points += [Point("train", step, step / num_steps) for step in range(1, num_steps + 1)]
    return Series(name, points, style)


def elements(chart: Chart, name: str, kind: str = "") -> list[xml.dom.minidom.Element]:
    """Return the elements of a name in the drawing, those within marks of a kind alone."""
    found = xml.dom.minidom.parseString(svg(vega_lite(chart))).getElementsByTagName(name)
    parents = (element.parentNode.getAttribute("class") for element in found)
    return [each for each, parent in zip(found, parents, strict=True) if kind in parent.split()]


def texts(chart: Chart) -> list[str]:
    drawn = xml.dom.minidom.parseString(svg(vega_lite(chart))).getElementsByTagName("text")
    return [each.firstChild.data for each in drawn]


def test_the_warm_start_has_a_segment_of_its_own() -> None:
    assert BOTH.place("warm_start", 100) == BOTH.place("train", 0) == BOTH.border == 0.2
    assert BOTH.place("train", 200) == 1
    assert StepAxis(0, 200).place("train", 100) == 0.5
    assert StepAxis(100, 0).place("warm_start", 50) == 0.5


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 20))
def test_ticks_are_round_steps_in_their_place_and_not_too_many(
    num_warm: int, num_train: int, num_ticks: int
) -> None:
    axis = StepAxis(num_warm, num_train)
    ticks = axis.ticks(num_ticks)
    assert len(ticks) <= num_ticks + 5
    assert all(label.rstrip("0") in ("", *"123456789") or int(label) for label in ticks.values())
    for at, label in ticks.items():
        phase = "warm_start" if at < axis.border or not num_train else "train"
        assert axis.place(phase, int(label)) == at
    if num_warm or num_train:
        assert ticks[0.0] == "0"


@pytest.mark.parametrize(("style", "most"), [("smooth", MAX_POINTS), ("area", MAX_AREA_POINTS)])
def test_a_long_curve_is_drawn_as_means_of_neighbours_that_never_mix_phases(
    style: Style, most: int
) -> None:
    long = curve(style, num_steps=5000)
    thin = long.thinned()
    assert most / 2 < len(thin.points) <= most + 1
    assert {point.value for point in thin.points if point.phase == "warm_start"} == {2.0}
    train = [point.value for point in thin.points if point.phase == "train"]
    assert train == sorted(train)
    assert thin.points[-1].step == 5000
    assert curve("dots", num_steps=5000).thinned() == curve("dots", num_steps=5000)


def test_what_the_pointer_shows_is_where_it_is_drawn() -> None:
    dots = Series("acc_uracy", [Point("train", 100, 0.5, 0.1), Point("train", 200, 0.75)], "dots")
    readout = Chart("t", "c", [dots], BOTH, "percent").readout()
    assert readout["series"] == [["acc_uracy", "var(--c1)"]]
    assert readout["points"] == [[0.6, "step 100", 0, "50% ±10%"], [1, "step 200", 0, "75%"]]


def test_lines_are_drawn_for_each_phase_and_dots_across_both() -> None:
    assert len(elements(Chart("t", "c", [curve()], BOTH), "path", "mark-line")) == 4
    joined = Chart("t", "c", [curve("dots")], BOTH)
    assert len(elements(joined, "path", "mark-line")) == 1
    assert len(elements(joined, "path", "mark-symbol")) == 300


def test_whiskers_are_as_long_as_the_error() -> None:
    series = Series("a", [Point("train", 100, 0.5, 0.25), Point("train", 200, 0.5)], "dots")
    chart = Chart("t", "c", [series], StepAxis(0, 200), "percent", size="half")
    rules = elements(chart, "line", "role-mark")
    lengths = [abs(float(rule.getAttribute("y2") or 0)) for rule in rules]
    assert lengths == pytest.approx([0.5 * 190, 0])


def test_areas_are_piled_up_in_the_order_given() -> None:
    points = [Point("train", 1, 10.0), Point("train", 2, 10.0)]
    series = [Series(name, points, "area") for name in ("z", "a", "m")]
    chart = Chart("t", "c", series, StepAxis(0, 2))
    drawn = elements(chart, "path", "mark-area")
    tops = {each.getAttribute("fill"): float(each.getAttribute("d").split(",")[1].split("L")[0])
            for each in drawn}  # fmt: skip
    assert tops["var(--c1)"] > tops["var(--c2)"] > tops["var(--c3)"]
    assert texts(chart)[-3:] == ["z", "a", "m"]


def test_a_bound_is_drawn_and_named_above_all_values() -> None:
    chart = Chart("t", "c", [curve()], StepAxis(0, 200), bound=8.0)
    assert "bound 8" in texts(chart)
    assert "8" in texts(chart)


def test_one_point_alone_is_a_dot() -> None:
    alone = Series("a", [Point("train", 1, 0.5)])
    assert len(elements(Chart("t", "c", [alone], StepAxis(0, 1)), "path", "mark-symbol")) == 1


@pytest.mark.parametrize(
    "name", ["</svg><script>alert(1)</script>", "\ud800\x00\x1b[2J", "__proto__", "x" * 10**6]
)
def test_names_of_unknown_origin_are_short_text(name: str) -> None:
    for style in ("smooth", "area"):
        chart = Chart("t", "c", [curve(style, name=name), curve(style, name="b")], BOTH)
        drawn = svg(vega_lite(chart))
        assert "<script" not in drawn
        assert len(drawn) < 100_000
        assert xml.dom.minidom.parseString(drawn)
        assert len(chart.readout()["series"][0][0]) <= 80


@pytest.mark.parametrize("values", [(5e-324, 0.0), (1e308, -1e308), (0.0, 0.0), (-7.0, -7.0)])
def test_extreme_values_are_drawn(values: tuple[float, float]) -> None:
    series = Series("a", [Point("train", step, value) for step, value in enumerate(values)])
    assert "mark-line" in svg(vega_lite(Chart("t", "c", [series], StepAxis(0, 1))))
