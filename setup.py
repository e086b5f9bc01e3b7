# SPDX-License-Identifier: Apache-2.0
"""Builds opd_kernels/_C.so and _align, and _C_cuda.so where it can be used, with CMake; declares
the packages.

No source list lives here. Environment variables:

    OPD_MARCH               -march of the CPU kernels, default native
    OPD_CUDA                1: build the CUDA kernels or fail; 0: do not. Default: build them where
                            there are nvcc, a GPU and a torch with CUDA, since they take minutes
    OPD_CUDA_ARCHITECTURES  GPUs to build for, as CMake's CUDA_ARCHITECTURES; default
                            80-real;90a-real;100a-real
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
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


def python_headers() -> list[str]:
    """Directories of Python.h and of pybind11's headers."""
    include = Path(sysconfig.get_paths()["include"])
    if not (include / "Python.h").exists():
        raise SystemExit(
            f"opd-kernels: {include / 'Python.h'} was not found, and a module for Python is "
            "compiled. Install Python's headers (Debian, Ubuntu: apt-get install python3-dev)."
        )
    if importlib.util.find_spec("pybind11") is None:
        raise SystemExit(
            "opd-kernels: pybind11 is not installed in this environment. pip install pybind11."
        )
    import pybind11

    return [str(include), pybind11.get_include()]


def nvcc() -> str | None:
    """Path of nvcc, also where CUDA is installed beside PATH."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    paths = [os.environ.get("CUDACXX"), "nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    return next((found for path in paths if path and (found := shutil.which(path))), None)


def has_gpu() -> bool:
    """Whether the driver lists a GPU."""
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True).returncode == 0


def builds_cuda() -> bool:
    """Whether to build the CUDA kernels, by OPD_CUDA or by what is here."""
    wanted = os.environ.get("OPD_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"opd-kernels: OPD_CUDA must be 0 or 1 or unset, got {wanted!r}.")
    if wanted == "1" and nvcc() is None:
        raise SystemExit(
            "opd-kernels: OPD_CUDA=1 needs nvcc, which was not found. Install the CUDA toolkit "
            "(12.8 or newer) and put nvcc on PATH, or name it in CUDACXX."
        )
    if wanted:
        return wanted == "1"
    has_cuda = (torch_directory() / "lib" / "libtorch_cuda.so").exists()
    return nvcc() is not None and has_cuda and has_gpu()


# of CMakeLists.txt, by the last word of the extension's name
TARGETS = {"_C": "opd_torch", "_C_cuda": "opd_torch_cuda", "_align": "opd_align"}


class CMakeBuild(build_ext):
    """Runs CMake once for all shared objects and copies each to where Python looks for it."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.rpartition(".")[2] == "_align":
            return super().get_ext_filename(fullname)
        # no Python in the library, so no interpreter tag in its name
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def run(self) -> None:
        self.cuda = builds_cuda()
        cuda = next(ext for ext in self.extensions if ext.name == "opd_kernels._C_cuda")
        if not self.cuda:
            self.extensions.remove(cuda)
            # kernels of older sources would be loaded beside the new library
            Path(self.get_ext_fullpath(cuda.name)).unlink(missing_ok=True)
        super().run()

    def build_extensions(self) -> None:
        find_program(os.environ.get("CXX", "g++"), "Install a C++20 compiler (g++ >= 11).")
        cmake = find_program("cmake", "pip install cmake.")
        ninja = find_program("ninja", "pip install ninja.")
        build_directory = ROOT / "build" / "torch"
        march = os.environ.get("OPD_MARCH", "native")
        configure = [cmake, "-S", str(ROOT), "-B", str(build_directory), "-G", "Ninja"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DOPD_MARCH={march}"]
        configure += ["-DOPD_TESTS=OFF", "-DOPD_WERROR=OFF"]
        configure += [f"-DOPD_TORCH_DIR={torch_directory()}"]
        configure += [f"-DOPD_PYTHON_INCLUDE={';'.join(python_headers())}"]
        configure += [f"-DOPD_PYTHON_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}"]
        configure += [f"-DOPD_CUDA={'ON' if self.cuda else 'OFF'}"]
        if self.cuda:
            configure += [f"-DCMAKE_CUDA_COMPILER={nvcc()}"]
            architectures = os.environ.get("OPD_CUDA_ARCHITECTURES")
            configure += [f"-DOPD_CUDA_ARCHITECTURES={architectures}"] if architectures else []
        subprocess.run(configure, check=True)
        # at once: each has one file that takes longer than all its others, and cores to spare
        targets = [TARGETS[ext.name.rpartition(".")[2]] for ext in self.extensions]
        build = [cmake, "--build", str(build_directory), "--target", *targets]
        subprocess.run(build, check=True)
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # a process that has the old file mapped keeps it: replace, never overwrite
        fresh = target.with_name(target.name + ".new")
        shutil.copy2(ROOT / "build" / "torch" / target.name, fresh)
        os.replace(fresh, target)


setup(
    packages=[
        *find_packages(include=["opd_kernels*"]),
        *find_packages("python", include=["opd", "opd.*"]),
    ],
    package_dir={"opd": "python/opd", "opd_kernels": "opd_kernels"},
    package_data={
        "opd_kernels": ["_C.so", "_C_cuda.so", "_align*.so", "py.typed"],
        "opd": ["py.typed", "recipes/*.yaml", "*.j2"],
        "opd.tasks": ["chain_repair_teacher/*"],
    },
    ext_modules=[
        Extension("opd_kernels._C", sources=[]),
        Extension("opd_kernels._align", sources=[]),
        Extension("opd_kernels._C_cuda", sources=[]),
    ],
    cmdclass={"build_ext": CMakeBuild},
)
