# SPDX-License-Identifier: Apache-2.0
"""What every part is given: device, sizes, backends, a deadline, and where its rows go."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu import results

if TYPE_CHECKING:
    from benchmarks.gpu.cases import Sizes
    from benchmarks.gpu.device import Device

ROOT = Path(__file__).resolve().parents[2]
LEADS = ("cuda", "triton")
# of a CUDA toolkit, where its programs are
TOOL_FOLDERS = ("bin", "compute-sanitizer", "extras/compute-sanitizer", "nsight-compute")
# what stands in for the two on a CPU
DRY_LEADS = ("cpu", "reference")


def public(text: str) -> str:
    """The text without the directories of this machine: results are published."""
    return re.sub(r"(?<![\w.~])(?:/[\w.+@-]+)+/(?=[\w.])", "", text.replace(f"{ROOT}/", ""))


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit, which often is on the machine and not on PATH."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    homes += [str(Path(nvcc).resolve().parents[1])] if nvcc else []
    places = [Path(home, folder) for home in homes if home for folder in TOOL_FOLDERS]
    places += sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True)
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, places)))


# after one of these nothing runs in the process any more; a launch that is refused is none
_LOST = re.compile(
    "illegal memory access|misaligned address|illegal instruction|invalid program counter|"
    "hardware stack error|unspecified launch failure|device-side assert|launch timed out|"
    "Warp Illegal|cudaErrorLaunchFailure|uncorrectable"
)


def is_lost(text: str) -> bool:
    """Whether these are the words of an error after which the process has no device."""
    return bool(_LOST.search(text))


def _name_of(row: dict) -> str:
    """What a row is about, in few words."""
    keys = ("case", "contestant", "name", "divergence", "head", "law", "metric")
    return " ".join(str(row[key]) for key in keys if row.get(key))


@dataclasses.dataclass
class Context:
    """Of one run of one part."""

    dry_run: bool
    emit: Callable[[dict], None]
    deadline: float
    only_peers: Sequence[str] = ()
    which: Callable[[str], str | None] = shutil.which
    # process groups of the programs that run now
    groups: set[int] = dataclasses.field(default_factory=set)
    # cases that a process of this part before this one has begun, the last of which ended it
    begun: Sequence[str] = ()
    begins: Callable[[str], None] = lambda name: None

    @property
    def sizes(self) -> Sizes:
        # torch is imported where it is needed: a build is quicker without
        from benchmarks.gpu import cases

        return cases.DRY if self.dry_run else cases.REAL

    def device(self) -> Device:
        from benchmarks.gpu import device

        return device.of(self.dry_run)

    def row(self, row: object) -> None:
        """Keeps a row at once: what comes after may fail or run out of time.

        JSON has no NaN: a row with one becomes an error that shows it.
        """
        found = results.row_of(row)
        if any(isinstance(value, float) and not math.isfinite(value) for value in found.values()):
            words = ", ".join(str(value) for value in found.values() if value != "")
            found = results.row_of(results.Check(_name_of(found), "error", public(words)[:300]))
        self.emit(found)

    def left_out(self, name: str, why: str) -> None:
        """Says what was not measured, and why."""
        self.row(results.Check(name, "left out", public(why)[:300]))

    def failed(self, name: str, error: BaseException) -> None:
        """A case that raised; the rest goes on."""
        traceback.print_exception(error)
        words = f"{type(error).__name__}: {error}".strip()
        self.row(results.Check(name, "error", public(words)[:300]))

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """A case that may raise without an end of the others.

        Raises:
            RuntimeError: the device is lost, on which nothing runs in this process any more.
        """
        try:
            yield
        except (RuntimeError, ValueError, TypeError) as error:
            if is_lost(str(error)):
                raise
            self.failed(name, error)

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def has_time(self, name: str, seconds: float = 0.0) -> bool:
        """Whether a case is to run now: it still fits, and is left out if not; and no process of
        this part has begun it before."""
        if name in self.begun:
            return False
        if self.seconds_left() > seconds:
            self.begins(name)
            return True
        self.left_out(name, "no time was left in the budget of this part")
        return False

    def backends(self, op: str = "fused_linear_divergence") -> list[str]:
        """Those that can run the op here, the one that goals are about first."""
        import torch

        from opd_kernels import _dispatch

        meta = _dispatch.meta_of(torch.empty(0, device="cpu" if self.dry_run else "cuda"))
        reasons = {name: why for name, can, why in _dispatch.table(op, meta) if not can}
        found = []
        for name in DRY_LEADS if self.dry_run else LEADS:
            if name in reasons:
                self.left_out(f"{op}, backend {name}", reasons[name])
            else:
                found.append(name)
        return found

    @functools.cached_property
    def lead(self) -> str:
        """The backend that goals are about.

        Raises:
            RuntimeError: there is none.
        """
        found = self.backends()
        if not found:
            raise RuntimeError("no backend can run fused_linear_divergence here; was it built?")
        return found[0]

    def tool(self, name: str) -> str | None:
        """A program of the CUDA toolkit; a dry run has none unless its test brings one."""
        if self.which is not shutil.which:
            return self.which(name)
        return None if self.dry_run else find_tool(name)

    def command(
        self, command: Sequence[str], share: float = 1.0, **options
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program from the root for at most a share of the time left; shows and keeps words.

        A program that takes longer ends with all that it has started, which would otherwise go on
        and keep its output open.

        Raises:
            subprocess.TimeoutExpired: it took longer; with what it had printed.
        """
        with subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            **options,
        ) as process:
            self.groups.add(process.pid)
            try:
                output, _ = process.communicate(timeout=max(1.0, share * self.seconds_left()))
            except subprocess.TimeoutExpired as error:
                self.end_programs()
                error.output, _ = process.communicate()
                print(error.output, flush=True)
                raise
            finally:
                self.groups.discard(process.pid)
        print(output, flush=True)
        return subprocess.CompletedProcess(command, process.returncode, output)

    def end_programs(self) -> None:
        """Those that run now, and their children."""
        for group in list(self.groups):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)

    def python(self, module: str, *arguments: str) -> list[str]:
        """The command line of a module of ours, a dry run again if this is one."""
        words = [sys.executable, "-m", module, *arguments]
        return [*words, "--dry-run"] if self.dry_run else words
