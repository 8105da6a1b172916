#!/usr/bin/env python3
"""Installs redis-server where it is missing: tests of the ledger start servers of their own.

``make test`` runs it with the system's Python, so it needs the standard library alone:

    python3 scripts/install_redis.py

It uses apt as root and changes nothing elsewhere: there it says what to do. The service that
Debian's package would start is kept from starting.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = "redis-server"
SERVICE_POLICY = Path("/usr/sbin/policy-rc.d")
"""Debian asks this program whether a newly installed service may start; 101 means no."""
FORBID_SERVICES = "#!/bin/sh\nexit 101\n"
ADVICE = (
    f"the tests need {PACKAGE}, and only root can install it with apt: run "
    f"`sudo apt-get install {PACKAGE}` (Fedora: `sudo dnf install redis`, macOS: `brew install "
    "redis`), then this again"
)


def needed(which=shutil.which, is_root: bool | None = None) -> bool:
    """Return whether to install it here; exit with advice where only root or another system can."""
    if which(PACKAGE):
        return False
    if is_root is None:
        is_root = os.geteuid() == 0
    if not is_root or not which("apt-get"):
        sys.exit(ADVICE)
    return True


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
    """Install what is missing; exit with a line where it cannot."""
    if not needed():
        return
    print(f"Installing {PACKAGE} with apt", flush=True)
    install = ("install", "--yes", "--no-install-recommends", PACKAGE)
    with services_forbidden():
        done = apt(*install)
        if done.returncode:  # a new machine has no package lists yet
            apt("update")
            done = apt(*install)
    if done.returncode:
        said = " ".join(done.stderr.split()[-40:])
        sys.exit(f"apt-get could not install {PACKAGE} ({said}): install it and run this again")


if __name__ == "__main__":
    main()
