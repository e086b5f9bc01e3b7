# SPDX-License-Identifier: Apache-2.0
"""Builds the two libraries for this card alone, in place, and reads the compiler's report."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks.gpu import machine
from benchmarks.gpu.context import ROOT, Context
from benchmarks.gpu.results import Check, Kernel

LIBRARIES = ("opd_kernels/_C.so", "opd_kernels/_C_cuda.so")
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")

# what nvcc -Xptxas=-v prints, for a dry run
RECORDED = """\
ptxas info    : Compiling entry function '_ZN3opd4cuda9first_kernE' for 'sm_90a'
ptxas info    : Function properties for _ZN3opd4cuda9first_kernE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 4096 bytes smem
ptxas info    : Compiling entry function '_ZN3opd4cuda10second_kerE' for 'sm_90a'
ptxas info    : Function properties for _ZN3opd4cuda10second_kerE
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""


def kernels_of(report: str) -> list[Kernel]:
    """Registers, spills, stack and static shared memory by kernel."""
    found: list[Kernel] = []
    name = arch = ""
    stack = spills = 0
    for line in report.splitlines():
        if entry := _ENTRY.search(line):
            name, arch = entry.groups()
            stack = spills = 0
        elif properties := _STACK.search(line):
            stack, stores, loads = map(int, properties.groups())
            spills = stores + loads
        elif (used := _USED.search(line)) and name:
            found.append(Kernel(name, arch, int(used[1]), spills, stack, int(used[2] or 0)))
            name = ""
    return found


def architecture(dry_run: bool) -> str:
    """CMake's word for this card; Hopper's own instructions need the `a`."""
    if dry_run:
        return "90a-real"
    major, _, minor = str(machine.describe(dry_run)["capability"]).partition(".")
    return f"{major}{minor}{'a' if int(major) >= 9 else ''}-real"


def demangled(names: list[str]) -> list[str]:
    """As a person writes them, where c++filt is there."""
    try:
        done = subprocess.run(
            ["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return names
    return done.stdout.splitlines()


@contextlib.contextmanager
def reading_ahead(context: Context) -> Iterator[None]:
    """Imports what every later process imports, whose first reading of it takes longest."""
    if context.dry_run:
        yield
        return
    words = (
        "import torch, triton, pytest; x = torch.ones(8, 8, device='cuda'); print((x @ x).sum())"
    )
    program = [sys.executable, "-c", words]
    with subprocess.Popen(program, cwd=ROOT, start_new_session=True) as process:
        context.groups.add(process.pid)
        try:
            yield
        finally:
            # a build that fails at once need not wait for it
            context.end_programs([process.pid])
            context.groups.discard(process.pid)


def run(context: Context) -> None:
    environment = {
        **os.environ,
        "OPD_CUDA": "1",
        "OPD_CUDA_ARCHITECTURES": architecture(context.dry_run),
        # the report costs nothing; ninja shows it because nvcc printed something
        "NVCC_APPEND_FLAGS": f"{os.environ.get('NVCC_APPEND_FLAGS', '')} -Xptxas=-v".strip(),
    }
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    if context.dry_run:
        command = [sys.executable, "-c", f"print({RECORDED!r})"]
    begin = time.monotonic()
    with reading_ahead(context):
        done = context.command(command, env=environment)
    seconds = time.monotonic() - begin
    kernels = kernels_of(done.stdout)
    names = demangled([kernel.kernel for kernel in kernels])
    for kernel, name in zip(kernels, names, strict=True):
        context.row(Kernel(name, *list(vars(kernel).values())[1:]))
    outcome = "passed" if done.returncode == 0 else "failed"
    arch = environment["OPD_CUDA_ARCHITECTURES"]
    context.row(Check("build", outcome, f"{arch}, {seconds:.1f} s, {len(kernels)} kernels"))
    missing = [name for name in LIBRARIES if not (ROOT / name).is_file()]
    # the host's kernels are all that a CPU build has
    if context.dry_run:
        missing = [name for name in missing if name == LIBRARIES[0]]
    if done.returncode != 0 or missing:
        raise RuntimeError(
            f"the build must leave {' and '.join(LIBRARIES)}; exit code {done.returncode}, "
            f"missing: {', '.join(missing) or 'nothing'}. The log has the compiler's words."
        )
