# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: some of the GPU tests, in a process beside those of the others.

What is large waits for what is large elsewhere, what was cached is given back, and a lost device
ends the process, which would fail every later test with the words of the first.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.gpu.context import DEVICE_LOST, is_lost
from tests.gpu.outcomes import name_of

VARIABLE = "OPD_GPU_TESTS"
WAITING = "waiting"
# tests of these words in their names take most of a GPU's memory
LARGE = ("beyond_32_bit", "real_size")
KEPT_BYTES = 4 << 30


def chosen(names: list[str], are_triton: list[bool], group: dict) -> list[bool]:
    """Of all tests those of a group that are not done: `of` 0 has all of them, `index` -1 those
    that are not Triton's, and 0 ... `of` - 1 a share of Triton's each.

    Triton's are dealt in turns: neighbours compile alike, and as long.
    """
    found, seen = [], 0
    for name, is_triton in zip(names, are_triton, strict=True):
        if group["of"] == 0:
            mine = True
        elif is_triton:
            mine = seen % group["of"] == group["index"]
            seen += 1
        else:
            mine = group["index"] < 0
        found.append(mine and name not in group["done"])
    return found


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    names = [name_of(item.nodeid) for item in items]
    are_triton = [
        getattr(getattr(item, "callspec", None), "params", {}).get("backend") == "triton"
        for item in items
    ]
    kept = chosen(names, are_triton, json.loads(os.environ[VARIABLE]))
    config.hook.pytest_deselected(
        items=[item for item, mine in zip(items, kept, strict=True) if not mine]
    )
    items[:] = [item for item, mine in zip(items, kept, strict=True) if mine]


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Holds a lock that ends with the process, whatever ends that."""
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                print(f"\n{WAITING}", flush=True)
                time.sleep(0.5)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    is_large = any(word in item.name for word in LARGE)
    lock = Path(json.loads(os.environ[VARIABLE])["lock"])
    with alone(lock) if is_large else contextlib.nullcontext():
        try:
            return (yield)
        finally:
            give_back()


def give_back() -> None:
    """What the allocator keeps: the other processes have none of it."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized() and torch.cuda.memory_reserved() > KEPT_BYTES:
        gc.collect()
        torch.cuda.empty_cache()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # after the plugin that prints the outcome
    if report.failed and is_lost(RuntimeError(report.longreprtext)):
        sys.stdout.flush()
        os._exit(DEVICE_LOST)
