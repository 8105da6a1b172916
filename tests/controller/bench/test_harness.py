"""The one comparison behind all benchmarks: order, medians, ratios, targets, failures, output."""

from __future__ import annotations

import inspect
import json
import os
import statistics
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.configs.errors import ConfigError
from paceline.controller.bench.harness import registry
from paceline.controller.bench.harness.compare import Case, compare, interleaved
from paceline.controller.bench.harness.resident_memory import (
    forget_peak,
    peak_bytes,
    resident_bytes,
)
from paceline.controller.bench.harness.result import BenchError, Measured, Spread, Target
from paceline.controller.bench.harness.subprocesses import run_logged, side_by_side

MIB = 2**20
POSITIVE = st.floats(0.01, 1e6)


TIMES = Target("times", ">=", 2.0, lambda m: m.ratios("case", "ours", "peer", "speed"))


def fake(measure):
    """``ours`` beside ``peer`` on one case, for three rounds."""
    cases = {"case": Case(["peer", "ours"], 3)}
    return compare("fake", cases, measure, [TIMES], ratios=[("speed", "peer")], seed=7)


@given(
    counts=st.dictionaries(st.sampled_from("abc"), st.integers(1, 5), min_size=1),
    num_variants=st.integers(1, 4),
    num_last=st.integers(0, 2),
)
def test_rounds_interleave_cases_and_variants_and_each_variant_is_first_as_often(
    counts, num_variants, num_last
):
    first = [f"v{i}" for i in range(num_variants)]
    last = [f"last{i}" for i in range(num_last)]
    cases = {name: Case([*last, *first], count, last) for name, count in counts.items()}
    called = []

    def measure(case, variant, number):
        called.append((number, case, variant))
        return {"x": 1.0}

    interleaved(cases, measure)
    assert [number for number, _, _ in called] == sorted(number for number, _, _ in called)
    for case, count in counts.items():
        for number in range(count):
            order = [variant for n, c, variant in called if (n, c) == (number, case)]
            assert sorted(order) == sorted([*first, *last]), "every variant once"
            assert order[num_variants:] == last
            assert order[0] == first[number % num_variants]


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=7))
def test_a_ratio_is_formed_within_its_round_and_judged_by_the_median(pairs):
    speeds = {"ours": [ours for ours, _ in pairs], "peer": [peer for _, peer in pairs]}
    cases = {"case": Case(["peer", "ours"], len(pairs))}
    measured = interleaved(cases, lambda _, variant, number: {"speed": speeds[variant][number]})
    judged = TIMES.judge(measured)
    ratios = [ours / peer for ours, peer in pairs]
    assert judged.measured == Spread(statistics.median(ratios), min(ratios), max(ratios))
    assert judged.met == (statistics.median(ratios) >= 2)
    assert measured.differences("case", "ours", "peer", "speed") == [a - b for a, b in pairs]


def test_a_machine_that_slows_down_slows_both_and_ratios_do_not_see_it():
    slowness = [1.0, 10.0, 3.0]
    speed = {"ours": 30.0, "peer": 10.0}
    result = fake(lambda _, variant, number: {"speed": speed[variant] / slowness[number]})
    assert result.targets["times"].measured == Spread(3.0, 3.0, 3.0)


def test_rounds_without_a_figure_are_left_out_and_what_has_none_misses_its_target():
    rounds = [{"ours": {"x": 4.0}, "peer": {"x": 2.0}}, {"ours": {"x": 9.0}, "peer": {"x": None}}]
    measured = Measured({"case": rounds})
    assert measured.values("case", "ours", "x") == [4.0, 9.0]
    assert measured.ratios("case", "ours", "peer", "x") == [2.0]
    assert measured.ratios("case", "ours", "absent", "x") == []
    judged = Target("x", "<=", 1.0, lambda m: m.values("case", "absent", "x")).judge(measured)
    assert not judged.met


@pytest.mark.parametrize(
    ("value", "comparison", "met"),
    [
        (3.0, ">=", True),
        (2.9, ">=", False),
        (3.0, "<=", True),
        (3.1, "<=", False),
        (3.0, ">", False),
    ],
)
def test_a_target_is_met_by_its_comparison(value, comparison, met):
    target = Target("x", comparison, 3.0, lambda measured: [value])
    assert target.judge(Measured({})).met is met


