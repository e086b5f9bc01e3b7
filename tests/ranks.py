# SPDX-License-Identifier: Apache-2.0
"""Processes of a group, for tests of vocabularies that are cut over ranks."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable

import torch.multiprocessing


def run_ranks(worker: Callable[[int, int, int], None], ranks: int) -> None:
    """worker(rank, ranks, port) in a process for each rank; fails where one fails.

    They are forked from a process that has imported torch, once for all tests of this one: that is
    most of what a rank costs.
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    imported = ["torch", "torch.distributed.tensor", "opd_kernels", "pytest"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(imported)
    torch.multiprocessing.start_processes(
        worker, (ranks, port), nprocs=ranks, start_method="forkserver"
    )
