# SPDX-License-Identifier: Apache-2.0
"""All that differs between a GPU and the CPU of a dry run: timing, memory, graphs, GEMMs."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Run = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


# about 2 ms, longer than any call of ours takes until its first kernel
SLEEP_CYCLES = 4_000_000


class Time(NamedTuple):
    """Milliseconds of one variant over its rounds."""

    median: float
    best: float
    rounds: int


class Device:
    """A CUDA device, or the CPU standing in for one."""

    def __init__(self, kind: str) -> None:
        if kind not in ("cuda", "cpu"):
            raise ValueError(f"Device: kind must be 'cuda' or 'cpu', got {kind!r}.")
        self.kind = kind
        self.is_cuda = kind == "cuda"

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.kind).manual_seed(seed)

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def free(self, above_bytes: int = 0) -> None:
        """Returns what the allocator keeps, if it is more than this, so that cases start alike."""
        if self.is_cuda and torch.cuda.memory_reserved() > above_bytes:
            gc.collect()
            torch.cuda.empty_cache()

    def time_once(self, run: Run, ahead: bool = True) -> float:
        """Milliseconds of one call: CUDA events, or the clock.

        `ahead`: as in the middle of a step, where the device is busy while the host prepares the
        call. Otherwise what the host does before the first kernel counts too.
        """
        if not self.is_cuda:
            begin = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - begin)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if ahead:
            torch.cuda._sleep(SLEEP_CYCLES)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def turns(
        self,
        variants: Mapping[Name, Run],
        rounds: int = 7,
        budget_s: float = math.inf,
        slow: float = math.inf,
        warm: bool = True,
        ahead: bool = True,
    ) -> dict[Name, Time]:
        """Times of the variants, which take turns, so that a change of clocks hits all alike.

        Each runs once untimed before, unless `warm` is false because all have; there are at least
        two rounds, whatever the budget. Who then takes `slow` times as long as the first of them
        sits the rest out. `ahead`: as for `time_once`.
        """
        begin = time.monotonic()
        for run in variants.values() if warm else ():
            run()
            self.synchronize()
        times: dict[Name, list[float]] = {name: [] for name in variants}
        lead = next(iter(variants))
        for turn in range(rounds):
            if turn >= 2 and time.monotonic() - begin > budget_s:
                break
            for name, run in variants.items():
                if turn < 2 or min(times[name]) <= slow * min(times[lead]):
                    times[name].append(self.time_once(run, ahead))
        return {
            name: Time(statistics.median(found), min(found), len(found))
            for name, found in times.items()
        }

    def median_ms(self, run: Run, rounds: int = 7) -> float:
        """Of one variant alone."""
        return self.turns({"": run}, rounds)[""].median

    def peak_bytes(self, run: Run) -> int:
        """Most bytes that a call holds on top of what is there; it should have run before."""
        if not self.is_cuda:
            from tests.memory import peak_bytes

            return peak_bytes(run)
        self.free()
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    @contextlib.contextmanager
    def no_host_sync(self) -> Iterator[None]:
        """An operation that waits for the device raises in here."""
        if not self.is_cuda:
            yield
            return
        self.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def capture(self, run: Run) -> Run:
        """A graph of the call, as a function that replays it; the CPU runs the call itself."""
        if not self.is_cuda:
            return run
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # what is made once, such as handles of the GEMM library, cannot be made in a capture
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def mm(self, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        """left @ right into float32, accumulated in float32."""
        if left.dtype == out.dtype:
            return torch.mm(left, right, out=out)
        if self.is_cuda:
            return torch.ops.aten.mm.dtype_out(left, right, out.dtype, out=out)
        return torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)

    def addmm(self, out: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """out += left @ right in float32."""
        if left.dtype == out.dtype:
            return out.addmm_(left, right)
        if self.is_cuda:
            return torch.ops.aten.addmm.dtype_out(out, left, right, out.dtype, out=out)
        return out.addmm_(left.to(out.dtype), right.to(out.dtype))

    def bmm(self, left: Tensor, right: Tensor) -> Tensor:
        """Batched left @ right in float32, in fresh memory."""
        if self.is_cuda and left.dtype != torch.float32:
            return torch.bmm(left, right, out_dtype=torch.float32)
        return torch.bmm(left.float(), right.float())

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, torch.OutOfMemoryError)


def of(dry_run: bool) -> Device:
    """The CPU for a dry run, else the GPU.

    Raises:
        RuntimeError: there is no GPU.
    """
    if dry_run:
        return Device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError(
            "benchmarks/gpu.sh: expected a CUDA device, torch sees none; --dry-run needs none."
        )
    torch.backends.cuda.matmul.allow_tf32 = False
    return Device("cuda")
