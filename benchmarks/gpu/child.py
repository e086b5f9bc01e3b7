# SPDX-License-Identifier: Apache-2.0
"""One part in a process of its own; its rows go out as JSON lines as soon as they exist."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import time

from benchmarks.gpu.context import Context
from benchmarks.gpu.results import PARTS


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only-peers", default="")
    parser.add_argument("--begun", default="[]", help="a JSON list of cases not to run again")
    options = parser.parse_args()
    with os.fdopen(options.fd, "w", encoding="utf-8") as stream:

        def emit(row: dict) -> None:
            stream.write(json.dumps(row, allow_nan=False) + "\n")
            stream.flush()

        context = Context(
            options.dry_run,
            emit,
            time.monotonic() + options.seconds,
            [name for name in options.only_peers.split(",") if name],
            begun=json.loads(options.begun),
            begins=lambda name: emit({"begun": name}),
        )

        def stop(*_: object) -> None:
            # they are in process groups of their own, which whoever ends this one does not know
            context.end_programs()
            os._exit(128 + signal.SIGTERM)

        signal.signal(signal.SIGTERM, stop)
        importlib.import_module(f"benchmarks.gpu.part_{options.part}").run(context)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
