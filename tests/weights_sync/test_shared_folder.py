"""The folder of published weights: there while its run lives, gone afterwards, however it ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from paceline.weights_sync.shared_folder import SETTLING_SECONDS, shared_folder

HOLDER = """
import sys, time
from pathlib import Path
from paceline.weights_sync.shared_folder import shared_folder
with shared_folder(Path(sys.argv[1])) as folder:
    (Path(folder) / "weights-0.bin").write_bytes(b"0" * 100)
    print(folder, flush=True)
    time.sleep(600)
"""


def start_holder(root: Path) -> tuple[subprocess.Popen, Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(root)], stdout=subprocess.PIPE, text=True
    )
    return process, Path(process.stdout.readline().strip())


def age(folder: Path) -> None:
    then = time.time() - 2 * SETTLING_SECONDS
    os.utime(folder, (then, then))


def test_the_folder_goes_with_its_run(tmp_path):
    with shared_folder(tmp_path) as folder:
        (Path(folder) / "weights-0.bin").write_bytes(b"0")
        assert Path(folder).parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_the_folder_goes_when_its_run_fails(tmp_path):
    try:
        with shared_folder(tmp_path):
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed_by_the_next_one(tmp_path):
    process, left = start_holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert left.is_dir()
    age(left)
    with shared_folder(tmp_path):
        assert not left.exists()


def test_a_living_runs_folder_is_never_touched(tmp_path):
    process, living = start_holder(tmp_path)
    try:
        age(living)
        with shared_folder(tmp_path):
            assert (living / "weights-0.bin").exists()
    finally:
        process.kill()
        process.wait()


def test_a_folder_that_may_be_about_to_be_locked_is_left_alone(tmp_path):
    young = tmp_path / "paceline-1-young"
    young.mkdir()
    with shared_folder(tmp_path):
        assert young.exists()


def test_what_is_no_runs_folder_is_left_alone(tmp_path):
    file, foreign = tmp_path / "paceline-notes", tmp_path / "other"
    file.write_text("mine")
    foreign.mkdir()
    for path in (file, foreign):
        age(path)
    with shared_folder(tmp_path):
        assert file.exists() and foreign.exists()
