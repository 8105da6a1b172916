#!/usr/bin/env python3
"""Install the programs that the tests start, where they are missing.

Tests of the ledger start Redis servers of their own, those of the report open it in Chromium.
``make test`` runs this with the system's Python, so it needs the standard library alone:

    python3 scripts/install_system_packages.py

It uses apt as root and changes nothing elsewhere: there it says what to do. Services that Debian's
packages would start are kept from starting.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ("redis-server", "chromium")
"""Debian's names of packages; each brings a program of the same name."""
SERVICE_POLICY = Path("/usr/sbin/policy-rc.d")
"""Debian asks this program whether a newly installed service may start; 101 means no."""
FORBID_SERVICES = "#!/bin/sh\nexit 101\n"
ADVICE = (
    "the tests need {0}, and only root can install that with apt: run `sudo apt-get install {0}` "
    "(Fedora: `sudo dnf install redis chromium`, macOS: `brew install redis chromium`), then this "
    "again"
)


def missing(which=shutil.which, is_root: bool | None = None) -> list[str]:
    """Return the packages to install here; exit with advice where that cannot be done."""
    packages = [package for package in PACKAGES if not which(package)]
    if is_root is None:
        is_root = os.geteuid() == 0
    if packages and not (is_root and which("apt-get")):
        sys.exit(ADVICE.format(" ".join(packages)))
    return packages


@contextmanager
def services_forbidden(policy: Path = SERVICE_POLICY) -> Iterator[None]:
    """Keep services that are installed from starting, unless a policy is set already."""
    if policy.exists() or not policy.parent.is_dir():
        yield
        return
    policy.write_text(FORBID_SERVICES)
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink()


def apt(*arguments: str) -> subprocess.CompletedProcess:
    """Run apt-get without questions."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def main() -> None:
    """Install what is missing; exit with a line where that fails."""
    packages = missing()
    if not packages:
        return
    print(f"Installing {', '.join(packages)} with apt", flush=True)
    install = ("install", "--yes", "--no-install-recommends", *packages)
    with services_forbidden():
        done = apt(*install)
        if done.returncode:  # a new machine has no package lists yet
            apt("update")
            done = apt(*install)
    if done.returncode:
        names, said = " ".join(packages), " ".join(done.stderr.split()[-40:])
        sys.exit(f"apt-get could not install {names} ({said}): install it and run this again")


if __name__ == "__main__":
    main()
