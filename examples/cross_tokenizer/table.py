# SPDX-License-Identifier: Apache-2.0
"""From the results of the arms to a table, a picture, a JSON file and the pages that show them."""

from __future__ import annotations

import json
import math
import statistics
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import train_arm
from rich.console import Console

sys.path.append(str(Path(__file__).parents[1]))

from records import REPOSITORY, Results, aligned, mean, result_path, spread, write_record

WIDTH = 115
BEFORE, SFT, TEXT, TEACHER = train_arm.WARM, "more_sft", "seq_kd", "teacher"
LABELS = {
    "warm_sft": "warm SFT (before)",
    "more_sft": "more SFT",
    "seq_kd": "SeqKD",
    "alm": "ALM",
    "uld": "ULD",
    "gold_observed": "GOLD, observed",
    "gold_bayesian": "GOLD, bayesian",
    "gold_hybrid": "GOLD, hybrid",
    "simct": "SimCT",
    "mined": "MinED",
    "overlap": "shared tokens and the rest",
    "dskd_v1": "DSKD",
    "dskd_v2": "DSKD-v2",
    "multilevel_ot": "MultiLevelOT",
    "on_policy_alm": "ALM, half on-policy",
    "same_tokenizer": "twin, forward KL",
    "on_policy_same_tokenizer": "twin, half on-policy",
    "twin_teacher": "twin teacher",
    "teacher": "teacher",
}
KINDS = ("who", "town", "ledger", "code", "names")
LEGEND = (
    "Bits per byte of the 400 held-out texts, ± the standard deviation over the seeds; then of "
    "each kind of text. closed: of the gap in bits per byte from the warm student to the teacher. "
    "cost: million student tokens, 3 for a token trained on, 1 for one sampled. "
    "twin: a teacher with the student's tokenizer, what there is to gain without crossing."
)


def write(
    root: Path, arms: Sequence[str], seeds: Sequence[int], console: Console, *, is_full: bool
) -> None:
    """Print what came out; write the picture and the JSON, with `is_full` the pages too."""
    wanted = {*arms, BEFORE, TEACHER}
    raw = {arm: [_read(root, arm, seed) for seed in seeds] for arm in LABELS if arm in wanted}
    results = {arm: [flatten(result) for result in found] for arm, found in raw.items()}
    text, said = table(results), textwrap.fill(words(results), WIDTH, break_on_hyphens=False)
    console.print(f"\n{text}\n\n{said}", markup=False)
    picture = (REPOSITORY / "docs" if is_full else root) / "cross_tokenizer_example.png"
    record = (REPOSITORY / "benchmarks" / "results" if is_full else root) / "cross_tokenizer.json"
    draw(results, picture)
    write_record(raw, record)
    if is_full:
        page = REPOSITORY / "docs" / "cross_tokenizer_example.md"
        page.write_text(document(text, said, results, raw, seeds), encoding="utf-8")
        readme = Path(__file__).parent / "README.md"
        readme.write_text(with_table(readme.read_text(encoding="utf-8"), text), encoding="utf-8")
        console.print(f"\ndocument  {page}", markup=False)
    console.print(f"\npicture   {picture}\nnumbers   {record}", markup=False)


def flatten(result: dict[str, Any]) -> dict[str, float]:
    """One result as name -> number."""
    ledger = result["ledger"]
    cost = 3 * ledger["student_tokens_forward"] + ledger["student_tokens_sampled"]
    return {
        **result["bits_per_byte"],
        **result["chunks"],
        "cost": cost / 1e6,
        "train_s": result["train_s"],
    }


def closed(results: Results, arm: str) -> float:
    """The share of the gap from the warm student to the teacher that an arm closes."""
    before, best = mean(results, BEFORE, "all"), mean(results, TEACHER, "all")
    return (before - mean(results, arm, "all")) / (before - best)


