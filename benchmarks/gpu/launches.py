# SPDX-License-Identifier: Apache-2.0
"""A few launches of the row kernel at its real size: what ncu watches."""

from __future__ import annotations

import argparse

from benchmarks.gpu import cases, device
from benchmarks.gpu.part_ours import logits_pairs, row_call


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", required=True)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    dev = device.of(options.dry_run)
    for name in cases.DIVERGENCES:
        for pair in logits_pairs(dev, cases.DRY if options.dry_run else cases.REAL, count=1):
            row_call(name, options.backend, *pair)()
    dev.synchronize()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
