# SPDX-License-Identifier: Apache-2.0
"""Every op alone in a process, first of all: what fails or hangs is known by its name.

Launches wait for their kernels, so that an error is that of its call. Whatever fails runs once more
as it is, since a machine's first start of torch may take longer than an op, and once more without
the kernel whose blocks wait for each other; if that alone helps, later parts do without it.
"""

from __future__ import annotations

import math
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from benchmarks.gpu import every_op
from benchmarks.gpu.context import CLUSTER, CLUSTER_SWITCH, Context, public
from benchmarks.gpu.results import Check

LIMIT_S = 18.0
AT_ONCE = 12


def words_of(output: str) -> str:
    """What a program said of its failure: the lines of the ops, else the last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    failures = [line for line in lines if line.startswith(every_op.FAILED)]
    return "; ".join(failures or lines[-1:])


def verdict(context: Context, command: Sequence[str], more: Mapping[str, str]) -> tuple[str, str]:
    """(outcome, detail) of one program, which may take LIMIT_S; a CPU may be busy elsewhere."""
    begin = time.monotonic()
    environment = {**os.environ, "CUDA_LAUNCH_BLOCKING": "1", **more}
    try:
        done = context.command(
            command, limit_s=math.inf if context.dry_run else LIMIT_S, env=environment
        )
    except subprocess.TimeoutExpired as late:
        said = words_of(late.output or "")
        return "failed", f"no end after {time.monotonic() - begin:.0f} s; {said}"
    if done.returncode == 0:
        return "passed", f"{time.monotonic() - begin:.1f} s"
    return "failed", f"exit code {done.returncode}; {words_of(done.stdout)}"


def verdicts(
    context: Context, commands: Mapping[str, Sequence[str]], more: Mapping[str, str], suffix: str
) -> list[str]:
    """Runs all, keeps a row for each, and returns the names of those that failed."""
    failed = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = {
            pool.submit(verdict, context, command, more): name for name, command in commands.items()
        }
        for future in as_completed(futures):
            name, (outcome, detail) = futures[future], future.result()
            context.row(Check(f"{name}{suffix}", outcome, public(detail)[:300]))
            if outcome != "passed":
                failed.append(name)
    return failed


def run(context: Context) -> None:
    words = "benchmarks.gpu.every_op", "--backend", context.lead
    ops = (every_op.REAL_SIZE, *every_op.OPS)
    # a dry run of the sanitizer calls all of them
    ops = ops[:2] if context.dry_run else ops
    commands = {op: context.python(*words, op) for op in ops}
    failed = verdicts(context, commands, {}, "")
    if not failed:
        return
    repeated = {name: commands[name] for name in failed}
    with ThreadPoolExecutor(2) as pool:
        again = pool.submit(verdicts, context, repeated, {}, ", again")
        without = pool.submit(
            verdicts, context, repeated, {CLUSTER_SWITCH: "0"}, f", without the {CLUSTER}"
        )
    failed = [name for name in failed if name in again.result()]
    if not failed:
        return
    cured = [name for name in failed if name not in without.result()]
    if cured:
        why = f"{', '.join(cured)} pass without it; later parts run so ({CLUSTER_SWITCH}=0)"
        context.row(Check(CLUSTER, "failed", why[:300]))
    raise RuntimeError(f"{len(failed)} of {len(commands)} programs failed: {', '.join(failed)}")
