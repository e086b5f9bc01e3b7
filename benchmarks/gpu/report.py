# SPDX-License-Identifier: Apache-2.0
"""The GPU half of docs/benchmarks.md: a section for each results file, which it names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu import results as schema
from benchmarks.gpu.context import CLUSTER, CLUSTER_SWITCH
from benchmarks.gpu.goals import OURS, TOLERANT, lead_of
from benchmarks.gpu.plots import draw
from benchmarks.gpu.results import (
    TO_JUDGE,
    Ceiling,
    Check,
    Counter,
    Kernel,
    Precision,
    RowKernel,
    Timing,
    rows_of,
)

NONE = "No GPU has run these kernels yet, so there is no GPU number here."

REPRODUCE = """### How to reproduce

    benchmarks/gpu.sh                # everything, in under nine minutes
    benchmarks/gpu.sh ours peers     # some parts; the others are kept if the commit is the same
    opd bench --report               # this page

Times are of CUDA events, medians of rounds in which the contestants take turns, after an untimed
call of each; inputs are random. The device sleeps for 2 ms before the first event, so that what the
host does before the first kernel counts for nobody, except in verification. The floor is the GEMMs
of the same chunks alone, 16-bit operands and float32 results, in the same turns. Peers run at their
own defaults (`benchmarks/gpu/contestants.py`); their wheels: `benchmarks/gpu_peers.md`.
"""


def files(directory: Path) -> list[Path]:
    """The results of GPUs in a directory, by name; files of other kinds and dry runs are not."""
    found = []
    for path in sorted(directory.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(content, dict) and "schema_version" in content and not content["dry_run"]:
            found.append(path)
    return found


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.0f} MiB"


def _parts(results: dict) -> str:
    rows = []
    for name in schema.PARTS:
        part = results["parts"].get(name)
        if part is None:
            rows.append([name, "not run", "", ""])
            continue
        checks = rows_of(results, name, Check)
        counts = {
            outcome: sum(check.outcome == outcome for check in checks)
            for outcome in ("passed", "failed", "error", TO_JUDGE, "skipped", "left out")
        }
        words = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
        rows.append([name, part["status"], f"{part['seconds']:.0f} s", words])
    return table(["part", "", "took", "checks"], rows)


def _goals(results: dict) -> str:
    rows = []
    for goal in results["goals"]:
        measured = "not measured" if goal["measured"] is None else f"{goal['measured']:.3f}"
        verdict = {True: "met", False: "**missed**", None: "open"}[goal["met"]]
        must = f"{goal['sense']} {goal['limit']:g}"
        rows.append([goal["goal"], must, measured, verdict, goal["note"]])
    return table(["goal", "must be", "measured, the worst", "", "where"], rows)


def _ours(results: dict) -> str:
    rows = [
        [
            row.case,
            row.divergence,
            row.head,
            row.contestant.removeprefix(f"{OURS} "),
            f"{row.ms:.2f}",
            f"{row.floor_ms:.2f}",
            f"{row.ratio_to_floor:.3f}",
            _mib(row.peak_bytes),
            "" if row.peak_bytes is None else f"{row.peak_bytes / row.allowed_bytes:.3f}",
        ]
        for row in rows_of(results, "ours", Timing)
        if row.contestant.startswith(OURS)
    ]
    header = ["case", "divergence", "head", "backend", "ms", "GEMMs, ms", "ratio"]
    return table([*header, "peak extra", "of workspace + gradients"], rows) if rows else ""


def _others_of_ours(results: dict) -> str:
    rows = [
        [row.case, ", ".join(filter(None, (row.contestant, row.divergence))), row.head,
         f"{row.ms:.2f}", f"{row.floor_ms:.2f}", f"{row.ratio_to_floor:.3f}"]
        for row in rows_of(results, "ours", Timing)
        if not row.contestant.startswith(OURS)
    ]  # fmt: skip
    return table(["case", "", "head", "ms", "GEMMs, ms", "ratio"], rows) if rows else ""


def _row_kernels(results: dict) -> str:
    rows = [
        [
            row.name,
            row.backend,
            f"{row.ms:.3f}",
            f"{row.gb_per_s:,.0f}",
            f"{100 * row.of_copy:.0f}%",
        ]
        for row in rows_of(results, "ours", RowKernel)
    ]
    return table(["kernel", "backend", "ms", "GB/s", "of a copy"], rows) if rows else ""


def _peers(results: dict) -> str:
    rows = [
        [
            row.case,
            row.divergence,
            row.head,
            row.contestant,
            f"{row.ms:.2f}",
            "" if row.ratio_ours is None else f"{row.ratio_ours:.2f}",
            f"{row.ratio_to_floor:.2f}",
            _mib(row.peak_bytes),
            row.note,
        ]
        for row in rows_of(results, "peers", Timing)
    ]
    header = ["case", "divergence", "head", "who", "ms", "over ours", "over the GEMMs"]
    return table([*header, "peak extra", ""], rows) if rows else ""


def _precision(results: dict) -> str:
    def ratio(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    rows = [
        [row.law, row.divergence, row.contestant, f"{row.grad_hidden:.2e}",
         f"{row.grad_weight:.2e}", ratio(row.of_eager), ratio(row.of_rounded)]
        for row in rows_of(results, "peers", Precision)
    ]  # fmt: skip
    header = ["laws", "divergence", "who", "dX", "dW"]
    header += ["the worse over eager's, widened operands", "over eager's, 16-bit logits"]
    return table(header, rows) if rows else ""


def _ceilings(results: dict) -> str:
    rows = [
        [row.name, row.shape, f"{row.ms:.3f}", f"{row.rate:,.0f} {row.unit}"]
        for row in rows_of(results, "ceilings", Ceiling)
    ]
    return table(["", "shape", "ms", "rate"], rows) if rows else ""


def _kernels(results: dict) -> str:
    kernels = rows_of(results, "build", Kernel)
    if not kernels:
        return ""
    spilling = [kernel for kernel in kernels if kernel.spill_bytes or kernel.stack_bytes]
    registers = [kernel.registers for kernel in kernels]
    words = f"{len(kernels)} kernels, {min(registers)} to {max(registers)} registers a thread; "
    words += f"{len(spilling)} with a stack frame or spills.\n"
    rows = [
        [f"`{kernel.kernel[:80]}`", str(kernel.registers), str(kernel.spill_bytes),
         str(kernel.stack_bytes)]
        for kernel in spilling
    ]  # fmt: skip
    return words + (
        "\n" + table(["kernel", "registers", "spill B", "stack B"], rows) if rows else ""
    )


def _counters(results: dict) -> str:
    rows = [
        [f"`{row.kernel[:60]}`", str(row.launch), row.metric, f"{row.value:,.1f} {row.unit}"]
        for row in rows_of(results, "ncu", Counter)
    ]
    return table(["kernel", "launch", "counter", ""], rows) if rows else ""


def _left_out(results: dict) -> str:
    lines = [
        f"* {name}: {check.name}: {check.outcome}. {check.detail}"
        for name in schema.PARTS
        for check in rows_of(results, name, Check)
        if check.outcome in ("left out", "error", "failed", TO_JUDGE)
    ]
    lines += [
        f"* {name}: {part['status']}. {part['reason'].splitlines()[0]}"
        for name, part in results["parts"].items()
        if part["reason"]
    ]
    return "\n".join(lines) + "\n" if lines else ""


_TABLES: tuple[tuple[str, str, Callable[[dict], str]], ...] = (
    ("Goals", "", _goals),
    ("How far are we from the bare GEMMs?", "Forward + backward.", _ours),
    (
        "Row kernels against a copy",
        "Float32 logits of a chunk; bytes as if each were read once and dZ written once.",
        _row_kernels,
    ),
    (
        "Small gradients left out, log-probabilities of tokens, sparse teachers, two vocabularies",
        f"`{TOLERANT}` on peaked laws (`benchmarks/laws.py`), over the dense GEMMs of the exact "
        "loss; `fused_linear_token_logprobs` over its four GEMMs; `fused_linear_topk_divergence` "
        "over its three, two with the head frozen; the losses of two vocabularies over their four, "
        "or over what a row names in place of the GEMMs.",
        _others_of_ours,
    ),
    ("How long do others take?", "The same inputs, in turns with ours.", _peers),
    (
        "How good are the gradients?",
        "Relative error against float64 in the Frobenius norm; bfloat16 inputs.",
        _precision,
    ),
    ("What the machine can do", "A copy, and the GEMMs of our chunks.", _ceilings),
    ("Registers and spills", "", _kernels),
    ("Hardware counters of the row kernel", "", _counters),
    ("Parts of the run", "", _parts),
    ("Left out, and why", "", _left_out),
)


def section(results: dict, path: Path, directory: Path) -> str:
    """One GPU's half of the page; writes its pictures into `directory`, beside the page."""
    machine, versions = results["machine"], results["versions"]
    source = f"`benchmarks/results/{path.name}`"
    dirty = {True: " with changes that were not committed", False: "", None: ""}[results["dirty"]]
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    clocks = machine.get("at_end") or machine.get("at_start") or {}
    read = ", ".join(f"{name} {value}" for name, value in clocks.items())
    lines = [
        f"## On a GPU: {machine['gpu']}\n",
        f"From {source}, {results['date']}, commit {results['commit']}{dirty}. {named}. "
        f"As read at the end, nothing was set: {read or 'nothing'}. Ours is `{lead_of(results)}` "
        "where no backend is named. T tokens, V vocabulary, Ds and Dt hidden sizes of student and "
        "teacher; bfloat16 inputs.\n",
    ]
    if any(
        row.name == CLUSTER and row.outcome == "failed" for row in rows_of(results, "smoke", Check)
    ):
        lines.append(f"Without the {CLUSTER} ({CLUSTER_SWITCH}=0): see the part smoke below.\n")
    for file, caption in draw(results, path.stem, directory):
        lines.append(f"![{caption}]({file})\n\n{caption} From {source}.\n")
    for heading, words, render in _TABLES:
        text = render(results)
        if text:
            lines.append(f"### {heading}\n\nFrom {source}. {words}".rstrip() + f"\n\n{text}")
    lines.append(REPRODUCE)
    return "\n".join(lines)