def table(results: Results) -> str:
    """One row for each arm, as aligned text, and what the columns are."""
    rows = [["", "bits/byte", "closed", *KINDS, "cost", "seconds"]]
    for arm in results:
        cell, deviation = f"{mean(results, arm, 'all'):.3f}", spread(results, arm, "all")
        cell += "" if math.isnan(deviation) else f" ±{deviation:.3f}"
        is_student = arm not in train_arm.TEACHERS
        rows.append(
            [
                LABELS[arm],
                cell,
                f"{closed(results, arm):.0%}" if is_student and arm != BEFORE else "-",
                *(f"{mean(results, arm, kind):.2f}" for kind in KINDS),
                f"{mean(results, arm, 'cost'):.2f}M" if is_student else "-",
                f"{mean(results, arm, 'train_s'):.0f}",
            ]
        )
    return f"{aligned(rows)}\n{textwrap.fill(LEGEND, WIDTH, break_on_hyphens=False)}"


def gains(results: Results, arm: str, over: str) -> list[float]:
    """Bits per byte that an arm is below another, seed by seed."""
    pairs = zip(results[over], results[arm], strict=True)
    return [theirs["all"] - ours["all"] for theirs, ours in pairs]


def words(results: Results) -> str:
    """What the numbers say: which objectives gain over no distillation, and which do not."""
    if SFT not in results:
        return f"No summary: it compares with {SFT}, which did not run."
    plain = min((BEFORE, SFT), key=lambda arm: mean(results, arm, "all"))
    others = [arm for arm in results if arm not in (BEFORE, SFT, TEXT, *train_arm.TEACHERS)]
    crossing = [arm for arm in others if "same_tokenizer" not in arm]
    crossing.sort(key=lambda arm: mean(results, arm, "all"))
    better = [arm for arm in crossing if min(gains(results, arm, plain)) > 0]
    worse = [arm for arm in crossing if max(gains(results, arm, plain)) <= 0]
    mixed = [arm for arm in crossing if arm not in (*better, *worse)]
    num_seeds = len(results[BEFORE])
    seeds = "the one seed" if num_seeds == 1 else f"each of {num_seeds} seeds"
    sentences = [
        f"Without a teacher the best student has {mean(results, plain, 'all'):.3f} bits per byte "
        f"({LABELS[plain]}); the teacher has {mean(results, TEACHER, 'all'):.3f}."
    ]
    if better:
        sentences.append(f"Below that in {seeds}: {_listed(results, better, plain)}.")
    if mixed:
        sentences.append(f"In some seeds and not in others: {_listed(results, mixed, plain)}.")
    if worse:
        sentences.append(f"In {seeds} no better than no teacher: {_listed(results, worse, plain)}.")
    if TEXT in results:
        further = [arm for arm in crossing if min(gains(results, arm, TEXT)) > 0]
        sentences.append(
            f"The teacher's text without its laws, SeqKD, has {mean(results, TEXT, 'all'):.3f}; "
            + (
                f"below that in {seeds}: {_listed(results, further, TEXT)}."
                if further
                else f"no objective is below that in {seeds}."
            )
        )
    twins = [arm for arm in others if arm not in crossing]
    if twins:
        sentences.append(
            "With a teacher that has the student's tokenizer: " + _listed(results, twins, plain)
        )
        sentences[-1] += "."
    sentences.append(
        "This is one made-up world and students of a hundred thousand weights; it orders nothing "
        "but itself; the README has the settings that were tried before."
    )
    return " ".join(sentences)


def _listed(results: Results, arms: Sequence[str], plain: str) -> str:
    return ", ".join(
        f"{LABELS[arm]} {mean(results, arm, 'all'):.3f} "
        f"({-statistics.fmean(gains(results, arm, plain)):+.3f})"
        for arm in arms
    )


