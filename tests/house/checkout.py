"""A copy of the checkout without what was built in it, to build and install elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINKS = ROOT / "src" / "paceline"
PACKAGES: list[str] = sorted(link.name for link in LINKS.iterdir() if link.is_symlink())


def copy_checkout(folder: Path, *files: str) -> None:
    """Copy the packages, the links to them and some files of the root into a new folder."""
    skip = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=skip)
    shutil.copytree(ROOT / "src", folder / "src", symlinks=True, ignore=skip)
    for name in files:
        shutil.copy(ROOT / name, folder)
