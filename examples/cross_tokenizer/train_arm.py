# SPDX-License-Identifier: Apache-2.0
"""One job of the demo in its own process: the texts and a teacher, or an arm trained and measured.

python examples/cross_tokenizer/train_arm.py teacher --seed 0 --root runs/mine/seed0
python examples/cross_tokenizer/train_arm.py warm_sft --seed 0 --root runs/mine/seed0
python examples/cross_tokenizer/train_arm.py alm --seed 0 --root runs/mine/seed0
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import vocabularies
from records import arm_dir, claim, commit, finished, result_path, run_job, say, write_whole
from world import Valley, as_lines

ARMS = Path(__file__).parent / "arms"
TEACHERS = ("teacher", "twin_teacher")
WARM = "warm_sft"
# texts: what the teacher learns from, how many of them the student has, and the held-out ones
NUM_TEXTS, NUM_STUDENT_TEXTS, NUM_HELD_OUT = 2400, 400, 400
TEXTS, STUDENT_TEXTS, HELD_OUT = "teacher.jsonl", "student.jsonl", "held_out.jsonl"
# what the teacher writes after the prompts of its texts
WRITTEN = "written_by_teacher.jsonl"
MAX_WRITTEN = 100


def write_texts(root: Path, seed: int) -> None:
    """The three files of texts, and both tokenizers trained on the teacher's."""
    valley = Valley()
    rows = valley.rows(NUM_TEXTS, seed=2 * seed)
    held_out = valley.rows(NUM_HELD_OUT, seed=2 * seed + 1, without=rows)
    vocabularies.write([row["prompt"] + row["completion"] for row in rows], root / "tokenizers")
    for name, those in (
        (STUDENT_TEXTS, rows[:NUM_STUDENT_TEXTS]),
        (HELD_OUT, held_out),
        (TEXTS, rows),
    ):
        write_whole(root / name, as_lines(those))


def write_as_teacher(root: Path, seed: int) -> None:
    """What the teacher samples at temperature 1 after each prompt of its texts, as text."""
    import torch

    from opd.data import read_rows, tokenize_rows
    from opd.rollouts import Sampling, sample

    model, tokenizer = load(root, "teacher")
    rows = read_rows(str(root / TEXTS), TEXTS)
    prompts = tokenize_rows(rows, tokenizer, add_special_tokens=True)
    torch.manual_seed(seed)
    sampling = Sampling(
        temperature=1.0, max_completion_length=MAX_WRITTEN, generation_batch_size=300
    )
    written = sample(model, tokenizer, prompts, sampling)
    texts = [
        {
            "prompt": row["prompt"],
            "completion": tokenizer.decode(one.completion_ids.tolist(), skip_special_tokens=True),
        }
        for row, one in zip(rows, written, strict=True)
    ]
    write_whole(root / WRITTEN, as_lines(texts))


def load(root: Path, arm: str) -> tuple[Any, Any]:
    """A trained model, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from opd.model import LanguageModel, resolve_model_path

    path = resolve_model_path(str(arm_dir(root, arm)))
    model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True).eval()
    return LanguageModel(model), AutoTokenizer.from_pretrained(path)


def tokenizer_of(arm: str) -> str:
    """Whose tokenizer an arm's model has."""
    return "teacher" if arm == "teacher" else "student"


def arm_config(root: Path, arm: str, seed: int) -> Any:
    """The arm's YAML, with the files of this run put in."""
    from opd.config import load_config

    path = ARMS / f"{arm}.yaml"
    plain = load_config(path)
    overrides = [
        f"output_dir={arm_dir(root, arm)}",
        f"seed={seed}",
        f"data.train_file={root / Path(plain.data.train_file).name}",
        f"student.tokenizer_name_or_path={root / 'tokenizers' / tokenizer_of(arm)}",
    ]
    if plain.student.model_name_or_path is not None:
        overrides.append(f"student.model_name_or_path={arm_dir(root, WARM)}")
    if plain.teacher is not None:
        overrides.append(f"teacher.model_name_or_path={arm_dir(root, teacher_of(plain))}")
    return load_config(path, overrides)


def teacher_of(config: Any) -> str:
    """The job that trains an arm's teacher."""
    return Path(config.teacher.model_name_or_path).name


