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
from collections.abc import Callable, Collection, Iterator, Sequence
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
# the one kernel whose blocks wait for each other, and what keeps calls from it: docs/kernels.md
CLUSTER, CLUSTER_SWITCH = "cluster kernel", "OPD_CLUSTER_BLOCKS"
# how a process ends on whose device nothing runs any more; whoever started it begins another
DEVICE_LOST = 75
# until a program that was told to end is killed: some write what they have
GRACE_S = 2.0


class DeviceLost(RuntimeError):
    """Nothing runs on the device in this process any more."""


def is_lost(error: BaseException) -> bool:
    """Whether every later call would repeat the error: many errors of CUDA are of one call alone.

    The device is asked; where none has been used, the error's words say it.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return "CUDA error" in str(error)
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


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


def tell_group(group: int, number: int) -> None:
    """Sends a signal to a process group; what has ended already is not there to be told."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


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
    # cases that an earlier process of this part has ended, or that ended it
    done: Collection[str] = ()
    # hears of each case that begins and ends
    tell: Callable[[dict], None] = lambda message: None
    # process groups of the programs that run now
    groups: set[int] = dataclasses.field(default_factory=set)

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
            DeviceLost: the others could not run in this process.
        """
        try:
            yield
        except Exception as error:
            self.failed(name, error)
            if is_lost(error):
                raise DeviceLost(f"{name}: {error}") from error

    @contextlib.contextmanager
    def underway(self, name: str, again: bool = False, silent_s: float = 0.0) -> Iterator[None]:
        """Tells what runs: if this process does not survive it, the next one has it in `done`.

        `again`: the next one may run it again if this one survives it. `silent_s`: seconds without
        a word after which it is taken to hang, 0 for as many as anything may take.
        """
        self.tell({"begun": name, "silent_s": silent_s})
        yield
        self.tell({"ended": name, "again": again})

    def case(self, name: str, run: Callable[[], object], seconds: float = 0.0) -> None:
        """Runs a case if it still fits; one that raises leaves the others.

        Raises:
            DeviceLost: the others need another process.
        """
        if name not in self.done and self.has_time(name, seconds):
            with self.underway(name), self.attempt(name):
                run()

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def has_time(self, name: str, seconds: float = 0.0) -> bool:
        """Whether a case that takes so long still fits; it is left out if not."""
        if self.seconds_left() > seconds:
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
        self, command: Sequence[str], limit_s: float = math.inf, **options
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program from the root for at most the time left; shows and keeps words.

        A program that takes longer ends with all that it has started, which would otherwise go on
        and keep its output open. Several threads may run programs.

        Raises:
            subprocess.TimeoutExpired: it took longer; with what it has printed.
        """
        seconds = max(1.0, min(limit_s, self.seconds_left()))
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
                output, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                tell_group(process.pid, signal.SIGINT)
                try:
                    output, _ = process.communicate(timeout=GRACE_S)
                except subprocess.TimeoutExpired:
                    tell_group(process.pid, signal.SIGKILL)
                    output, _ = process.communicate()
                # what it has started may have no output to be waited for
                tell_group(process.pid, signal.SIGKILL)
                print(output, flush=True)
                raise subprocess.TimeoutExpired(command, seconds, output) from None
            finally:
                self.groups.discard(process.pid)
        print(output, flush=True)
        return subprocess.CompletedProcess(command, process.returncode, output)

    def end_programs(self, groups: Collection[int] | None = None) -> None:
        """These, by default all that run now, and their children."""
        for group in list(self.groups) if groups is None else groups:
            tell_group(group, signal.SIGKILL)

    def python(self, module: str, *arguments: str) -> list[str]:
        """The command line of a module of ours, a dry run again if this is one."""
        words = [sys.executable, "-m", module, *arguments]
        return [*words, "--dry-run"] if self.dry_run else words
