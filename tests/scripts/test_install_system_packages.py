"""`make test` brings the programs that tests start, or says what to do, and starts no service."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "install_system_packages.py"))


def having(*programs):
    return lambda name: f"/usr/bin/{name}" if name in programs else None


def test_nothing_is_done_where_all_is_installed():
    assert SCRIPT["missing"](having("redis-server", "chromium"), is_root=False) == []


@pytest.mark.parametrize("there", ["redis-server", "chromium"])
def test_root_with_apt_installs_what_is_missing_alone(there):
    packages = SCRIPT["missing"](having("apt-get", there), is_root=True)
    assert sorted([*packages, there]) == ["chromium", "redis-server"]


@pytest.mark.parametrize(("programs", "is_root"), [(("apt-get",), False), ((), True)])
def test_others_are_told_what_to_do_in_a_line(programs, is_root):
    with pytest.raises(SystemExit, match="sudo apt-get install redis-server chromium") as caught:
        SCRIPT["missing"](having(*programs), is_root=is_root)
    assert "\n" not in str(caught.value)


def test_no_service_is_started_and_no_trace_is_left(tmp_path):
    policy = tmp_path / "policy-rc.d"
    with SCRIPT["services_forbidden"](policy):
        assert policy.read_text().endswith("exit 101\n")
        assert policy.stat().st_mode & 0o111
    assert not policy.exists()


def test_a_policy_that_is_there_stays(tmp_path):
    policy = tmp_path / "policy-rc.d"
    policy.write_text("theirs")
    with SCRIPT["services_forbidden"](policy):
        assert policy.read_text() == "theirs"
    assert policy.read_text() == "theirs"


def test_the_suite_installs_them_first():
    rule = (ROOT / "Makefile").read_text().split("\ntest:")[1].split("\n\n")[0]
    assert "scripts/install_system_packages.py" in rule
