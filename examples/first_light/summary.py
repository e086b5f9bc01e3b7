# SPDX-License-Identifier: Apache-2.0
"""From the results of the arms to tables, a picture, a JSON file and one paragraph of words."""

from __future__ import annotations

import json
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import paragraph
from rich.console import Console
from run_arm import arm_dir, result_path

sys.path.append(str(Path(__file__).parents[1]))

from records import REPOSITORY, Results, aligned, mean, spread, write_record

LENGTHS = range(1, 17)
WIDTH = 115
LABELS = {
    "warm_sft": "warm SFT (before)",
    "more_sft": "more SFT",
    "more_sft_equal_flops": "more SFT, equal FLOPs",
    "off_policy_forward_kl": "off-policy forward KL",
    "off_policy_reverse_kl": "off-policy reverse KL",
    "on_policy_forward_kl": "on-policy forward KL",
    "on_policy_reverse_kl": "on-policy reverse KL",
    "on_policy_jsd": "on-policy JSD",
    "teacher": "teacher",
}
GAUGES = (
    ("n=16, T=1", "accuracy/16", "{:.1%}"),
    ("slip/step", "slip", "{:.2%}"),
    ("repair", "repair_rate", "{:.3f}"),
    ("R/seq", "repairs_per_sequence", "{:.3f}"),
    ("T: fKL", "teacher_states/forward_kl", "{:.4f}"),
    ("T: rKL", "teacher_states/reverse_kl", "{:.4f}"),
    ("S: fKL", "student_states/forward_kl", "{:.4f}"),
    ("S: rKL", "student_states/reverse_kl", "{:.4f}"),
    ("DAgger", "dagger_ratio", "{:.2f}"),
    ("cost", "student_cost", "{:.2f}M"),
    ("all", "total_cost", "{:.2f}M"),
)
LEGEND = (
    "slip/step: minus the slope of log accuracy over n. repair: P(R, then the right value | an "
    "injected wrong value). R/seq: R tokens in a completion. T:, S: KL to the teacher in nats per "
    "token on states that the teacher, the student wrote; fKL KL(teacher || student), rKL "
    "KL(student || teacher). DAgger: slip rate on the student's states over that on the teacher's. "
    "cost: million student tokens, 1 for a token read, 3 for one trained on, 4 if it was sampled "
    "first. all: the same with the teacher's judging in it, in student tokens. ±: standard "
    "deviation over the seeds."
)


def write(
    root: Path, arms: Sequence[str], seeds: Sequence[int], console: Console, *, is_full: bool
) -> None:
    """Print what came out; write the picture, the report and the JSON, with `is_full` to docs."""
    raw = {
        arm: [_read(root, arm, seed) for seed in seeds]
        for arm in LABELS
        if arm in (*arms, "warm_sft", "teacher")
    }
    results = {arm: [flatten(result) for result in found] for arm, found in raw.items()}
    texts = tables(results)
    words = textwrap.fill(paragraph.write(results, len(seeds)), WIDTH, break_on_hyphens=False)
    console.print("\n" + "\n\n".join(texts), markup=False)
    console.print("\n" + words, markup=False)
    picture = REPOSITORY / "docs" / "first_light.png" if is_full else root / "first_light.png"
    draw(results, picture)
    record = REPOSITORY / "benchmarks" / "results" if is_full else root
    record /= "first_light.json"
    write_record(raw, record)
    if is_full:
        page = REPOSITORY / "docs" / "first_light.md"
        page.write_text(document(texts, words, raw, seeds), encoding="utf-8")
        console.print(f"\ndocument  {page}", markup=False)
    console.print(f"\npicture   {picture}\nnumbers   {record}", markup=False)
    console.print(f"report    {report(root, arms, seeds[0])}", markup=False)


def flatten(result: dict[str, Any]) -> dict[str, float]:
    """One result as name -> number."""
    gauges, ledger = result["gauges"], result["ledger"]
    flat = {name: value for name, value in gauges.items() if not isinstance(value, dict)}
    for kind in ("accuracy", "greedy_accuracy"):
        flat |= {f"{kind}/{n}": share for n, share in gauges[kind].items()}
    flat["slip"] = -gauges["log_accuracy_slope"]
    flat["student_cost"] = flat["total_cost"] = math.nan
    flat["train_s"] = result["train_s"]
    if ledger is not None:
        flat["student_cost"] = student_cost(ledger) / 1e6
        flat["total_cost"] = ledger["cost_units"] / 1e6
    return flat


def student_cost(ledger: dict[str, Any]) -> float:
    """Student tokens: 3 for each read in training, 1 more for each that it sampled itself."""
    num_read = ledger["student_tokens_forward"]
    # every arm of the demo writes either all of its completions or none of them
    return 4.0 * num_read if ledger["student_tokens_sampled"] else 3.0 * num_read


def tables(results: Results) -> list[str]:
    """Accuracy over n at temperature 1 and greedy, and the gauges, as aligned text."""
    parts = []
    for title, kind in (
        ("Accuracy in percent over the length n, sampling at temperature 1", "accuracy"),
        ("The same, greedy", "greedy_accuracy"),
    ):
        rows = [["", *(f"{n}" for n in LENGTHS)]]
        for arm in results:
            shares = [mean(results, arm, f"{kind}/{n}") for n in LENGTHS]
            rows.append([LABELS[arm], *(f"{100 * share:.0f}" for share in shares)])
        parts.append(f"{title}\n{aligned(rows)}")
    rows = [["", *(header for header, _, _ in GAUGES)]]
    for arm in results:
        cells = [LABELS[arm]]
        for _, name, form in GAUGES:
            value, deviation = mean(results, arm, name), spread(results, arm, name)
            cell = "-" if math.isnan(value) else form.format(value)
            if name == "accuracy/16" and not math.isnan(deviation):
                cell += f" ±{100 * deviation:.1f}"
            cells.append(cell)
        rows.append(cells)
    parts.append(f"Gauges\n{aligned(rows)}\n{textwrap.fill(LEGEND, WIDTH, break_on_hyphens=False)}")
    return parts


