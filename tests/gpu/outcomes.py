# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: a line for each test as it begins and ends, even of a run that is cut short."""

from __future__ import annotations


def name_of(nodeid: str) -> str:
    return nodeid.rpartition("/")[2]


def pytest_runtest_logstart(nodeid):
    """The line of a test that may never end."""
    print(f"\nbegun: {name_of(nodeid)}", flush=True)


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
    name = name_of(report.nodeid)
    words = " ".join(f"{detail} ({report.duration:.1f} s)".split())
    print(f"\noutcome: {report.outcome}\t{name}\t{words}", flush=True)
