# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: a line for each test as it begins and ends, even of a run that is cut short.

OPD_GPU_TESTS_DONE names a file of tests, one a line, that an earlier process has run.
"""

from __future__ import annotations

import os
from pathlib import Path


def _name(nodeid: str) -> str:
    return nodeid.rpartition("/")[2]


def pytest_collection_modifyitems(config, items):
    """Without those that ran; Triton's last, whose compiler takes most of the time."""
    path = os.environ.get("OPD_GPU_TESTS_DONE")
    done = set(Path(path).read_text(encoding="utf-8").splitlines()) if path else set()
    config.hook.pytest_deselected(items=[item for item in items if _name(item.nodeid) in done])
    items[:] = [item for item in items if _name(item.nodeid) not in done]
    items.sort(key=lambda item: "[triton" in item.nodeid or "-triton" in item.nodeid)


def pytest_runtest_logstart(nodeid):
    """The line of a test that may never end."""
    print(f"\nbegun: {_name(nodeid)}", flush=True)


def pytest_runtest_logreport(report):
    """One line per test: its outcome, name, and the last line of an error or the reason."""
    failed_elsewhere = report.when != "call" and report.failed
    skipped_before = report.when == "setup" and report.skipped
    if report.when != "call" and not failed_elsewhere and not skipped_before:
        return
    detail = ""
    if report.skipped:
        detail = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        detail = crash.message if crash is not None else str(report.longrepr)
    name = _name(report.nodeid)
    words = " ".join(f"{detail} ({report.duration:.1f} s)".split())
    print(f"\noutcome: {report.outcome}\t{name}\t{words}", flush=True)
