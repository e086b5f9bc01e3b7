# SPDX-License-Identifier: Apache-2.0
"""The demo through every transport: does a student learn the same wherever its teacher is?

python examples/first_light/transports.py            a new directory each time
python examples/first_light/transports.py --root R   goes on with what R has

One warm student is trained on, with one seed, with the teacher in memory, behind
`opd serve-teacher` (hidden states, or 8 likeliest tokens) and in a store (those, or 50 draws).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import run_arm
from summary import WIDTH, aligned

REPOSITORY = Path(__file__).resolve().parents[2]
TOPK, DRAWS = 8, 50
FIRST_STEPS = 10
_ON_POLICY, _OFF_POLICY = "on_policy_reverse_kl", "off_policy_forward_kl"


@dataclass(frozen=True, slots=True)
class Arm:
    """A run of the table.

    Attributes:
        name: of its directory.
        says: where the teacher is and what it says, for people.
        base: the arm of the demo whose settings it has.
        teacher: `memory`, `server` or `store`.
        objective: overrides of the objective.
        like: the arm in memory that it should agree with; None for such arms.
    """

    name: str
    says: str
    base: str
    teacher: str = "memory"
    objective: str | None = None
    like: str | None = None


def _topk(divergence: str) -> str:
    return f"{{kind: topk, divergence: {divergence}, teacher_top_k: {TOPK}}}"


ARMS = (
    Arm("memory", "memory, whole law", _ON_POLICY),
    Arm("hidden", "server, hidden states", _ON_POLICY, "server", like="memory"),
    Arm("memory_topk", f"memory, top {TOPK}", _ON_POLICY, objective=_topk("reverse_kl")),
    Arm("topk", f"server, top {TOPK}", _ON_POLICY, "server", _topk("reverse_kl"), "memory_topk"),
    Arm("memory_data", "memory, whole law", _OFF_POLICY),
    Arm("memory_data_topk", f"memory, top {TOPK}", _OFF_POLICY, objective=_topk("forward_kl")),
    Arm(
        "store_topk",
        f"store, top {TOPK}",
        _OFF_POLICY,
        "store",
        _topk("forward_kl"),
        "memory_data_topk",
    ),
    Arm(
        "store_draws",
        f"store, {DRAWS} draws",
        _OFF_POLICY,
        "store",
        f"{{kind: teacher_samples, num_draws: {DRAWS}}}",
        "memory_data",
    ),
)
LEGEND = (
    f"apart: the largest difference of a loss of the first {FIRST_STEPS} steps to the run in "
    "memory with the same objective (draws: to the whole law), relative to that run's mean of "
    "them. loss: mean over all steps, nats per token. n=16: accuracy of the longest chains at "
    "temperature 1. rKL, fKL: KL(student || teacher) and KL(teacher || student) on states that "
    "the student and that the teacher wrote, nats. bytes/law: of the server's replies, or of the "
    "store on disk. The students of the first half write their text, those of the second read the "
    "teacher's."
)


def config_of(root: Path, arm: Arm, seed: int, url: str = "http://127.0.0.1:1") -> Any:
    """The demo's arm with another teacher and objective."""
    from opd.config import load_config

    base = run_arm.arm_config(root, arm.base, seed)
    overrides = [
        f"output_dir={root / 'transports' / arm.name}",
        f"seed={seed}",
        f"data.train_file={root / run_arm.TRACES}",
        f"student.model_name_or_path={base.student.model_name_or_path}",
        "evaluation=null",
        "logging_steps=1",
    ]
    overrides += [] if arm.objective is None else [f"objective={arm.objective}"]
    if arm.teacher == "server":
        signal = "hidden" if arm.objective is None else "topk"
        overrides.append(f"teacher={{kind: server, url: '{url}', signal: {signal}}}")
    elif arm.teacher == "store":
        overrides.append(f"teacher={{kind: cached, path: '{store_path(root, arm)}'}}")
    return load_config(run_arm.ARMS / f"{arm.base}.yaml", overrides)


def store_path(root: Path, arm: Arm) -> Path:
    """Of the store that an arm reads."""
    return root / "transports" / f"{arm.name}.store"


def fill_store(root: Path, arm: Arm, seed: int) -> float:
    """Keep what the teacher says of the traces; bytes a law."""
    from opd.store import DrawsForm, verify
    from opd.store.build import build

    in_memory = Arm(arm.name, arm.says, arm.base, objective=arm.objective)
    form: dict[str, Any] = {"num_topk": TOPK}
    if arm.name == "store_draws":
        form = {"draws": DrawsForm(num_draws=DRAWS, seed=seed)}
    path = store_path(root, arm)
    build(config_of(root, in_memory, seed), path, **form, quiet=True)
    found = verify(path, records=False)
    return found.num_bytes / found.num_tokens


