# SPDX-License-Identifier: Apache-2.0
"""One part in a process of its own; its rows go out as JSON lines as soon as they exist."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback

from benchmarks.gpu.context import DEVICE_LOST, Context, DeviceLost, is_lost
from benchmarks.gpu.results import PARTS


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only-peers", default="")
    parser.add_argument("--done", type=json.loads, default=[], help="a list of cases")
    options = parser.parse_args()
    with os.fdopen(options.fd, "w", encoding="utf-8") as stream:
        # a part may have threads
        lock = threading.Lock()

        def emit(row: dict) -> None:
            with lock:
                stream.write(json.dumps(row, allow_nan=False) + "\n")
                stream.flush()

        context = Context(
            options.dry_run,
            emit,
            time.monotonic() + options.seconds,
            [name for name in options.only_peers.split(",") if name],
            done=frozenset(options.done),
            tell=emit,
        )

        def stop(*_: object) -> None:
            # they are in process groups of their own, which whoever ends this one does not know
            context.end_programs()
            os._exit(128 + signal.SIGTERM)

        signal.signal(signal.SIGTERM, stop)
        try:
            importlib.import_module(f"benchmarks.gpu.part_{options.part}").run(context)
        except Exception as error:
            if not isinstance(error, DeviceLost) and not is_lost(error):
                raise
            traceback.print_exception(error)
            sys.stderr.flush()
            # at a usual end destructors would call the device once more
            os._exit(DEVICE_LOST)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
