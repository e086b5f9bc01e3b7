# SPDX-License-Identifier: Apache-2.0
"""The installed C library, as a program in C++ or CUDA finds it by find_package(opd)."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests import native
from tests.native import ROOT, program, run

# where CMake, too, looks beside PATH
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    """Where the library is installed; nothing of the source tree but that is used."""
    directory = tmp_path_factory.mktemp("prefix")
    run(program("cmake"), "--install", native.build("opd"), "--prefix", directory)
    return directory


def build_example(prefix: Path, build: Path, *options: str) -> Path:
    source = shutil.copytree(ROOT / "examples" / "c_api", build / "source")
    cmake = program("cmake")
    configure = [cmake, "-S", source, "-B", build, *native.generator(), *options]
    run(*configure, f"-DCMAKE_PREFIX_PATH={prefix}")
    run(cmake, "--build", build)
    return build


def test_an_installation_has_what_a_program_needs(prefix):
    files = {str(path.relative_to(prefix)) for path in prefix.rglob("*") if path.is_file()}
    assert "include/opd/opd.h" in files
    configs = {Path(file).name for file in files if "/cmake/opd/" in file}
    assert {"opdConfig.cmake", "opdConfigVersion.cmake", "opdTargets.cmake"} <= configs
    # of the source tree or the build directory
    for name in prefix.rglob("*.cmake"):
        assert str(ROOT) not in name.read_text(), name


def test_a_program_in_cpp_finds_links_and_runs_the_library(prefix, tmp_path):
    build = build_example(prefix, tmp_path / "build", "-DCMAKE_CUDA_COMPILER=NOTFOUND")
    printed = run(build / "divergence")
    assert re.search(r"token 1: JSD 0\.\d{6} nats", printed), printed
    assert printed.splitlines()[-1] == "ok, opd 0.1.0"


def test_another_minor_version_is_not_found(prefix, tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(other LANGUAGES CXX)\n"
        'find_package(opd 0.2)\nmessage(STATUS "opd_FOUND=${opd_FOUND}")\n'
        'find_package(opd 0.1 REQUIRED)\nmessage(STATUS "opd_CUDA=${opd_CUDA}")\n'
    )
    configure = [program("cmake"), "-S", tmp_path, "-B", tmp_path / "build", *native.generator()]
    printed = run(*configure, f"-DCMAKE_PREFIX_PATH={prefix}")
    assert "-- opd_FOUND=0" in printed
    assert re.search(r"-- opd_CUDA=(ON|OFF)", printed)


@pytest.mark.skipif(NVCC is None, reason="nvcc was not found")
def test_a_program_in_cuda_compiles_and_says_where_there_is_no_gpu(prefix, tmp_path):
    options = [f"-DCMAKE_CUDA_COMPILER={NVCC}", "-DCMAKE_CUDA_ARCHITECTURES=90a"]
    build = build_example(prefix, tmp_path / "build", *options)
    import torch

    if not torch.cuda.is_available():
        assert run(build / "divergence_cuda") == "no CUDA device: nothing was run\n"