@contextmanager
def served() -> Iterator[str]:
    """The URL of the demo's teacher in a process of its own."""
    command = [sys.executable, "-m", "opd", "serve-teacher", "--model", run_arm.TEACHER]
    command += ["--port", "0", "--dtype", "float32", "--device", "cpu", "--num-threads", "1"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.search(r"http://\S+", line)
        if found is None:
            raise RuntimeError(f"opd serve-teacher did not start, it said {line!r}")
        yield found.group()
    finally:
        server.terminate()
        server.wait(timeout=60)


def sent(url: str) -> tuple[float, float]:
    """(bytes, laws) that a server has sent."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as reply:
        text = reply.read().decode()
    counts = [
        sum(float(value) for value in re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.M))
        for name in ("opd_reply_bytes_total", "opd_rows_total")
    ]
    return counts[0], counts[1]


def run(root: Path, arm: Arm, seed: int) -> dict[str, Any]:
    """Train and measure an arm, unless that is done; its losses and gauges."""
    from opd.config import config_hash
    from opd.metrics import read_jsonl
    from opd.model import resolve_model_path
    from opd.tasks import ChainRepair
    from opd.tasks.chain_repair_gauges import measure
    from opd.train import train

    key = f"{config_hash(config_of(root, arm, seed))} {run_arm.job_key(root, arm.base, seed)}"
    path = root / "transports" / arm.name / "result.json"
    if path.is_file() and (found := json.loads(path.read_text(encoding="utf-8")))["key"] == key:
        return found
    begin, bytes_per_law = time.perf_counter(), 0.0
    if arm.teacher == "server":
        with served() as url:
            output = train(config_of(root, arm, seed, url)).output_dir
            num_bytes, num_laws = sent(url)
        bytes_per_law = num_bytes / max(1.0, num_laws)
    else:
        bytes_per_law = fill_store(root, arm, seed) if arm.teacher == "store" else 0.0
        output = train(config_of(root, arm, seed)).output_dir
    seconds = time.perf_counter() - begin
    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_pretrained(resolve_model_path(str(output))).eval()
    gauges = measure(student, run_arm.load("teacher", root), ChainRepair(), seed=seed)
    result = {
        "key": key,
        "losses": [row["loss"] for row in read_jsonl(output / "metrics.jsonl") if "loss" in row],
        "gauges": gauges,
        "bytes_per_law": bytes_per_law,
        "seconds": seconds,
        "commit": run_arm.commit(),
    }
    path.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def apart(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest difference of the first losses, relative to the mean of those of `theirs`."""
    pairs = list(zip(ours, theirs, strict=True))[:FIRST_STEPS]
    return max(abs(one - two) for one, two in pairs) / fmean(two for _, two in pairs)


def table(results: dict[str, dict[str, Any]]) -> str:
    """One row an arm, and what the columns mean."""
    rows = [["", "apart", "loss", "n=16", "rKL", "fKL", "bytes/law", "s"]]
    for arm in (arm for arm in ARMS if arm.name in results):
        found = results[arm.name]
        gauges = found["gauges"]
        gap = "-"
        if arm.like in results:
            gap = f"{apart(found['losses'], results[arm.like]['losses']):.1e}"
        size = found["bytes_per_law"]
        rows.append(
            [
                arm.says,
                gap,
                f"{fmean(found['losses']):.4f}",
                f"{accuracy(gauges):.1%}",
                f"{gauges['student_states/reverse_kl']:.4f}",
                f"{gauges['teacher_states/forward_kl']:.4f}",
                f"{size:.0f}" if size else "-",
                f"{found['seconds']:.0f}",
            ]
        )
    return f"{aligned(rows)}\n{textwrap.fill(LEGEND, WIDTH, break_on_hyphens=False)}"


def accuracy(gauges: dict[str, Any]) -> float:
    """Of the longest chains; a result that was read back has text for numbers."""
    return {int(n): share for n, share in gauges["accuracy"].items()}[16]


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the demo through every transport.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, help="where the files go; give it again to go on")
    options = parser.parse_args()
    from opd.schema import ConfigError
    from opd.train import Interrupted

    new = REPOSITORY / "runs" / "first_light" / time.strftime("transports-%Y%m%d-%H%M%S")
    root = (options.root or new).resolve()
    results: dict[str, dict[str, Any]] = {}
    try:
        for job in ("teacher", run_arm.WARM):
            _say(f"{job}")
            run_arm.run(root, job, options.seed)
        for arm in ARMS:
            _say(f"{arm.name}: {arm.says}")
            results[arm.name] = run(root, arm, options.seed)
    except ConfigError as error:
        _say(str(error))
        return 2
    except (Interrupted, KeyboardInterrupt):
        _say(f"stopped; to go on: {sys.executable} {sys.argv[0]} --root {root}")
        return 130
    text = table(results)
    (root / "transports.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\n{root / 'transports.txt'}")
    return 0


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
