# SPDX-License-Identifier: Apache-2.0
"""Compile the CUDA kernels on a machine without a GPU and read what came of them.

`python -m tests.cuda_offline [few|all]` prints a table. Sources and flags are read from
CMakeLists.txt. nvcc makes one cubin per source and architecture, two at a time; registers, stack
and spills are the assembler's report, threads are the launch bounds, and the instructions come from
a disassembler: the toolkit's, or that of the triton package. Results are kept in
build/cuda_offline, by a hash of all that a compilation reads.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "build" / "cuda_offline"
SM_80, SM_90, SM_100 = "80", "90a", "100a"
ARCHITECTURES = (SM_80, SM_90, SM_100)
AT_A_TIME = 2

# instructions of interest, by what their names begin with and hold
INSTRUCTIONS = {
    "local_accesses": re.compile(r"(LDL|STL)\b"),
    "global_loads": re.compile(r"LDG\b|LD\.E\b"),
    "wide_loads": re.compile(r"LDG\.E\S*\.128|LD\.E\S*\.128"),
    "global_stores": re.compile(r"STG\b|ST\.E\b"),
    "wide_stores": re.compile(r"STG\.E\S*\.128|ST\.E\S*\.128"),
    "shared_loads": re.compile(r"LDS\b"),
    "wide_shared_loads": re.compile(r"LDS\S*\.128"),
    "bulk_copies": re.compile(r"UBLKCP\b"),
}


@dataclass
class Kernel:
    """One kernel of one source, as it is for one architecture."""

    name: str
    source: str
    arch: str
    registers: int = 0
    threads: int = 0  # of its launch bounds; 0 without
    blocks: int = 1  # on a multiprocessor, of its launch bounds
    stack_bytes: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0  # static; what a launch asks for is not known to the compiler
    instructions: dict[str, int] = field(default_factory=dict)

    @property
    def registers_of_all(self) -> int:
        """Of all the threads that the launch bounds promise; a thread is given them in eights."""
        return -(-self.registers // 8) * 8 * self.threads * self.blocks

    @property
    def is_empty(self) -> bool:
        """Compiled to nothing: an architecture that lacks what the kernel is made of."""
        return not any(self.instructions.values())

    def __str__(self) -> str:
        counts = " ".join(f"{name}={count}" for name, count in self.instructions.items() if count)
        return (
            f"sm_{self.arch} {self.source} {self.name}: {self.registers} registers x "
            f"{self.threads} threads x {self.blocks}, stack {self.stack_bytes}, "
            f"spills {self.spilled_bytes}, static shared memory {self.shared_bytes}; {counts}"
        )


# -- tools ---------------------------------------------------------------------------------------


@cache
def find_nvcc() -> Path | None:
    """The compiler of CUDA_HOME, of PATH, or of the usual place."""
    home = os.environ.get("CUDA_HOME")
    places = [Path(home, "bin")] if home else []
    on_path = shutil.which("nvcc")
    places += [Path(on_path).parent] if on_path else []
    places.append(Path("/usr/local/cuda/bin"))
    return next((place / "nvcc" for place in places if (place / "nvcc").is_file()), None)


@cache
def find_cuobjdump() -> Path | None:
    """The disassembler beside nvcc, on PATH, or in the triton package."""
    triton = find_spec("triton")
    places = [find_nvcc().parent] if find_nvcc() else []
    on_path = shutil.which("cuobjdump")
    places += [Path(on_path).parent] if on_path else []
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    tools = (place / "cuobjdump" for place in places)
    return next((tool for tool in tools if tool.is_file()), None)


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if find_nvcc() is None:
        return "nvcc was found neither in CUDA_HOME, nor on PATH, nor in /usr/local/cuda"
    if find_cuobjdump() is None:
        return "cuobjdump was found neither beside nvcc, nor on PATH, nor in the triton package"
    return None


def _run(*command: str | Path) -> str:
    """stdout and stderr of a command that must succeed."""
    path = f"{find_cuobjdump().parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "PATH": path},  # cuobjdump runs the nvdisasm that it finds
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stderr}{result.stdout}")
    return result.stdout + result.stderr


# -- what is compiled ----------------------------------------------------------------------------


@cache
def _cmake() -> str:
    return (ROOT / "CMakeLists.txt").read_text()


def _words(pattern: str) -> list[str]:
    (text,) = re.findall(pattern, _cmake(), re.S)
    return text.split()


def sources() -> list[str]:
    """The CUDA files of the build."""
    return _words(r"set\(opd_cuda_sources\s(.*?)\)")


def flags() -> list[str]:
    """Those of the build, with warnings as errors, the assembler's too."""
    return [
        "-std=c++17", "-O3", "-DNDEBUG", "-Werror=all-warnings",
        *_words(r"target_compile_options\(opd_cuda PRIVATE (.*?)\)"),
        *(f"-I{folder}" for folder in ("csrc/include", "csrc/core", "csrc/cuda")),
        "-Xptxas=-v,--warning-as-error",
    ]  # fmt: skip


