# SPDX-License-Identifier: Apache-2.0
"""Builds targets of CMakeLists.txt for tests, in the directory that `make test-core` builds in."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "core"
# what a build depends on
_SOURCES = ("CMakeLists.txt", "csrc", "tests/csrc")
_ENTRY_POINTS = {"segment_scan": ("opd_segment_", "opd_group_")}


def program(name: str) -> str:
    """Path of a build program, the environment's own first; skips the test where there is none."""
    beside_python = Path(sys.executable).parent / name
    found = str(beside_python) if beside_python.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} was not found, and this test compiles")
    return found


def run(*command: str | Path, **options) -> str:
    """Output of a command; fails the test with it where the command fails."""
    result = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    assert result.returncode == 0, f"{' '.join(map(str, command))}:\n{result.stdout[-6000:]}"
    return result.stdout


def generator() -> list[str | Path]:
    """What `cmake -S . -B ...` is told in every build of the tests."""
    program(os.environ.get("CXX", "g++"))
    return ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={program('ninja')}"]


def build(target: str) -> Path:
    """Builds a target of CMakeLists.txt, unless these sources have been; the build directory."""
    # a file each: two targets may have been built from different sources
    stamp = BUILD / f"{target}.sources"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = _digest()
        if not stamp.exists() or stamp.read_text() != wanted:
            cmake = program("cmake")
            run(
                *(cmake, "-S", ROOT, "-B", BUILD, *generator(), "-DOPD_TORCH=OFF"),
                f"-DOPD_CUDA={'ON' if os.environ.get('OPD_CUDA') == '1' else 'OFF'}",
                f"-DOPD_TORCH_DIR={Path(torch.__file__).parent}",
            )
            run(cmake, "--build", BUILD, "--target", target)
            stamp.write_text(wanted)
    return BUILD


def _digest() -> str:
    digest = hashlib.sha256(torch.__version__.encode())
    for source in _SOURCES:
        path = ROOT / source
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def cuda_entry_points(op: str = "") -> list[str]:
    """The CUDA entry points of the C API, or those of one op."""
    header = (ROOT / "csrc/include/opd/opd.h").read_text()
    names = re.findall(r"^OPD_API opd_status_t (opd_\w+_cuda)\(", header, re.M)
    return [name for name in names if name.startswith(_ENTRY_POINTS.get(op, f"opd_{op}"))]


def unwritten(*ops: str) -> list[str]:
    """The CUDA entry points of these ops that no kernel of csrc/cuda implements."""
    kernels = "\n".join(file.read_text() for file in sorted((ROOT / "csrc/cuda").glob("*.cu")))
    names = [name for op in ops for name in cuda_entry_points(op)]
    return [name for name in names if not re.search(rf"\b{name}\b", kernels)]


def needs_kernels(*ops: str) -> pytest.MarkDecorator:
    """Skips tests of ops of which an entry point has no kernel yet; no longer once it has."""
    missing = unwritten(*ops)
    return pytest.mark.skipif(bool(missing), reason=f"no kernel yet: {', '.join(missing)}")