def draw(results: Results, path: Path) -> None:
    """A dot for each seed of each arm over bits per byte, the best on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    students = [arm for arm in results if arm not in (BEFORE, *train_arm.TEACHERS)]
    students.sort(key=lambda arm: -mean(results, arm, "all"))
    figure, axes = pyplot.subplots(figsize=(8, 0.32 * len(students) + 1.4), layout="constrained")
    for place, arm in enumerate(students):
        color = _color(arm)
        axes.plot(
            [seed["all"] for seed in results[arm]],
            [place] * len(results[arm]),
            linestyle="none",
            marker="o",
            markersize=5,
            color=color,
            alpha=0.45,
        )
        axes.plot(mean(results, arm, "all"), place, marker="|", markersize=13, color=color)
    for arm, style in ((BEFORE, ":"), (SFT, "--"), (TEACHER, "-")):
        if arm in results:
            place = mean(results, arm, "all")
            axes.axvline(place, color="0.6", linestyle=style, linewidth=1, zorder=0)
            axes.annotate(
                LABELS[arm],
                (place, 1.01),
                xycoords=("data", "axes fraction"),
                fontsize=8,
                rotation=35,
                color="0.35",
            )
    axes.set_yticks(range(len(students)), [LABELS[arm] for arm in students], fontsize=9)
    axes.set(xlabel="bits per byte of held-out text (a bar: the mean of the seeds)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _color(arm: str) -> str:
    """By who writes the text, and grey where no law crosses tokenizers."""
    if arm in (SFT, TEXT) or "same_tokenizer" in arm:
        return "0.45"
    return "#c44e52" if arm.startswith("on_policy") else "#4c72b0"


def document(
    text: str,
    said: str,
    results: Results,
    raw: dict[str, list[dict[str, Any]]],
    seeds: Sequence[int],
) -> str:
    """docs/cross_tokenizer_example.md."""
    seconds = sum(result["train_s"] for found in raw.values() for result in found)
    chunked = next((arm for arm in results if "chunks/student_tokens" in results[arm][0]), None)
    chunks = (
        ""
        if chunked is None
        else (
            f"A chunk has {mean(results, chunked, 'chunks/student_tokens'):.2f} tokens of the\n"
            f"student's and {mean(results, chunked, 'chunks/teacher_tokens'):.2f} of the "
            f"teacher's;\n{mean(results, chunked, 'chunks/aligned_ratio'):.1%} are aligned.\n\n"
        )
    )
    return (
        "<!-- SPDX-License-Identifier: Apache-2.0 -->\n"
        "# Two tokenizers\n\n"
        "A student with a vocabulary of 480 tokens (BPE over characters, bytes for the rest)\n"
        "learns from a teacher with one of 800 (byte-level BPE), both trained on the texts of a\n"
        "made-up valley: [`examples/cross_tokenizer`](../examples/cross_tokenizer/README.md).\n"
        "`make demo-cross-tokenizer-full` wrote this page and\n"
        "`benchmarks/results/cross_tokenizer.json`, which has every number of every seed.\n\n"
        "![Bits per byte of every arm](cross_tokenizer_example.png)\n\n"
        "Blue: on the teacher's text; red: half on the student's own; grey: no law crosses.\n\n"
        f"{said}\n\n```text\n{text}\n```\n\n{chunks}"
        f"{_of_seeds(seeds)} {seconds / 60:.0f} minutes of a process in all.\n"
    )


def _of_seeds(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"One seed, {seeds[0]}: how far seeds differ is not in these numbers."
    return (
        f"Means of {len(seeds)} seeds: other texts, other initial weights, other samples;\n"
        "the facts are the same."
    )


_BEGIN, _END = "<!-- table: written by table.py -->", "<!-- end of table -->"


def with_table(readme: str, text: str) -> str:
    """The README with its table replaced."""
    before, _, rest = readme.partition(_BEGIN)
    _, found, after = rest.partition(_END)
    if not found:
        raise ValueError(f"README.md must have the lines {_BEGIN} and {_END}")
    return f"{before}{_BEGIN}\n```text\n{text}\n```\n{_END}{after}"


def _read(root: Path, arm: str, seed: int) -> dict[str, Any]:
    return json.loads(result_path(root / f"seed{seed}", arm).read_text(encoding="utf-8"))