def jobs(everything: bool) -> list[tuple[str, str]]:
    """(source, architecture): each on Hopper, and the quick sources on the one that differs most
    from it, without clusters and bulk copies; or each on every architecture."""
    quick = [name for name in sources() if "divergence" not in name]
    pairs = [(name, SM_90) for name in sources()]
    if everything:
        pairs += [(name, arch) for arch in (SM_80, SM_100) for name in sources()]
    else:
        pairs += [(name, SM_80) for name in quick]
    # long ones first, so that the last does not run alone
    return sorted(pairs, key=lambda pair: "divergence" not in pair[0])


# -- compiling -----------------------------------------------------------------------------------


def _key(source: str, arch: str) -> str:
    """Of the source, the headers, the flags, the compiler, and this file, which reads them."""
    digest = hashlib.sha256(repr((source, arch, flags(), _version())).encode())
    headers = (path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh"))
    for path in [Path(__file__), ROOT / source, *sorted(headers)]:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:24]


@cache
def _version() -> str:
    return _run(find_nvcc(), "--version")


def compile_one(source: str, arch: str) -> list[Kernel]:
    """The kernels of a source, compiled, or as they were kept."""
    kept = CACHE / f"{_key(source, arch)}.json"
    if kept.is_file():
        return [Kernel(**row) for row in json.loads(kept.read_text())]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        keep = ("--keep", f"--keep-dir={folder}")
        report = _run(find_nvcc(), *flags(), target, *keep, "-cubin", source, "-o", cubin)
        ptx = "".join(path.read_text() for path in Path(folder).glob("*.ptx"))
        kernels = read(report, ptx, _run(find_cuobjdump(), "-sass", cubin), source, arch)
    CACHE.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps([asdict(kernel) for kernel in kernels], indent=1))
    part.replace(kept)
    return kernels


def compile_all(pairs: Iterable[tuple[str, str]]) -> list[Kernel]:
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return list(chain.from_iterable(pool.map(lambda pair: compile_one(*pair), pairs)))


# -- reading -------------------------------------------------------------------------------------


def read(report: str, ptx: str, sass: str, source: str, arch: str) -> list[Kernel]:
    """Kernels from the assembler's report, its input and the disassembler's output."""
    found: dict[str, Kernel] = {}
    entry = None
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            entry = found.setdefault(match[1], Kernel(_name(match[1]), source, arch))
        elif entry is None:
            continue
        # functions that a kernel calls come after it, with a stack of their own
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line):
            entry.stack_bytes += int(match[1])
            entry.spilled_bytes += int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            entry.registers = int(match[1])
            shared = re.search(r"(\d+) bytes smem", line)
            entry.shared_bytes = int(shared[1]) if shared else 0
    for kernel in found.values():
        kernel.instructions = dict.fromkeys(INSTRUCTIONS, 0)
    for name, bounds in re.findall(r"\.entry (\w+)\(.*?\)\s*(.*?)\{", ptx, re.S):
        if match := re.search(r"\.maxntid ([\d, ]+)", bounds):
            found[name].threads = math.prod(map(int, match[1].split(",")))
        if match := re.search(r"\.minnctapersm (\d+)", bounds):
            found[name].blocks = int(match[1])
    kernel = None
    for line in sass.splitlines():
        if match := re.search(r"Function : (\w+)", line):
            kernel = found.get(match[1])
        elif kernel is not None and (match := re.match(r"\s+/\*\w{4,}\*/\s+(.*?);", line)):
            opcode = re.sub(r"^@!?U?P\w+\s+", "", match[1])
            for what, pattern in INSTRUCTIONS.items():
                kernel.instructions[what] += bool(pattern.match(opcode))
    return list(found.values())


def _name(mangled: str) -> str:
    """Without namespaces and parameters: `token_logprobs_forward<float>`."""
    text = subprocess.run(
        ["c++filt", mangled], capture_output=True, text=True, check=True
    ).stdout.strip()
    text = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N_\w*::|\bopd::|\bcuda::", "", text)
    return re.sub(r"^void ", "", text[: _end_of_name(text)])


def _end_of_name(text: str) -> int:
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return i
    return len(text)


if __name__ == "__main__":
    if missing():
        sys.exit(missing())
    for one in compile_all(jobs("all" in sys.argv[1:])):
        print(one)
