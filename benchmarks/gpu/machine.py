# SPDX-License-Identifier: Apache-2.0
"""What a run says of itself: GPU, driver and clocks as read, versions, commit. Nothing is set."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence

from benchmarks.gpu.context import CLUSTER_SWITCH, ROOT, find_tool

_QUERY = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "max_sm_clock_mhz": "clocks.max.sm",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}
# of peers and of what they import, which may be there for one part and not for another
PEERS = ("liger-kernel", "trl", "orda-kernel", "fla-core", "transformers")
PACKAGES = ("torch", "triton", *PEERS)


def output_of(command: Sequence[str]) -> str:
    """What a program prints; nothing if it cannot run."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def state() -> dict[str, object]:
    """Driver and clocks at this moment."""
    return dict(zip(_QUERY, asked(*_QUERY.values()), strict=False))


def asked(*fields: str) -> list[str]:
    """What nvidia-smi says of the first GPU; nothing where there is neither.

    Importing torch for it takes up to a minute on a fresh machine, in which the build could run.
    """
    words = [f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    lines = output_of(["nvidia-smi", *words]).splitlines()
    return lines[0].split(", ") if lines else []


def describe(dry_run: bool) -> dict[str, object]:
    """The machine."""
    found: dict[str, object] = {"gpu": "none (dry run)"}
    if not dry_run:
        said = asked("name", "compute_cap", "memory.total")
        # an old driver has no word for the capability
        is_whole = len(said) == 3 and re.fullmatch(r"\d+\.\d+ \d+", " ".join(said[1:]))
        name, capability, mib = said if is_whole else _asked_of_torch()
        found |= {
            "gpu": name,
            "capability": capability,
            "memory_bytes": int(mib) << 20,
            "at_start": state(),
        }
    return found | {"cores": os.cpu_count(), "platform": platform.machine()}


def _asked_of_torch() -> list[str]:
    import torch

    properties = torch.cuda.get_device_properties(0)
    capability = f"{properties.major}.{properties.minor}"
    return [properties.name, capability, str(properties.total_memory >> 20)]


def versions() -> dict[str, str]:
    """Of everything that a figure depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    # a run that somebody keeps from a kernel is another run
    if CLUSTER_SWITCH in os.environ:
        found[CLUSTER_SWITCH] = os.environ[CLUSTER_SWITCH]
    release = re.search(r"release ([\d.]+)", output_of([find_tool("nvcc") or "nvcc", "--version"]))
    if release:
        found["nvcc"] = release[1]
    text = (ROOT / "opd_kernels" / "__init__.py").read_text(encoding="utf-8")
    found["opd_kernels"] = re.search(r'__version__ = "([^"]+)"', text)[1]
    return found


def agree(some: Mapping[str, str], others: Mapping[str, str]) -> bool:
    """Whether figures of both may lie in one file: equal versions, of peers where both have one."""
    names = some.keys() | others.keys()
    either = {name for name in names if name in PEERS and not (name in some and name in others)}
    return all(some.get(name) == others.get(name) for name in names - either)


def commit(given: str | None) -> tuple[str, bool | None]:
    """(commit, whether the tree differs from it); `--commit HASH[+dirty]` says it without git."""
    if given:
        name, _, flag = given.partition("+")
        return name, flag == "dirty"
    head = output_of(["git", "rev-parse", "--short=12", "HEAD"])
    if not head:
        return "unknown", None
    changed = output_of(["git", "status", "--porcelain", "--untracked-files=no"])
    return head, bool(changed)


def now() -> str:
    """UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def file_name(gpu: str) -> str:
    """`h200.json` for 'NVIDIA H200'."""
    words = re.sub(r"[^a-z0-9]+", "_", gpu.lower().replace("nvidia", "")).strip("_")
    return f"{words or 'gpu'}.json"


def has_gpu() -> bool:
    """Whether there is a CUDA device, asked without making a context in this process."""
    if asked("name"):
        return True
    import torch

    return torch.cuda.is_available()
