from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from paceline.configs.errors import GraderError
from paceline.configs.vocabulary import Prompt
from paceline.reward.imported import build_imported_grader
from paceline.reward.pool import GraderPool

HERE = Path(__file__).parent
PROMPT = Prompt("task:17", "2+2=", (1, 2), reference="4")


def pool_of(name: str, limit: float = 30.0, processes: int = 1, **parameters: object) -> GraderPool:
    factory = partial(build_imported_grader, f"fake_graders:{name}", parameters)
    return GraderPool(factory, processes, limit)


@pytest.fixture(autouse=True)
def _run_beside_the_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


@pytest.fixture
def pool() -> Iterator[GraderPool]:
    pool = pool_of("ObedientGrader", limit=0.5)
    yield pool
    pool.close()


def grade(pool: GraderPool, *completions: str) -> list[float]:
    return asyncio.run(pool.grade(PROMPT, completions))


def exists(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pid: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while exists(pid):
        assert time.monotonic() < deadline, f"process {pid} still lives after {seconds} seconds"
        time.sleep(0.05)


def test_rewards_come_back_in_the_order_of_the_completions(pool: GraderPool) -> None:
    assert grade(pool, "a", "ccc", "", "bb") == [1.0, 3.0, 0.0, 2.0]


@pytest.mark.parametrize("behaviour", ["hang", "hang deaf"])
def test_a_hanging_grader_is_killed_and_the_pool_grades_on(
    pool: GraderPool, behaviour: str
) -> None:
    pid = int(grade(pool, "pid")[0])
    with pytest.raises(GraderError, match=r"prompt task:17 took longer than 0\.5 seconds"):
        grade(pool, behaviour)
    wait_until_gone(pid, 5)
    assert grade(pool, "abc") == [3.0]


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("raise", "prompt task:17: ZeroDivisionError: one line"),
        ("raise unpicklable", "prompt task:17: UnpicklableError: this and that"),
        ("exit", "prompt task:17: SystemExit: 3"),
        ("too few", "returned 1 rewards for the 2 completions of prompt task:17"),
        ("nan", "not finite for prompt task:17"),
        ("words", "prompt task:17: ValueError: could not convert"),
    ],
)
def test_a_misbehaving_grader_is_named_with_its_prompt_and_survives(
    pool: GraderPool, behaviour: str, message: str
) -> None:
    pid = grade(pool, "pid")
    with pytest.raises(GraderError, match=message) as caught:
        grade(pool, behaviour, "x")
    assert "\n" not in str(caught.value)
    assert grade(pool, "pid") == pid


def test_a_killed_process_fails_its_own_group_only(pool: GraderPool) -> None:
    with pytest.raises(GraderError, match=r"died while grading prompt task:17 .*-9"):
        grade(pool, "die")
    assert grade(pool, "abc") == [3.0]


def test_a_process_killed_while_idle_is_replaced(pool: GraderPool) -> None:
    pid = int(grade(pool, "pid")[0])
    os.kill(pid, signal.SIGKILL)
    wait_until_gone(pid, 5)
    time.sleep(0.5)  # pebble looks at its processes ten times a second
    assert grade(pool, "abc") == [3.0]


def test_a_grader_that_cannot_be_built_shows_at_the_start() -> None:
    for name, message in [
        ("UnbuildableGrader", "no judge at this address"),
        ("GraderWithoutGrade", "must offer a method grade"),
        ("NoSuchGrader", "has no NoSuchGrader"),
    ]:
        pool = pool_of(name)
        try:
            with pytest.raises(GraderError, match=message):
                asyncio.run(pool.start())
            with pytest.raises(GraderError, match=message):
                grade(pool, "abc")
        finally:
            pool.close()


def test_each_process_builds_its_grader_once(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    pool = pool_of("ObedientGrader", processes=2, pid_file=str(pids))

    async def grade_many() -> list[list[float]]:
        await pool.start()
        return await asyncio.gather(*(pool.grade(PROMPT, ["x" * n]) for n in range(40)))

    try:
        assert asyncio.run(grade_many()) == [[float(n)] for n in range(40)]
        built = pids.read_text().split()
        assert len(built) == len(set(built)) <= 2
    finally:
        pool.close()


def test_closing_leaves_no_processes_even_when_a_grader_hangs() -> None:
    pool = pool_of("ObedientGrader", limit=60.0)

    async def hang_and_close() -> int:
        pid = int((await pool.grade(PROMPT, ["pid"]))[0])
        hanging = asyncio.create_task(pool.grade(PROMPT, ["hang"]))
        await asyncio.sleep(0.5)
        await asyncio.to_thread(pool.close)
        hanging.cancel()
        return pid

    pid = asyncio.run(hang_and_close())
    assert not exists(pid)
    pool.close()


def test_cancelling_a_grading_frees_its_process() -> None:
    pool = pool_of("ObedientGrader", limit=60.0)

    async def cancel_and_go_on() -> list[float]:
        hanging = asyncio.create_task(pool.grade(PROMPT, ["hang"]))
        await asyncio.sleep(1.0)
        hanging.cancel()
        return await asyncio.wait_for(pool.grade(PROMPT, ["abc"]), 20)

    try:
        assert asyncio.run(cancel_and_go_on()) == [3.0]
    finally:
        pool.close()


def test_graders_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import asyncio, sys\n"
        "from functools import partial\n"
        "from paceline.configs.vocabulary import Prompt\n"
        "from paceline.reward.imported import build_imported_grader\n"
        "from paceline.reward.pool import GraderPool\n"
        "async def main():\n"
        "    factory = partial(build_imported_grader, 'fake_graders:ObedientGrader', {})\n"
        "    pool = GraderPool(factory, 1, 60.0)\n"
        "    prompt = Prompt('p', '', ())\n"
        "    print(int((await pool.grade(prompt, ['pid']))[0]), flush=True)\n"
        "    await pool.grade(prompt, ['hang'])\n"
        "if __name__ == '__main__':\n"
        "    asyncio.run(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, cwd=HERE
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.5)
        parent.kill()
    wait_until_gone(pid, 5)