def job_key(root: Path, arm: str, seed: int) -> str:
    """16 hex digits over all that a job's numbers depend on: configuration and input files."""
    from opd.config import config_hash
    from opd.model import resolve_model_path

    config = arm_config(root, arm, seed)
    digest = hashlib.sha256(f"{arm} {seed} {NUM_TEXTS} {config_hash(config)}".encode())
    tokenizer = root / "tokenizers" / tokenizer_of(arm) / "tokenizer.json"
    inputs = [Path(config.data.train_file), root / HELD_OUT, tokenizer]
    for source in (config.student, config.teacher):
        path = getattr(source, "model_name_or_path", None)
        if path is not None:
            inputs.append(Path(resolve_model_path(path)) / "model.safetensors")
    for path in inputs:
        digest.update(path.read_bytes() if path.is_file() else b"missing")
    return digest.hexdigest()[:16]


def read_result(root: Path, arm: str, seed: int) -> dict[str, Any] | None:
    """The result of a finished job; None if it is not finished, or was made with other settings."""
    return finished(root, arm, lambda: job_key(root, arm, seed))


def bits_per_byte(root: Path, arm: str) -> dict[str, float]:
    """-log2 p(completion, its end | prompt) / bytes of the completion, over the held-out texts.

    p is that of the one tokenization that the model's own tokenizer writes, an upper bound of the
    text's. The end token costs bits and has no bytes.

    Returns:
        `all`, and each kind of text by the first word of its prompts.
    """
    import torch

    from opd.batch import collate
    from opd.data import read_rows, tokenize_rows
    from opd.rollouts import DatasetRollouts

    model, tokenizer = load(root, arm)
    rows = read_rows(str(root / HELD_OUT), "held_out")
    prompts = tokenize_rows(rows, tokenizer, add_special_tokens=True)
    nats: dict[str, float] = defaultdict(float)
    num_bytes: dict[str, int] = defaultdict(int)
    with torch.no_grad():
        for start in range(0, len(rows), 100):
            # nothing is cut: a model of this demo has no more positions
            written = DatasetRollouts(model.max_positions).collect(prompts[start : start + 100], 0)
            batch = collate(written, pad_id=tokenizer.pad_token_id)
            logprobs = model.law(batch).token_logprobs(batch.token_ids).logprobs.double()
            lengths = batch.segment_ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
            sums = [float(part.sum()) for part in logprobs.split(lengths.tolist())]
            for row, total in zip(rows[start : start + 100], sums, strict=True):
                for kind in ("all", row["prompt"].split()[0]):
                    nats[kind] -= total
                    num_bytes[kind] += len(row["completion"].encode())
    return {kind: nats[kind] / (math.log(2) * num_bytes[kind]) for kind in nats}


def chunk_metrics(root: Path, arm: str) -> dict[str, float]:
    """What the loop logged last of the alignment of the arm's texts; empty without one."""
    from opd.metrics import read_jsonl

    found: dict[str, float] = {}
    for values in read_jsonl(arm_dir(root, arm) / "metrics.jsonl"):
        found |= {name: value for name, value in values.items() if name.startswith("chunks/")}
    return found


def run(root: Path, arm: str, seed: int) -> dict[str, Any]:
    """Do the job, unless it is done, and write its result.

    Returns:
        `key`, `arm`, `seed`, `commit`, `train_s`, `bits_per_byte`, the loop's `ledger`, `chunks`.
    """
    found = read_result(root, arm, seed)
    if found is not None:
        return found
    import torch
    from transformers.utils import logging as hf_logging

    from opd.train import train

    # models this small lose time on a second thread; the two cores run two arms instead
    torch.set_num_threads(1)
    hf_logging.disable_progress_bar()
    if arm == "teacher":
        say("writing texts, training two tokenizers")
        root.mkdir(parents=True, exist_ok=True)
        write_texts(root, seed)
    start, key = time.perf_counter(), job_key(root, arm, seed)
    ledger = train(claim(root, arm, key, arm_config(root, arm, seed))).ledger
    trained = time.perf_counter()
    if arm == "teacher":
        say("the teacher writes")
        write_as_teacher(root, seed)
    say("measuring")
    result = {
        "key": key,
        "arm": arm,
        "seed": seed,
        "commit": commit(),
        "train_s": trained - start,
        "bits_per_byte": bits_per_byte(root, arm),
        "ledger": ledger,
        "chunks": chunk_metrics(root, arm),
    }
    write_whole(result_path(root, arm), json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    JOBS = sorted(path.stem for path in ARMS.glob("*.yaml"))
    sys.exit(
        run_job(
            "Run one job of the demo of two tokenizers.",
            JOBS,
            Path("runs/cross_tokenizer/seed0"),
            run,
        )
    )
