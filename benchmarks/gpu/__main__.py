# SPDX-License-Identifier: Apache-2.0
"""Runs the named parts one after the other within a budget; the JSON is whole after every row."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import machine, results, summary
from benchmarks.gpu.context import (
    CLUSTER,
    CLUSTER_SWITCH,
    DEVICE_LOST,
    GRACE_S,
    ROOT,
    public,
    tell_group,
)
from benchmarks.gpu.goals import goals_of
from benchmarks.gpu.progress import Progress
from benchmarks.gpu.results import Check

BUDGET_S = 530.0
# seconds of the whole that each part may take when all run; what one leaves goes to the next ones
SHARES = {
    "build": 100,
    "smoke": 40,
    "tests": 90,
    "sanitizer": 70,
    "ceilings": 25,
    "ours": 90,
    "peers": 80,
    "ncu": 35,
}
# a part stops taking new cases after this share of its time, and is ended after all of it
SOFT = 0.85
LEAST_S = 3.0
# of its share: nothing of ours runs on a card without the build
MOST_SHARES = {"build": 2.0}


class Stopped(Exception):
    """The run was asked to end."""


def budget_of(part: str, waiting: Sequence[str], left_s: float) -> float:
    """Seconds for a part: its share of what is left for it and those that wait behind it."""
    share = SHARES[part] / sum(SHARES[name] for name in (part, *waiting))
    return left_s * min(1.0, share * MOST_SHARES.get(part, 1.0))


def tail(path: Path, lines: int = 12) -> str:
    """The last words of a log, without this machine's directories."""
    with contextlib.suppress(OSError):
        text = path.read_text(encoding="utf-8", errors="replace")
        return public("\n".join(text.strip().splitlines()[-lines:]))[-1500:]
    return ""


