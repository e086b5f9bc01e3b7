# SPDX-License-Identifier: Apache-2.0
"""Turns a pytest-benchmark run into benchmarks/results/cpu.json and docs/benchmarks.md.

Ratios and bytes are kept, absolute times are not: on a shared machine they mean nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
PAGE = ROOT / "docs" / "benchmarks.md"

HEADER = """# Benchmarks

Written by `make bench` from `benchmarks/results/cpu.json`; do not edit. No GPU has run these
kernels yet, so there is no GPU number here.

Machine: {cpu}, {threads} threads; torch {torch}, Python {python}, commit {commit}.

Every figure is a ratio of best times within one run, in which the variants took turns; the divisor
is the *floor* of the group: the float32 GEMMs that the loss cannot do without, as plain torch.mm
calls, or one copy of the logits. In brackets the ratio of medians. On a shared virtual machine such
as this the same figure moves by a fifth between runs, and a best time may fall below its own floor.
{note}
"""


def condense(run: dict) -> dict:
    """The parts of a run that mean something elsewhere."""
    rows = [
        {"group": bench["group"], "name": bench["name"], **bench["extra_info"]}
        for bench in run["benchmarks"]
    ]
    return {"machine": run["machine_info"], "benchmarks": rows}


def page(results: dict) -> str:
    """The Markdown page."""
    lines = [HEADER.format(note=results.get("note", ""), **results["machine"])]
    groups: dict[str, list[dict]] = {}
    for row in results["benchmarks"]:
        groups.setdefault(row["group"], []).append(row)
    for group, rows in groups.items():
        lines.append(f"## {group}\n")
        if "ratio_to_floor" in rows[0]:
            variants = list(dict.fromkeys(v for row in rows for v in row["ratio_to_floor"]))
            lines.append("| | " + " | ".join(variants) + " |")
            lines.append("|---" * (len(variants) + 1) + "|")
            for row in rows:
                cells = []
                for variant in variants:
                    best = row["ratio_to_floor"].get(variant)
                    median = row["ratio_to_floor_medians"].get(variant)
                    cells.append("" if best is None else f"{best:.2f} ({median:.2f})")
                lines.append(f"| `{row['name']}` | " + " | ".join(cells) + " |")
        else:
            lines.append("| | workspace_bytes | gradients | peak extra | of the first two |")
            lines.append("|---|---|---|---|---|")
            for row in rows:
                budget = row["workspace_bytes"] + row["gradient_bytes"]
                sizes = (row["workspace_bytes"], row["gradient_bytes"], row["peak_extra_bytes"])
                cells = " | ".join(f"{size / 2**20:.1f} MiB" for size in sizes)
                share = row["peak_extra_bytes"] / budget
                lines.append(f"| `{row['name']}` | {cells} | {100 * share:.1f}% |")
        lines.append("")
    return "\n".join(lines)


def main(path: str) -> None:
    """Reads the JSON that `pytest --benchmark-json` wrote, and writes the two files."""
    results = condense(json.loads(Path(path).read_text()))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main(sys.argv[1])
