"""What this process holds in memory, and the most it held, as the kernel counts it (Linux)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PAGES_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""What makes glibc give freed tensors back to the kernel, so that what is counted is what is used:
else it raises both limits as a process goes on, and peaks depend on the order of sizes."""


def resident_bytes() -> int:
    """Return the bytes of this process that are in memory now."""
    return _bytes_of("VmRSS")


def peak_bytes() -> int:
    """Return the most bytes in memory since ``forget_peak``, or since the process began."""
    return _bytes_of("VmHWM")


def forget_peak() -> None:
    """Count the peak from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def _bytes_of(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    kibibytes = next(line.split()[1] for line in lines if line.startswith(field + ":"))
    return int(kibibytes) * 1024


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Give these environment variables to processes that are started within."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
