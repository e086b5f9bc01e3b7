# SPDX-License-Identifier: Apache-2.0
"""Calls in the background."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from opd.clients import daemons


def test_results_and_errors_in_the_order_of_the_calls():
    futures = daemons.start([lambda: 1, lambda: 1 // 0, lambda: 3], num_threads=2)
    assert futures[0].result(5) == 1 and futures[2].result(5) == 3
    with pytest.raises(ZeroDivisionError):
        futures[1].result(5)
    assert daemons.start([]) == []


def test_so_many_at_a_time_and_what_is_cancelled_does_not_run():
    go, begun = threading.Event(), []

    def call(number):
        begun.append(number)
        return go.wait(5)

    futures = daemons.start([lambda n=n: call(n) for n in range(4)], num_threads=2)
    assert futures[2].cancel()
    go.set()
    assert futures[3].result(5) and sorted(begun) == [0, 1, 3]


def test_the_process_does_not_wait_for_them():
    code = "import time; from opd.clients import daemons; daemons.start([lambda: time.sleep(60)])"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
