# SPDX-License-Identifier: Apache-2.0
"""One job of the demo in its own process: the teacher's traces, or one arm trained and measured.

python examples/first_light/run_arm.py teacher --seed 0 --root runs/mine/seed0
python examples/first_light/run_arm.py warm_sft --seed 0 --root runs/mine/seed0
python examples/first_light/run_arm.py on_policy_reverse_kl --seed 0 --root runs/mine/seed0
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import records
from records import arm_dir, claim, commit, finished, result_path, run_job, say, write_whole

ARMS = Path(__file__).parent / "arms"
TRACES = "teacher_traces.jsonl"
NUM_TRACES = 2048
TEACHER = "builtin:chain_repair_teacher"
WARM = "warm_sft"


def job_key(root: Path, arm: str, seed: int) -> str:
    """16 hex digits over all that a job's numbers depend on: configuration and input files."""
    from opd.config import config_hash
    from opd.model import resolve_model_path

    digest = hashlib.sha256(f"{arm} {seed} {NUM_TRACES}".encode())
    inputs = [Path(resolve_model_path(TEACHER)) / "model.safetensors"]
    if arm != "teacher":
        digest.update(config_hash(arm_config(root, arm, seed)).encode())
        inputs.append(root / TRACES)
    if arm not in ("teacher", WARM):
        inputs.append(Path(resolve_model_path(str(arm_dir(root, WARM)))) / "model.safetensors")
    for path in inputs:
        digest.update(path.read_bytes() if path.is_file() else b"missing")
    return digest.hexdigest()[:16]


def arm_config(root: Path, arm: str, seed: int) -> Any:
    """The arm's YAML, with the files of this run put in."""
    from opd.config import load_config

    overrides = [
        f"output_dir={arm_dir(root, arm)}",
        f"seed={seed}",
        f"data.train_file={root / TRACES}",
    ]
    if arm != WARM:
        overrides.append(f"student.model_name_or_path={arm_dir(root, WARM)}")
    return load_config(ARMS / f"{arm}.yaml", overrides)


def read_result(root: Path, arm: str, seed: int) -> dict[str, Any] | None:
    """The result of a finished job; None if it is not finished, or was made with other settings."""
    return finished(root, arm, lambda: job_key(root, arm, seed))


def is_stale(root: Path, arm: str, seed: int) -> bool:
    """Whether what lies there was begun with other settings or inputs."""
    return records.is_stale(root, arm, job_key(root, arm, seed))


def write_traces(root: Path, seed: int) -> None:
    """What the teacher samples at temperature 1 for NUM_TRACES prompts."""
    from opd.tasks import ChainRepair
    from opd.tasks.chain_repair_gauges import sample

    task = ChainRepair()
    rows = task.rows(NUM_TRACES, seed=1000 + seed)
    completions = sample(load("teacher", root), task, rows, seed=seed)
    lines = [
        json.dumps({**row, "completion": completion})
        for row, completion in zip(rows, completions, strict=True)
    ]
    write_whole(root / TRACES, "\n".join(lines) + "\n")


def load(arm: str, root: Path) -> Any:
    """A trained model, or the teacher."""
    from transformers import AutoModelForCausalLM

    from opd.model import resolve_model_path

    source = TEACHER if arm == "teacher" else str(arm_dir(root, arm))
    model = AutoModelForCausalLM.from_pretrained(resolve_model_path(source), use_safetensors=True)
    return model.eval()


def run(root: Path, arm: str, seed: int) -> dict[str, Any]:
    """Do the job, unless it is done, and write its result.

    Returns:
        `key`, `train_s`, `measure_s`, the `gauges`, and for an arm the loop's `ledger`.
    """
    found = read_result(root, arm, seed)
    if found is not None:
        return found
    import torch
    from transformers.utils import logging as hf_logging

    from opd.tasks import ChainRepair
    from opd.tasks.chain_repair_gauges import measure
    from opd.train import train

    # models this small lose time on a second thread; the two cores run two arms instead
    torch.set_num_threads(1)
    hf_logging.disable_progress_bar()
    arm_dir(root, arm).mkdir(parents=True, exist_ok=True)
    start, ledger = time.perf_counter(), None
    if arm == "teacher":
        say("writing traces")
        write_traces(root, seed)
    else:
        config = arm_config(root, arm, seed)
        ledger = train(claim(root, arm, job_key(root, arm, seed), config)).ledger
    trained = time.perf_counter()
    say("measuring")
    student, teacher = load(arm, root), load("teacher", root)
    gauges = measure(teacher if arm == "teacher" else student, teacher, ChainRepair(), seed=seed)
    result = {
        "key": job_key(root, arm, seed),
        "arm": arm,
        "seed": seed,
        "commit": commit(),
        "train_s": trained - start,
        "measure_s": time.perf_counter() - trained,
        "gauges": gauges,
        "ledger": ledger,
    }
    write_whole(result_path(root, arm), json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    JOBS = ["teacher", *sorted(path.stem for path in ARMS.glob("*.yaml"))]
    sys.exit(run_job("Run one job of the demo.", JOBS, Path("runs/first_light/seed0"), run))
