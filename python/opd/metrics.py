# SPDX-License-Identifier: Apache-2.0
"""From tensors on the way to numbers in metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from opd.batch import Signal, Trajectory


class Clock:
    """Seconds by phase since the last `flush`; on a GPU a phase ends when its kernels have."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the body."""
        start = time.perf_counter()
        is_cuda = self._device.type == "cuda"
        with _named_range(f"opd::train::{phase}", is_cuda):
            yield
            if is_cuda:
                torch.cuda.synchronize(self._device)
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    def flush(self) -> dict[str, float]:
        """The seconds, and start over."""
        seconds, self._seconds = self._seconds, {}
        return seconds


def _named_range(name: str, is_cuda: bool) -> AbstractContextManager:
    """What `opd profile` shows a phase under; next to nothing when no profiler runs."""
    if torch.autograd._profiler_enabled():
        return torch.profiler.record_function(name)
    return torch.cuda.nvtx.range(name) if is_cuda else nullcontext()


class Meter:
    """Means since the last `flush`: per row of a statistic (a trained token, or what the objective
    compares in its place, a chunk say), per step for the rest."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor | float] = {}
        self._counts: dict[str, int] = {}
        self._extremes: dict[str, float] = {}

    def add_signals(self, signals: Sequence[Signal]) -> None:
        """The losses of one step's batches, which sum to the step's, and their statistics."""
        self._add("loss", sum(signal.loss.detach() for signal in signals), 1)
        for signal in signals:
            for name, values in signal.statistics.items():
                self._add(name, values.sum(), len(values))

    def add_trajectories(self, trajectories: Sequence[Trajectory], step: int) -> None:
        """Lengths, how many were cut, and who wrote them."""
        lengths = [trajectory.completion_length for trajectory in trajectories]
        count = len(trajectories)
        self._add("completions/mean_length", sum(lengths), count)
        clipped = sum(not trajectory.is_terminated for trajectory in trajectories)
        self._add("completions/clipped_ratio", clipped, count)
        # of each completion the share of its tokens: two models may have written it
        on_policy = sum(
            t.num_written("student") / max(1, t.completion_length)
            for t in trajectories
            if t.step == step
        )
        self._add("completions/on_policy_ratio", on_policy, count)
        for name, value, pick in (("min", min(lengths), min), ("max", max(lengths), max)):
            key = f"completions/{name}_length"
            self._extremes[key] = pick(self._extremes.get(key, value), value)

    def add(self, values: dict[str, float]) -> None:
        """Numbers of one step."""
        for name, value in values.items():
            self._add(name, value, 1)

    def flush(self) -> dict[str, float]:
        """The means, and start over."""
        means = {n: float(total) / max(1, self._counts[n]) for n, total in self._sums.items()}
        means.update(self._extremes)
        self._sums, self._counts, self._extremes = {}, {}, {}
        return means

    def _add(self, name: str, total: torch.Tensor | float, count: int) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + total
        self._counts[name] = self._counts.get(name, 0) + count


class MetricsWriter:
    """metrics.jsonl, one line a step, and TensorBoard events.

    Args:
        output_dir: of the run.
        report_to: which of `jsonl` and `tensorboard` to write.
        step: of the checkpoint a run goes on from; what was written after it is taken back.
    """

    def __init__(self, output_dir: Path, report_to: Sequence[str], *, step: int = 0) -> None:
        self._file = None
        self._board = None
        if "jsonl" in report_to:
            for name in ("metrics.jsonl", "samples.jsonl"):
                truncate_jsonl(output_dir / name, step)
            self._file = (output_dir / "metrics.jsonl").open("a", encoding="utf-8")
            self._samples = output_dir / "samples.jsonl"
        if "tensorboard" in report_to:
            from torch.utils.tensorboard import SummaryWriter

            # at step 0 all that a killed run may have left goes
            purge_step = step + 1 if step else 0
            self._board = SummaryWriter(str(output_dir / "tensorboard"), purge_step=purge_step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append the numbers of a step."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def write_samples(self, step: int, samples: Sequence[dict[str, Any]]) -> None:
        """Append completions with their verdicts."""
        if self._file is not None:
            with self._samples.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, **sample}) + "\n" for sample in samples)

    def close(self) -> None:
        """Flush and close."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file that may have been cut while being written."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def last_evaluation(output_dir: Path) -> dict[str, float]:
    """The numbers of the latest evaluation in metrics.jsonl."""
    for row in reversed(read_jsonl(output_dir / "metrics.jsonl")):
        found = {name: value for name, value in row.items() if name.startswith("eval/")}
        if found:
            return found
    return {}


def truncate_jsonl(path: Path, step: int) -> None:
    """Keep the lines up to a step. At step 0 nothing has been written that should stay."""
    if not path.is_file():
        return
    rows = [row for row in read_jsonl(path) if step > 0 and row["step"] <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Peak bytes of the process, and of the GPU's allocator."""
    # Linux counts ru_maxrss in kilobytes, macOS in bytes
    unit = 1 if sys.platform == "darwin" else 1024
    values = {"mem/peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        values["mem/peak_alloc_bytes"] = torch.cuda.max_memory_allocated(device)
        values["mem/peak_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    return {name: float(value) for name, value in values.items()}
