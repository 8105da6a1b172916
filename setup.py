"""Builds the native extension; everything else about the package is in pyproject.toml."""

from __future__ import annotations

from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CCompilerError

WHAT_TO_INSTALL = (
    "paceline.spec._native could not be compiled ({error}; the compiler's own words, if any, are "
    "above). It needs a C++17 compiler and Python's headers: install g++ and python3-dev (Debian, "
    "Ubuntu: apt install g++ python3-dev; Fedora: dnf install gcc-c++ python3-devel; macOS: "
    "xcode-select --install), or point CXX to your compiler."
)


class BuildNative(build_ext):
    """Ends a failed build with what to install, instead of a bare compiler error."""

    def build_extensions(self) -> None:
        """Compile; raises ``CCompilerError`` if the compiler is missing or fails."""
        try:
            super().build_extensions()
        except CCompilerError as error:
            raise CCompilerError(WHAT_TO_INSTALL.format(error=error)) from error


setup(
    cmdclass={"build_ext": BuildNative},
    ext_modules=[
        Pybind11Extension(
            "paceline.spec._native",
            sources=sorted(glob("spec/native/*.cpp")),
            depends=sorted(glob("spec/native/*.h")),
            include_dirs=["spec/native"],
            cxx_std=17,
            extra_compile_args=["-O3"],
        )
    ],
)
