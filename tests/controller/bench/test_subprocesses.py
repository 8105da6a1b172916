from __future__ import annotations

import sys
from pathlib import Path

import pytest

from paceline.controller.bench.harness.result import BenchError
from paceline.controller.bench.harness.subprocesses import run_logged


def test_a_process_runs_with_as_many_threads_as_asked_for(tmp_path: Path) -> None:
    code = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['MKL_NUM_THREADS'])"

    run_logged([sys.executable, "-c", code], tmp_path / "one.log")
    run_logged([sys.executable, "-c", code], tmp_path / "two.log", num_threads=2)

    assert (tmp_path / "one.log").read_text() == "1 1\n"
    assert (tmp_path / "two.log").read_text() == "2 2\n"


def test_a_failed_process_is_told_by_its_last_line(tmp_path: Path) -> None:
    code = "import sys; print('all is well'); print('no memory left'); print(); sys.exit(3)"

    with pytest.raises(BenchError, match=r"status 3: no memory left \(all of it: .*run\.log\)"):
        run_logged([sys.executable, "-c", code], tmp_path / "run.log")