def draw(results: Results, path: Path) -> None:
    """Accuracy over n at temperature 1, before and after, and the KL on both kinds of states."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 4.4), width_ratios=(1.5, 1), layout="constrained"
    )
    for arm in results:
        values = [100 * mean(results, arm, f"accuracy/{n}") for n in LENGTHS]
        style = STYLES[arm]
        left.plot(LENGTHS, values, label=LABELS[arm], **style)
        if len(results[arm]) > 1:
            shares = [[100 * seed[f"accuracy/{n}"] for seed in results[arm]] for n in LENGTHS]
            low, high = [min(s) for s in shares], [max(s) for s in shares]
            left.fill_between(LENGTHS, low, high, color=style["color"], alpha=0.08, linewidth=0)
    left.set(xlabel="steps in the chain, n", ylabel="right answers, %", xticks=list(LENGTHS)[1::2])
    left.set_title("Accuracy, sampling at temperature 1", loc="left", fontsize=11)
    left.legend(frameon=False, fontsize=8, loc="lower left")
    students = [arm for arm in results if arm != "teacher"]
    for place, arm in enumerate(reversed(students)):
        ends = [mean(results, arm, f"{who}_states/reverse_kl") for who in ("teacher", "student")]
        color = STYLES[arm]["color"]
        right.plot(ends, [place, place], color=color, linewidth=1.5, zorder=1)
        right.scatter(ends[0], place, s=42, facecolor="white", edgecolor=color, zorder=2)
        right.scatter(ends[1], place, s=42, color=color, zorder=2)
    # two empty ones that carry the legend in a neutral color
    right.scatter([], [], s=42, facecolor="white", edgecolor="0.3", label="on the teacher's states")
    right.scatter([], [], s=42, color="0.3", label="on the student's own states")
    right.set_yticks(range(len(students)), [LABELS[arm] for arm in reversed(students)], fontsize=8)
    right.set_ylim(-1.6, len(students) - 0.4)
    right.set_xscale("log")
    right.set(xlabel="KL(student || teacher), nats per token")
    right.set_title("Distance to the teacher", loc="left", fontsize=11)
    right.legend(frameon=False, fontsize=8, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


STYLES: dict[str, dict[str, Any]] = {
    "warm_sft": {"color": "#888888", "linestyle": ":", "linewidth": 2},
    "more_sft": {"color": "#c44e52", "linewidth": 2},
    "more_sft_equal_flops": {"color": "#c44e52", "linestyle": "--", "linewidth": 1.2},
    "off_policy_forward_kl": {"color": "#dd8452", "linestyle": "--", "linewidth": 1.2},
    "off_policy_reverse_kl": {"color": "#4c72b0", "linestyle": "--", "linewidth": 1.2},
    "on_policy_forward_kl": {"color": "#dd8452", "linewidth": 1.2},
    "on_policy_reverse_kl": {"color": "#4c72b0", "linewidth": 2.4},
    "on_policy_jsd": {"color": "#55a868", "linewidth": 1.2},
    "teacher": {"color": "black", "linestyle": ":", "linewidth": 1.2},
}


def document(
    texts: list[str], words: str, raw: dict[str, list[dict[str, Any]]], seeds: Sequence[int]
) -> str:
    """docs/first_light.md."""
    blocks = "\n\n".join(f"```text\n{text}\n```" for text in texts)
    seconds = sum(r["train_s"] + r["measure_s"] for found in raw.values() for r in found)
    return (
        "<!-- SPDX-License-Identifier: Apache-2.0 -->\n"
        "# First light\n\n"
        "A student of 28,128 parameters learns the task `chain_repair`\n"
        "(`python/opd/tasks/chain_repair.py`) from a teacher of 104,896, on the CPU, through\n"
        "`opd.train` and the fused kernel. `make demo-full` wrote this page and\n"
        "`benchmarks/results/first_light.json`, which has every number of every seed.\n\n"
        "![Accuracy over n, and the distance to the teacher](first_light.png)\n\n"
        f"{words}\n\n{blocks}\n\n"
        f"Means of {len(seeds)} seeds: other initial weights, other teacher traces, other\n"
        "samples. 256 samples of each length, 1,024 of n=16, on all 128 prompts of a length;\n"
        f"greedy, each prompt once. {seconds / 60:.0f} minutes of a process in all, training and\n"
        "measuring.\n"
    )


def report(root: Path, arms: Sequence[str], seed: int) -> Path:
    """The loop's HTML report over the arms of one seed."""
    from opd.report import write_report

    folders = [arm_dir(root / f"seed{seed}", arm) for arm in ("warm_sft", *arms)]
    return write_report(folders, root / "report.html")


def _read(root: Path, arm: str, seed: int) -> dict[str, Any]:
    path = result_path(root / f"seed{seed}", arm)
    return json.loads(path.read_text(encoding="utf-8"))