@pytest.mark.parametrize("error", [BenchError("out of cores"), RuntimeError("out of cores")])
def test_a_failure_names_the_variant_and_its_round(error):
    def measure(case, variant, number):
        if (variant, number) == ("ours", 1):
            raise error
        return {"speed": 1.0}

    with pytest.raises(type(error), match="out of cores") as caught:
        fake(measure)
    told = [str(caught.value), *getattr(caught.value, "__notes__", ())]
    assert any("case, round 2 of 3: ours" in each for each in told)


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run a benchmark of some ratio by name, for its status, standard output and error."""

    def run(ratio: float):
        speeds = {"ours": ratio, "peer": 1.0}
        bench = lambda quick, output: fake(lambda _, variant, number: {"speed": speeds[variant]})  # noqa: E731
        monkeypatch.setattr(registry, "find_bench", lambda name: bench)
        status = registry.run_bench("fake", True, tmp_path / "bench")
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize(("ratio", "met"), [(3.5, True), (1.5, False), (float("nan"), False)])
def test_the_last_line_is_one_json_object_and_a_missed_target_is_said_and_reported(run, ratio, met):
    status, output, _ = run(ratio)
    *lines, last = output.splitlines()
    answer = json.loads(last)
    assert status == (0 if met else 1)
    value = None if ratio != ratio else ratio
    assert answer["bench"] == "fake"
    assert answer["targets"]["times"] == {
        "value": value,
        "range": [value, value],
        "target": 2.0,
        "comparison": ">=",
        "met": met,
    }
    assert answer["figures"]["case"][0] == {"peer": {"speed": 1.0}, "ours": {"speed": value}}
    assert answer["versions"]["seed"] == 7
    (row,) = [line for line in lines if "times" in line and ">= 2" in line]
    assert ("NO" in row) != met


def test_progress_names_every_measurement_also_where_there_is_no_terminal(run):
    _, _, error = run(3.0)
    told = [line.split("] ", 1)[1] for line in error.splitlines()]
    assert told[0] == "1 of 6: case, round 1 of 3: peer"
    assert told[2] == "3 of 6: case, round 2 of 3: ours", "each round begins with another one"
    assert len(told) == 6


def test_an_unknown_benchmark_names_those_there_are(tmp_path):
    with pytest.raises(
        ConfigError, match=r"no benchmark 'e2'; there are: e2e, .*; did you mean e2e\?"
    ):
        registry.run_bench("e2", False, tmp_path)


@pytest.mark.parametrize("name", registry.BENCHES)
def test_every_benchmark_is_found_and_takes_what_the_command_gives(name):
    assert list(inspect.signature(registry.find_bench(name)).parameters) == ["quick", "output"]


def test_a_process_runs_with_as_many_threads_as_asked_for(tmp_path):
    code = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['MKL_NUM_THREADS'])"
    for count in (1, 2):
        run_logged([sys.executable, "-c", code], tmp_path / "log", num_threads=count)
        assert (tmp_path / "log").read_text() == f"{count} {count}\n"


def test_a_failed_process_is_told_by_its_last_line(tmp_path):
    code = "import sys; print('all is well'); print('no memory left'); print(); sys.exit(3)"
    with pytest.raises(BenchError, match=r"status 3: no memory left \(all of it: .*run\.log\)"):
        run_logged([sys.executable, "-c", code], tmp_path / "run.log")


def test_what_runs_side_by_side_runs_in_processes_of_its_own():
    processes = side_by_side([os.getpid] * 2)
    assert len({*processes, os.getpid()}) == 3


def test_what_a_process_held_at_most_is_seen_after_it_is_gone_until_it_is_forgotten():
    forget_peak()
    base = resident_bytes()
    held = b"x" * (200 * MIB)
    del held
    assert peak_bytes() - base > 190 * MIB
    forget_peak()
    assert peak_bytes() - base < 20 * MIB