def end(process: subprocess.Popen) -> None:
    """A part and its children; the first signal lets it end what it has started elsewhere."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        tell_group(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_S)
    process.wait()


def switches_of(found: dict) -> dict[str, str]:
    """What the part `smoke` of this run, or of an earlier one that it adds to, turned off."""
    checks = results.rows_of(found, "smoke", Check)
    is_off = any(check.name == CLUSTER and check.outcome == "failed" for check in checks)
    return {CLUSTER_SWITCH: "0"} if is_off else {}


def is_loss(code: int) -> bool:
    """Whether an exit code is that of a process that a case took down."""
    return code == DEVICE_LOST or code < 0


class Run:
    """One file of results, kept whole on disk from the first moment."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        # rows come in on a thread of their own
        self.lock = threading.RLock()
        self.out = Path(options.out).resolve()
        described = machine.describe(options.dry_run)
        name = "dry_run.json" if options.dry_run else machine.file_name(str(described["gpu"]))
        self.path = self.out / name
        self.log = self.out / "gpu.log"
        commit, dirty = machine.commit(options.commit)
        self.results = {
            "schema_version": results.SCHEMA_VERSION,
            "dry_run": options.dry_run,
            "date": machine.now(),
            "commit": commit,
            "dirty": dirty,
            "machine": described,
            "versions": machine.versions(),
            "parts": {},
            "goals": [],
        }
        self._keep_earlier_parts()
        self.out.mkdir(parents=True, exist_ok=True)
        self.log.write_text("", encoding="utf-8")
        self.save()

    def _keep_earlier_parts(self) -> None:
        """Those of an earlier run of the same commit on the same kind of GPU; ratios are within."""
        if not self.path.exists():
            return
        try:
            earlier = results.load(self.path)
        except results.SchemaError as error:
            self._put_aside(str(error))
            return
        mine = self.results
        same = all(earlier[key] == mine[key] for key in ("commit", "dirty"))
        same = same and machine.agree(earlier["versions"], mine["versions"])
        # two trees without a commit's name may be two different ones
        is_known = mine["dirty"] is False
        if same and is_known and earlier["machine"]["gpu"] == mine["machine"]["gpu"]:
            mine["versions"] = earlier["versions"] | mine["versions"]
            mine["parts"] = {
                name: part
                for name, part in earlier["parts"].items()
                if name not in self.options.parts
            }
        else:
            why = "is of another commit, version or machine"
            if not is_known:
                why = "is of a tree without a commit of its own (--commit names one)"
            self._put_aside(f"{self.path.name} {why}")

    def _put_aside(self, why: str) -> None:
        """An earlier file, which this run does not add to: it may have what nobody has again."""
        kept = self.path.with_suffix(".json.old")
        os.replace(self.path, kept)
        print(f"{why}; it is now {kept.name}", file=sys.stderr)

    def save(self) -> None:
        with self.lock:
            self.results["goals"] = goals_of(self.results)
            results.check(self.results)
            results.save(self.results, self.path)

    def part(self, name: str, budget_s: float) -> None:
        """One part in a process group of its own, ended when its time is over."""
        part = results.Part("running", 0.0, round(budget_s, 1), "", [])
        kept = {**vars(part)}
        with self.lock:
            self.results["parts"][name] = kept
        self.save()
        print(f"== {name} (at most {budget_s:.0f} s)", flush=True)
        begin = time.monotonic()
        if budget_s < LEAST_S:
            kept |= {"status": "skipped", "reason": "no time was left in the budget"}
            self.save()
            return
        try:
            ended = self._run(name, budget_s, kept["rows"])
            with self.lock:
                kept |= ended
        except Stopped as stop:
            with self.lock:
                kept |= {"status": "stopped", "reason": str(stop)}
            raise
        finally:
            state = {} if self.options.dry_run else {"at_end": machine.state()}
            with self.lock:
                kept["seconds"] = round(time.monotonic() - begin, 1)
                self.results["machine"] |= state
            self.save()
            print(summary.of_part(name, kept), flush=True)

    def _run(self, name: str, budget_s: float, rows: list[dict]) -> dict[str, str]:
        """One process after another, each without the cases that the earlier ones have had."""
        begin = time.monotonic()
        progress = Progress()
        taken: list[str] = []
        while True:
            left_s = budget_s - (time.monotonic() - begin)
            soft_s = SOFT * budget_s - (time.monotonic() - begin)
            code, why = self._process(name, (soft_s, left_s), rows, progress)
            lost = progress.lose()
            is_over = code is None and not why
            if lost is None or is_over or (code is not None and not is_loss(code)):
                break
            if code != DEVICE_LOST:
                why = why or f"ended by signal {-code}"
                self._keep(
                    rows, results.row_of(Check(lost, "error", f"{why}: {tail(self.log, 4)}"[:300]))
                )
            taken.append(lost)
            if SOFT * budget_s - (time.monotonic() - begin) < LEAST_S:
                break
        said = f"{len(taken)} cases took their process down: {', '.join(taken)}" if taken else ""
        if is_over:
            reason = "; ".join(filter(None, (f"ended after {budget_s:.0f} s", said)))
            return {"status": "timed out", "reason": reason}
        if taken and (code == 0 or lost is not None):
            return {"status": "failed", "reason": said}
        if code == 0:
            return {"status": "passed", "reason": ""}
        reason = "; ".join(filter(None, (said, f"exit code {code}: {tail(self.log)}")))
        return {"status": "failed", "reason": reason}

    def _process(
        self, name: str, seconds: tuple[float, float], rows: list[dict], progress: Progress
    ) -> tuple[int | None, str]:
        """(exit code, ""), or (None, why it was ended, "" for the end of the part's time)."""
        soft_s, left_s = seconds
        read_fd, write_fd = os.pipe()
        command = [sys.executable, "-m", "benchmarks.gpu.child", name, "--fd", str(write_fd)]
        command += ["--seconds", f"{soft_s:.1f}", "--done", json.dumps(sorted(progress.done))]
        command += ["--dry-run"] if self.options.dry_run else []
        command += ["--only-peers", self.options.only_peers] if self.options.only_peers else []
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n==== {name}\n")
            log.flush()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self._environment(),
                pass_fds=[write_fd],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        os.close(write_fd)
        reader = threading.Thread(target=self._read, args=(read_fd, rows, progress), daemon=True)
        reader.start()
        end_at = time.monotonic() + left_s
        code, why = None, ""
        try:
            while code is None and time.monotonic() < end_at:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=min(1.0, max(0.0, end_at - time.monotonic())))
                if code is None and progress.is_stuck():
                    why = f"no word for {time.monotonic() - progress.heard:.0f} s"
                    break
        finally:
            end(process)
            reader.join(timeout=30)
        return code, why

    def _environment(self) -> dict[str, str]:
        environment = {**os.environ, **switches_of(self.results)}
        if self.options.dry_run:
            # threads that wait for each other take most of the time at tiny sizes
            environment["OMP_NUM_THREADS"] = "1"
        return environment

    def _read(self, read_fd: int, rows: list[dict], progress: Progress) -> None:
        with os.fdopen(read_fd, encoding="utf-8") as stream:
            for line in stream:
                # a killed part may leave half a line
                with contextlib.suppress(ValueError):
                    row = json.loads(line)
                    if not progress.hear(row):
                        results.check_row(row)
                        self._keep(rows, row)

    def _keep(self, rows: list[dict], row: dict) -> None:
        with self.lock:
            # a process that goes on after another says again what it finds missing
            if row["kind"] != "Check" or row not in rows:
                rows.append(row)
                self._save_or_say()

    def _save_or_say(self) -> None:
        """A full disk costs a save, not the rows that are still to come."""
        try:
            self.save()
        except OSError as error:
            print(f"{self.path.name} could not be saved: {error}", file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh", description="All that needs a GPU, in one short run."
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {' '.join(results.PARTS)}")
    parser.add_argument("--out", help="default: benchmarks/results, build/gpu for a dry run")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds, default 530")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--commit", help="HASH or HASH+dirty, where there is no git")
    parser.add_argument(
        "--only-peers", default="", help="of liger,trl,orda,fla,flashinfer; default: all"
    )
    options = parser.parse_args(arguments)
    for name in options.parts:
        if name not in results.PARTS:
            parser.error(f"no part is called {name!r}; there are {', '.join(results.PARTS)}")
    if options.budget <= 0:
        parser.error(f"--budget must be positive, got {options.budget:g}")
    # in the order that makes sense, whatever the order of the words
    options.parts = [name for name in results.PARTS if name in (options.parts or results.PARTS)]
    options.out = options.out or str(
        ROOT / ("build/gpu" if options.dry_run else "benchmarks/results")
    )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """0: every part passed; 1: one did not; 2: no GPU; 128 + signal: it was stopped."""
    options = parse(arguments)
    begin = time.monotonic()

    def stop(signum: int, _: object) -> None:
        raise Stopped(f"stopped by signal {signum}")

    if not options.dry_run and not machine.has_gpu():
        print(
            "benchmarks/gpu.sh: expected a CUDA device, torch sees none. --dry-run runs the same "
            "code at tiny sizes on the CPU.",
            file=sys.stderr,
        )
        return 2
    run = Run(options)
    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    code = 0
    try:
        for index, name in enumerate(options.parts):
            left_s = options.budget - (time.monotonic() - begin)
            waiting = options.parts[index + 1 :]
            run.part(name, budget_of(name, waiting, max(0.0, left_s)))
            code = max(code, int(run.results["parts"][name]["status"] != "passed"))
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        code = 128 + int(str(stopped).split()[-1])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    print(summary.of_run(run.results, time.monotonic() - begin))
    print(f"{run.path}")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
