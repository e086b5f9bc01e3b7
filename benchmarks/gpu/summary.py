# SPDX-License-Identifier: Apache-2.0
"""A run in few lines, for a terminal that keeps only the last of them."""

from __future__ import annotations

from benchmarks.gpu.results import PARTS


def of_part(name: str, part: dict) -> str:
    """How it ended and its most telling rows."""
    lines = [f"   {name}: {part['status']} after {part['seconds']:.1f} s, {_rows(part['rows'])}"]
    if part["reason"]:
        lines.append(f"   {part['reason'].splitlines()[0]}")
    lines += [f"   {line}" for row in part["rows"] if (line := _line(row))]
    return "\n".join(lines)


def _rows(rows: list[dict]) -> str:
    return f"{len(rows)} row{'' if len(rows) == 1 else 's'}"


def _line(row: dict) -> str:
    """One row; "" for what only the file should have."""
    match row["kind"]:
        case "Timing":
            peak = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 2**20:.0f} MiB"
            versus = "" if row["ratio_ours"] is None else f", {row['ratio_ours']:.2f}x ours"
            return (
                f"{row['case']} {row['divergence']} {row['head']}: {row['contestant']} "
                f"{row['ms']:.2f} ms, {row['ratio_to_floor']:.3f} of its floor{versus}{peak}"
            )
        case "Ceiling":
            return f"{row['name']} ({row['shape']}): {row['rate']:.0f} {row['unit']}"
        case "RowKernel":
            return (
                f"{row['name']}, {row['backend']}: {row['gb_per_s']:.0f} GB/s, "
                f"{100 * row['of_copy']:.0f}% of a copy"
            )
        case "Precision" if row["contestant"].startswith(("opd_kernels", "eager")):
            return (
                f"error of {row['contestant']}, {row['divergence']}, {row['law']}: dX "
                f"{row['grad_hidden']:.1e}, dW {row['grad_weight']:.1e}"
            )
        case "Check" if row["outcome"] != "passed":
            return f"{row['outcome']}: {row['name']} {row['detail'][:160]}"
        case "Kernel" if row["spill_bytes"] or row["stack_bytes"]:
            return f"spills {row['spill_bytes']} B, stack {row['stack_bytes']} B: {row['kernel']}"
    return ""


def of_run(results: dict, seconds: float) -> str:
    """Parts and goals."""
    lines = [f"== {results['machine']['gpu']}, commit {results['commit']}, {seconds:.0f} s in all"]
    for name in PARTS:
        if name in results["parts"]:
            part = results["parts"][name]
            lines.append(f"   {name:10} {part['status']:10} {part['seconds']:6.1f} s")
    for goal in results["goals"]:
        verdict = {True: "met", False: "MISSED", None: "open"}[goal["met"]]
        measured = "not measured" if goal["measured"] is None else f"{goal['measured']:.3f}"
        lines.append(
            f"   {verdict:6} {goal['goal']}: {measured}, {goal['sense']} {goal['limit']:g}"
            + (f" ({goal['note'][:90]})" if goal["note"] else "")
        )
    return "\n".join(lines)
