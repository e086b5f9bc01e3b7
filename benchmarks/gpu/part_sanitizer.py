# SPDX-License-Identifier: Apache-2.0
"""compute-sanitizer over every op of the C++ backend on small shapes."""

from __future__ import annotations

import os
import re
import subprocess
import time

from benchmarks.gpu.context import Context
from benchmarks.gpu.results import Check

# the two that are promised first
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)")
_FINDING = re.compile(r"=+ (?!COMPUTE-SANITIZER|Error: Target application)\S.*")
FOUND = 86
# our kernels alone: the sanitizer makes everything else slow, and the GEMMs are not ours
OUR_KERNELS = ("--kernel-name", "kernel_substring=opd")


def verdict(output: str, code: int) -> tuple[str, str]:
    """(outcome, detail) from what the sanitizer printed and its exit code."""
    summary = _SUMMARY.search(output)
    if summary is None:
        return "error", f"exit code {code} and no summary"
    findings = int(summary[1])
    if findings or code == FOUND:
        lines = [line for line in output.splitlines() if line.startswith("=========")]
        return "failed", f"{findings} findings; {' '.join(lines[1:4])[:200]}"
    return ("passed", "0 findings") if code == 0 else ("error", f"exit code {code}")


def unfinished(tool: str, output: str, seconds: float) -> Check:
    """Of a run that was ended: what it found by then counts."""
    ran = ", ".join(re.findall(r"^ran (\w+)$", output, re.M)) or "nothing"
    found = [line for line in output.splitlines() if _FINDING.match(line)]
    words = f"not done after {seconds:.0f} s, {ran} ran"
    if found:
        return Check(tool, "failed", f"{found[0][:120]}; {words}")
    return Check(tool, "left out", words)


def run(context: Context) -> None:
    backend = context.lead
    program = context.python("benchmarks.gpu.every_op", "--backend", backend)
    sanitizer = context.tool("compute-sanitizer")
    if sanitizer is None:
        done = context.command(program)
        if done.returncode != 0:
            raise RuntimeError(f"every_op failed with exit code {done.returncode}")
        context.left_out("sanitizer", "compute-sanitizer is not on PATH; the ops ran without it")
        return
    help_text = context.command([sanitizer, "--help"]).stdout
    filters = OUR_KERNELS if OUR_KERNELS[0] in help_text else ()
    # an allocation of its own for each tensor, so that one byte beyond it is seen
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for waiting, tool in zip(range(len(TOOLS), 0, -1), TOOLS, strict=True):
        if not context.has_time(tool, 1.0 if context.dry_run else 8.0):
            continue
        # torch asks the driver for what may fail and copes
        command = [sanitizer, "--tool", tool, "--report-api-errors", "no", *filters]
        command += ["--error-exitcode", str(FOUND), *program]
        begin = time.monotonic()
        try:
            # the first may take twice its share: what is left over goes to the next
            done = context.command(command, min(1.0, 2.0 / waiting), env=environment)
        except subprocess.TimeoutExpired as error:
            context.row(unfinished(tool, str(error.output), time.monotonic() - begin))
            continue
        outcome, detail = verdict(done.stdout, done.returncode)
        context.row(Check(tool, outcome, f"{detail}; {time.monotonic() - begin:.0f} s"))
