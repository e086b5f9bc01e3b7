# SPDX-License-Identifier: Apache-2.0
"""Builds opd_kernels/_C.so with CMake and declares the two packages; no source list lives here."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_program(name: str, hint: str) -> str:
    """Path of a build program, the environment's own first."""
    beside_python = Path(sys.executable).parent / name
    found = str(beside_python) if beside_python.exists() else shutil.which(name)
    if not found:
        raise SystemExit(f"opd-kernels: {name} was not found, and the kernels are compiled. {hint}")
    return found


def torch_directory() -> Path:
    """Directory of the installed torch, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "opd-kernels: torch is not installed in this environment. Install torch >= 2.11 "
            "first, then run pip with --no-build-isolation."
        )
    return Path(spec.origin).parent


class CMakeBuild(build_ext):
    """Runs CMake once and copies the one shared object to where Python looks for it."""

    def get_ext_filename(self, fullname: str) -> str:
        # no Python in the library, so no interpreter tag in its name
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        find_program(os.environ.get("CXX", "g++"), "Install a C++20 compiler (g++ >= 11).")
        cmake = find_program("cmake", "pip install cmake.")
        ninja = find_program("ninja", "pip install ninja.")
        build_directory = ROOT / "build" / "torch"
        march = os.environ.get("OPD_MARCH", "native")
        configure = [cmake, "-S", str(ROOT), "-B", str(build_directory), "-G", "Ninja"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DOPD_MARCH={march}"]
        configure += ["-DOPD_TESTS=OFF", "-DOPD_WERROR=OFF"]
        configure += [f"-DOPD_TORCH_DIR={torch_directory()}"]
        subprocess.run(configure, check=True)
        subprocess.run(
            [cmake, "--build", str(build_directory), "--target", "opd_torch"], check=True
        )
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # a process that has the old file mapped keeps it: replace, never overwrite
        fresh = target.with_suffix(".so.new")
        shutil.copy2(build_directory / "_C.so", fresh)
        os.replace(fresh, target)


setup(
    packages=[
        *find_packages(include=["opd_kernels*"]),
        *find_packages("python", include=["opd", "opd.*"]),
    ],
    package_dir={"opd": "python/opd", "opd_kernels": "opd_kernels"},
    package_data={
        "opd_kernels": ["_C.so", "py.typed"],
        "opd": ["py.typed", "recipes/*.yaml", "*.j2"],
        "opd.tasks": ["chain_repair_teacher/*"],
    },
    ext_modules=[Extension("opd_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
