# SPDX-License-Identifier: Apache-2.0
"""A pytest-benchmark run becomes benchmarks/results/cpu.json, and results docs/benchmarks.md.

Ratios and bytes are kept, absolute times are not: on a shared machine they mean nothing. What GPUs
have measured is in files of their own (benchmarks/gpu/report.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gpu import report as gpu_report
from benchmarks.gpu import results as gpu_results

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
PAGE = ROOT / "docs" / "benchmarks.md"
OURS = "opd_kernels"

HEADER = """# Benchmarks

How long do the losses take, and how much memory: against the matrix products that nobody can do
without, and against other people's code. Written by `opd bench --report` from the files in
`benchmarks/results`; do not edit. {gpu}

{gpu_sections}## On a CPU

From `benchmarks/results/cpu.json`, all that follows. Machine: {cpu}, {threads} threads; torch
{torch}, Python {python}, commit {commit}. {peers}

**How to read it.** Every time is a ratio within one run, in which the variants took turns: the best
time of one over the best time of another, in brackets the same of medians. Everything is forward +
backward. T tokens, vocabulary V, hidden sizes Ds (student) and Dt (teacher). On a shared virtual
machine a figure moves by a fifth between runs, and a best time may fall below its own floor.
"""

REPRODUCE = """## How to reproduce

    make peers   # optional: the `bench` extra (Liger-Kernel, TRL, orda-kernel, orjson) into .venv
    make bench   # about a quarter of an hour on two cores; `make bench-full`: every divergence

