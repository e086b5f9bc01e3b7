# SPDX-License-Identifier: Apache-2.0
"""compute-sanitizer over every op of the C++ backend on small shapes, each op by itself.

Starting torch under it takes longer than the ops do, so many processes run at once.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

from benchmarks.gpu import every_op
from benchmarks.gpu.context import Context, public
from benchmarks.gpu.part_smoke import words_of
from benchmarks.gpu.results import TO_JUDGE, Check

# not initcheck: it knows of writes by the kernels that it instruments, so that what torch has
# written would count as read unwritten; the GPU tests run on memory full of NaN for that
TOOLS = ("memcheck", "racecheck", "synccheck")
AT_ONCE = 12
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)")
_KERNEL = re.compile(r"\bopd::(?:cuda::)?(?:\(anonymous namespace\)::|<unnamed>::)?(\w+)(?=[<(])")
_FINDING = re.compile(
    r"=+ (?!COMPUTE-SANITIZER|Error: Target application|.* SUMMARY: )\S.*|=+     +\S"
)
FOUND = 86
# our kernels alone: the sanitizer makes everything else slow, and the GEMMs are not ours
OUR_KERNELS = ("--kernel-name", "kernel_substring=opd")
# ordered by bulk copies and stores into other blocks, of which racecheck's knowledge is partial
ASYNCHRONOUS = "forward_grad_cluster_kernel"
UNSUPPORTED = "Device not supported"
# kernels that leave no register for what the sanitizer adds to them
NO_ROOM = "too many resources requested for launch"


def kernels_in(lines: list[str]) -> dict[str, int]:
    """Lines of findings by the kernel that they name."""
    # the first: what follows are the template arguments
    names = [found[1] for line in lines if (found := _KERNEL.search(line))]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def found(tool: str, output: str, words: str) -> tuple[str, str]:
    """(outcome, detail) of a run that found something."""
    lines = [line for line in output.splitlines() if _FINDING.match(line)]
    kernels = kernels_in(lines)
    named = ", ".join(f"{name} {count}x" for name, count in kernels.items())
    is_partial = tool == "racecheck" and set(kernels) == {ASYNCHRONOUS}
    detail = f"{words}; {named}; {' '.join(lines[:3])[:120]}"
    return (TO_JUDGE if is_partial else "failed"), detail


def unfinished(tool: str, output: str, seconds: float) -> tuple[str, str]:
    """The same of a run that was ended: what it found by then counts."""
    words = f"not done after {seconds:.0f} s"
    if any(_FINDING.match(line) for line in output.splitlines()):
        return found(tool, output, words)
    return "left out", f"{words}; {words_of(output)}"


def verdict(tool: str, output: str, code: int) -> tuple[str, str]:
    """(outcome, detail) from what the sanitizer and the op printed, and the exit code."""
    summary = _SUMMARY.search(output)
    failures = words_of(output) if every_op.FAILED in output else ""
    if UNSUPPORTED in output:
        return "left out", UNSUPPORTED
    if summary is None:
        return "error", f"exit code {code} and no summary; {words_of(output)}"
    if int(summary[1]) or code == FOUND:
        return found(tool, output, f"{summary[1]} findings")
    if code == 0:
        return "passed", "0 findings"
    if NO_ROOM in failures:
        return "left out", f"no finding, and a launch that fails under the sanitizer; {failures}"
    return "error", f"exit code {code}; {failures}"


def check(context: Context, command: list[str], tool: str, op: str) -> tuple[str, str]:
    """(outcome, detail) of an op under a tool."""
    environment = dict(os.environ)
    if tool == "memcheck":
        # an allocation of its own for each tensor, so that one byte beyond it is seen
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    begin = time.monotonic()
    if context.seconds_left() < (1.0 if context.dry_run else 8.0):
        return "left out", "no time was left in the budget of this part"
    # torch asks the driver for what may fail and copes
    command = [command[0], "--tool", tool, "--report-api-errors", "no", *command[1:], op]
    try:
        done = context.command(command, env=environment)
    except subprocess.TimeoutExpired as late:
        return unfinished(tool, late.output or "", time.monotonic() - begin)
    outcome, detail = verdict(tool, done.stdout, done.returncode)
    return outcome, f"{detail}; {time.monotonic() - begin:.0f} s"


def run(context: Context) -> None:
    program = context.python("benchmarks.gpu.every_op", "--backend", context.lead)
    sanitizer = context.tool("compute-sanitizer")
    if sanitizer is None:
        done = context.command(program)
        if done.returncode != 0:
            raise RuntimeError(f"every_op failed; {words_of(done.stdout)}")
        context.left_out("sanitizer", "compute-sanitizer is not on PATH; the ops ran without it")
        return
    help_text = context.command([sanitizer, "--help"]).stdout
    filters = OUR_KERNELS if OUR_KERNELS[0] in help_text else ()
    command = [sanitizer, *filters, "--error-exitcode", str(FOUND), *program]
    # the first two tools side by side, an op after the other
    order = [(tool, op) for op in every_op.OPS for tool in TOOLS[:2]]
    order += [(tool, op) for tool in TOOLS[2:] for op in every_op.OPS]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = {pool.submit(check, context, command, *pair): pair for pair in order}
        for future in as_completed(futures):
            outcome, detail = future.result()
            context.row(Check(" ".join(futures[future]), outcome, public(detail)[:300]))
