# SPDX-License-Identifier: Apache-2.0
"""Stamps results with machine and versions, and times nothing that is not right."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import pytest
import torch

import opd_kernels as opk
from benchmarks import harness, peers


def pytest_addoption(parser):
    """--rounds 1 shows in a few minutes that everything runs; its figures mean nothing."""
    parser.addoption("--rounds", type=int, default=harness.max_rounds, help="at most this many")


def pytest_configure(config):
    """Makes it known to the harness."""
    harness.max_rounds = config.getoption("--rounds")


def cpu_name() -> str:
    """Model name of the processor and the widest vector extension that the kernel reports."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    flags = fields.get("flags", "").split()
    widest = next((flag for flag in ("avx512f", "avx2") if flag in flags), "")
    return f"{fields.get('model name', platform.machine())} {widest}".strip()


def pytest_benchmark_update_machine_info(config, machine_info):
    """Replaces host details by what a reader needs."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    machine_info.clear()
    machine_info.update(
        cpu=cpu_name(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        opd_kernels=opk.__version__,
        peers=peers.installed(),
        commit=commit,
    )


@pytest.fixture(scope="session", autouse=True)
def correctness_gate():
    """A wrong kernel is not timed: each divergence against float64 on a small case."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(16, 24), torch.randn(997, 24)
    teacher_hidden, teacher_weight = torch.randn(16, 32), torch.randn(997, 32)
    arguments = (hidden, weight, teacher_hidden, teacher_weight)
    for name in opk.divergences.DIVERGENCES:
        labels = {"labels": torch.arange(16)} if name == "cross_entropy" else {}
        got, truth = (
            opk.fused_linear_divergence(
                *arguments, divergence=name, backend=backend, **labels
            ).loss.item()
            for backend in ("cpu", "reference")
        )
        if abs(got - truth) > 1e-5 * abs(truth):
            pytest.exit(f"correctness gate: {name} must be {truth}, got {got}", returncode=1)
    mine, truth = (
        opk.fused_linear_topk(*arguments[:2], num_topk=20, backend=backend)
        for backend in ("cpu", "reference")
    )
    off = max(
        float((one - two).abs().max()) for one, two in zip(mine[1:5], truth[1:5], strict=True)
    )
    if off > 1e-4:
        pytest.exit(f"correctness gate: fused_linear_topk is off by {off}", returncode=1)