on a machine that does nothing else. Peers that are not installed are left out. It ends with an
error if a goal is missed, and writes this page all the same. Compilation is not timed: each variant
runs once before the first round. `torch.compile` is one graph (`fullgraph=True`). A variant that is
more than twice as slow as ours takes part in fewer rounds, and is compared with ours in those.
`benchmarks/conftest.py` refuses to time a kernel that is wrong; `tests/benchmarks/test_peers.py`
holds that the peers compute the same loss and gradient.
"""

PEERS = """`eager` and `torch.compile` are the textbook formulas (`benchmarks/eager.py`) on float32
logits. `liger` is Liger-Kernel's chunked JSD, the loss of its that runs on a CPU, as it is and with
its own compilation. `trl` is TRL's `ChunkedDivergenceFunction` and `orda` orda-kernel's
`distillation_loss`, both on their torch paths: their kernels are Triton."""

# prefix of a group -> question and what to know
QUESTIONS = {
    "every divergence": (
        "How far is each divergence from its own matrix products?",
        "`fused_linear_divergence`, float32, over the four GEMMs that the loss cannot do without "
        "(logits of student and teacher, dX, dW) as plain torch.mm calls with fresh results. Into "
        "buffers that exist already the GEMMs take less; a training step has none, since dW at "
        "least is new in each.",
    ),
    "peers float32": (
        "How long do others take for the same loss, float32?",
        f"Time over the bare GEMMs. {PEERS} An empty cell is a peer left out to save time, behind "
        "its own compiled form in other rows.",
    ),
    "peers float32 frozen head": (
        "... when the head is frozen?",
        "No dW then: the floor is three GEMMs. The quickest of the peers.",
    ),
    "peers float32 other divergences": (
        "... for the rest of the family?",
        "Time over the bare GEMMs. Only torch has all of it.",
    ),
    "peers bfloat16": (
        "How long do others take, bfloat16 inputs?",
        "Time over the bare GEMMs in float32. Our logits are float32 sums of exact products "
        "whatever the inputs are, formed from pairs of bfloat16 where the CPU multiplies such; dX "
        "and dW come from float32 dZ. The logits of `eager`, `torch.compile` and `trl` are float32 "
        "too; the others round each logit to bfloat16, which is less accurate. One case has all "
        "the peers.",
    ),
    "peers peak memory": (
        "How much memory does each take?",
        "JSD: peak resident memory of a step on top of inputs and heads, gradients included, each "
        "contestant in a process of its own; in brackets as a multiple of ours.",
    ),
    "workspace float32": (
        "What does a small workspace cost in time?",
        "JSD with `workspace_bytes` of so many MiB; time over the bare GEMMs.",
    ),
    "workspace memory": (
        "Does the workspace hold its budget?",
        "JSD: peak extra memory as a share of workspace + gradients; 105% is the most allowed.",
    ),
    "other inputs": (
        "Other inputs",
        "JSD, time over the bare GEMMs in float32: a vocabulary that is no multiple of a vector, "
        "and float16.",
    ),
    "gradient_tolerance": (
        "What does leaving out small gradients save?",
        "`gradient_tolerance` on peaked laws; time over the bare dense GEMMs.",
    ),
    "divergence": (
        "How long does `divergence` take from logits?",
        "In times of one copy of the student's logits, 256 x 32,000.",
    ),
    "fused_linear_topk_divergence": (
        "How long does `fused_linear_topk_divergence` take?",
        "Forward and backward from hidden states against a teacher's 64 ids and a bucket, relative "
        "to the three GEMMs of the student's head as torch.mm runs them; beside them ours alone.",
    ),
    "topk_divergence": (
        "How long does `topk_divergence` take from logits?",
        "Forward and backward, relative to a copy of the logits; eager torch adds up the rest of "
        "each row, or takes 1 minus the ids.",
    ),
    "fused_linear_token_logprobs": (
        "How long does `fused_linear_token_logprobs` take?",
        "Over its four GEMMs.",
    ),
    "token_logprobs": (
        "How long does `token_logprobs` take from logits?",
        "In times of one copy of the logits.",
    ),
    "fused_linear_topk": (
        "How long does `fused_linear_topk` take?",
        "Ids, log-probs, lse, tail and entropy from hidden states, over the product alone as our "
        "own GEMM runs it; beside them the same product by torch.mm.",
    ),
    "topk_logprobs": (
        "How long does `topk_logprobs` take from logits?",
        "In times of one copy of the logits. `eager`: log_softmax in float32, topk, and sums.",
    ),
    "fused_linear_sample_tokens": (
        "How long does `fused_linear_sample_tokens` take?",
        "50 draws a token and their weights, over the product alone as our own GEMM runs it.",
    ),
    "sample_tokens": (
        "How long does `sample_tokens` take from logits?",
        "In times of one copy of the logits. `eager`: log_softmax, cumsum and searchsorted.",
    ),
    "fused_linear_speculative_verify": (
        "How long does verification take from hidden states?",
        "8 sequences of 8 drafts, V = 151,936; over both models' logits as our own GEMM forms "
        "them. `eager` forms both laws whole: softmax, the coins, a draw from what is left.",
    ),
    "speculative_verify": (
        "How long does verification take from logits?",
        "The same drafts, in times of one copy of all logits. `eager` never cuts a law, ours and "
        "`block` do in the second row.",
    ),
    "sorted_l1": (
        "How long does `sorted_l1` take from logits?",
        "Forward and backward over the library's sort of both laws, which it is given. `eager`: "
        "softmax, sort, pad, subtract.",
    ),
    "fused_linear_sorted_l1": (
        "How long does `fused_linear_sorted_l1` take?",
        "Over the four GEMMs; what comes on top is the sorting.",
    ),
    "fused_linear_sorted_l1 peak memory": (
        "How much memory does `fused_linear_sorted_l1` take?",
        "Peak resident memory of a step on top of inputs and heads, dX and dW included; in "
        "brackets as a multiple of ours.",
    ),
    "fused_linear_overlap_divergence": (
        "What does a vocabulary that is shared in part cost?",
        "Reverse KL on the tokens that both have, with a bucket for the others, over "
        "`fused_linear_divergence` of one vocabulary of the same sizes. `eager`: whole logits, the "
        "shared cells, the log-sum-exp of the others, autograd.",
    ),
    "topk_codec": (
        "How much quicker is the codec than one in Python?",
        "Laws of K tokens of V = 151,936, the others' time over ours. `DistillKit` stands for "
        "bit packing in torch ops after its scheme (`benchmarks/distillkit_stand_in.py`).",
    ),
    "teacher_store": (
        "What does a store of teachers' laws add to the codec?",
        "Writing to disk and reading back, with all checks, over packing or unpacking alone.",
    ),
    "teacher transport": (
        "How much quicker are binary frames than JSON?",
        "A request to a server in a process of its own and its reply read into tensors: the JSON "
        "reply's time over that of our frames. `stored`: the server has the laws and does nothing "
        "else; `live`: a tiny teacher computes them first, which takes both sides as long. JSON is "
        "Python's; `JSON by orjson` is that package on both sides.",
    ),
    "align_tokens": (
        "How much quicker is the alignment of tokens than one in Python?",
        "Two BPE tokenizers on the text of this repository, times per token: the others take a "
        "share of the documents. Ours has two threads, the others have no use for a second.",
    ),
    "gemm": (
        "How long does our own GEMM take?",
        "The three products of a head, over torch.mm.",
    ),
    "dX and dW on a share of the columns": (
        "What do dX and dW cost on a share of the columns?",
        "Over the dense products; a row per share.",
    ),
    "segment_scan": (
        "How long does a segment scan take?",
        "Over a copy of 1,048,576 values: whole suffix sums, and K-step returns. `flipped cumsum` "
        "can only do segments of one length.",
    ),
    "segment_reduce": (
        "How long does a segment reduction take?",
        "Over a copy of the values.",
    ),
}


def condense(run: dict) -> dict:
    """The parts of a run that mean something elsewhere."""
    rows, goals = [], []
    for bench in run["benchmarks"]:
        info = dict(bench["extra_info"])
        goals += info.pop("goals", [])
        rows.append({"group": bench["group"] or "", "name": bench["name"], **info})
    return {"machine": run["machine_info"], "goals": goals, "benchmarks": rows}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def goals_table(goals: list[dict]) -> str:
    """What was promised, what was measured."""
    rows = []
    for goal in goals:
        measured = "not measured"
        if goal["measured"] is not None:
            measured = f"{goal['measured']:.2f}"
            if goal["medians"] is not None:
                measured += f" ({goal['medians']:.2f})"
        verdict = {True: "met", False: "**missed**", None: "open"}[goal["met"]]
        must = f"{goal['sense']} {goal['limit']:.2f}"
        rows.append([goal["goal"], must, measured, verdict, goal["note"]])
    return table(["goal", "must be", "measured", "", ""], rows)


def label(row: dict) -> str:
    """What tells a row from the others of its group."""
    name, _, params = row["name"].partition("[")
    return row.get("row") or params.removesuffix("]") or name.removeprefix("bench_")


def cell(row: dict, variant: str) -> str:
    """Ratio of bests, in brackets of medians."""
    best = row["ratio_to_floor"].get(variant)
    median = row["ratio_to_floor_medians"].get(variant)
    return "" if best is None else f"{best:.2f} ({median:.2f})"


def ratios_table(rows: list[dict]) -> str:
    """A row per benchmark, a column per variant; the floor is 1 by definition."""
    floor = rows[0]["floor"]
    variants = list(dict.fromkeys(name for row in rows for name in row["ratio_to_floor"]))
    variants.remove(floor)
    lines = [[label(row), *(cell(row, variant) for variant in variants)] for row in rows]
    rounds = sorted({count for row in rows for count in row.get("rounds", {}).values()})
    left_out = {name: why for row in rows for name, why in row.get("left_out", {}).items()}
    notes = "".join(f"\nNot timed: {name}. {why}.\n" for name, why in left_out.items())
    if rounds:
        span = f"{rounds[0]} to {rounds[-1]}" if len(rounds) > 1 else f"{rounds[0]}"
        notes = f"\nRounds: {span}.\n{notes}"
    return table([f"over {floor}", *variants], lines) + notes


def each_variant_table(rows: list[dict]) -> str:
    """One benchmark of many variants: a row per variant."""
    (row,) = rows
    variants = [name for name in row["ratio_to_floor"] if name != row["floor"]]
    return table(["", f"over {row['floor']}"], [[name, cell(row, name)] for name in variants])


def contest_memory_table(rows: list[dict]) -> str:
    """A row per contestant, a column per case."""
    peaks = rows[0]["peak_extra_bytes"]
    own = peaks[OURS]
    lines = []
    for name, measured in peaks.items():
        cells = []
        for case in own:
            peak = measured.get(case)
            cells.append("" if peak is None else f"{peak / 2**20:.0f} MiB ({peak / own[case]:.2f})")
        lines.append([name, *cells])
    return table(["", *own], lines)


def workspace_memory_table(rows: list[dict]) -> str:
    """A row per budget."""
    lines = []
    for row in rows:
        sizes = (row["workspace_bytes"], row["gradient_bytes"], row["peak_extra_bytes"])
        share = row["peak_extra_bytes"] / (row["workspace_bytes"] + row["gradient_bytes"])
        cells = [f"{size / 2**20:.1f} MiB" for size in sizes]
        lines.append([label(row), *cells, f"{100 * share:.1f}%"])
    return table(["", "workspace_bytes", "gradients", "peak extra", "of the first two"], lines)


def rendering(group: str, rows: list[dict]) -> Callable[[list[dict]], str] | None:
    """How the rows of a group are shown; None for rows that carry nothing to show."""
    if group.startswith("every divergence"):
        return each_variant_table
    if all("ratio_to_floor" in row for row in rows):
        return ratios_table
    if all("workspace_bytes" in row for row in rows):
        return workspace_memory_table
    if all(isinstance(row.get("peak_extra_bytes"), dict) for row in rows):
        return contest_memory_table
    return None


def question_of(group: str) -> str:
    """The longest key of QUESTIONS that the group starts with, or the group itself."""
    return max((key for key in QUESTIONS if group.startswith(key)), key=len, default=group)


def page(results: dict, gpu_sections: Sequence[str] = ()) -> str:
    """The Markdown page: GPUs, then the CPU: goals, how to reproduce, a question at a time."""
    machine = dict(results["machine"])
    versions = ", ".join(f"{name} {version}" for name, version in machine.pop("peers", {}).items())
    peers = f"Peers: {versions}." if versions else "No peer package was installed."
    gpu = f"GPUs: {len(gpu_sections)}." if gpu_sections else gpu_report.NONE
    sections = "".join(f"{section}\n" for section in gpu_sections)
    lines = [HEADER.format(peers=peers, gpu=gpu, gpu_sections=sections, **machine)]
    if results.get("goals"):
        lines += ["## Goals\n", goals_table(results["goals"])]
    lines.append(REPRODUCE)
    questions: dict[str, dict[str, list[dict]]] = {key: {} for key in QUESTIONS}
    for row in results["benchmarks"]:
        groups = questions.setdefault(question_of(row["group"]), {})
        groups.setdefault(row["group"], []).append(row)
    for key, groups in questions.items():
        if not groups:
            continue
        heading, explanation = QUESTIONS.get(key, (key, ""))
        lines.append(f"## {heading}\n")
        if explanation:
            lines.append(f"{explanation}\n")
        for group, rows in groups.items():
            render = rendering(group, rows)
            if render is None:
                continue
            rest = group.removeprefix(key).replace("torch.", "").strip(", ")
            if rest:
                lines.append(f"{rest}\n")
            lines.append(render(rows))
    return "\n".join(lines).rstrip("\n") + "\n"


def gpu_sections_of(directory: Path, pictures: Path) -> list[str]:
    """A section for each GPU that has results.

    Raises:
        SchemaError: a results file that is not what this version writes.
    """
    return [
        gpu_report.section(gpu_results.load(path), path, pictures)
        for path in gpu_report.files(directory)
    ]


def main(arguments: Sequence[str]) -> int:
    """Writes the page; before it cpu.json, from a file of `pytest --benchmark-json` if named."""
    if arguments:
        results = condense(json.loads(Path(arguments[0]).read_text()))
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(goals_table(results["goals"]))
        print(f"{RESULTS.relative_to(ROOT)} is written")
    try:
        sections = gpu_sections_of(RESULTS.parent, PAGE.parent)
    except gpu_results.SchemaError as error:
        print(error, file=sys.stderr)
        return 2
    PAGE.write_text(page(json.loads(RESULTS.read_text()), sections))
    print(f"{PAGE.relative_to(ROOT)} is written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
