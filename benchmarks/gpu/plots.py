# SPDX-License-Identifier: Apache-2.0
"""Pictures of a GPU run as PNG files that are the same each time they are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu.goals import OURS, lead_of
from benchmarks.gpu.results import Timing, rows_of

_COLOURS = {"reverse_kl": "#2563eb", "forward_kl": "#ea580c", "jsd": "#059669"}
_GREY = "#94a3b8"
_LIMIT = "#dc2626"
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e2e8f0",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "savefig.dpi": 130,
}


def short(case: str) -> str:
    """`152k, 2048 / 5120` of T8192-V151936-Ds2048-Dt5120."""
    fields = {part.rstrip("0123456789"): part.lstrip("TVDst") for part in case.split("-")}
    vocab = int(fields["V"])
    thousands = f"{round(vocab / 1000)}k" if vocab >= 1000 else str(vocab)
    return f"{thousands}, {fields['Ds']} / {fields['Dt']}"


def draw(results: dict, stem: str, directory: Path) -> list[tuple[str, str]]:
    """(file name, caption) of each picture that the run has numbers for."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = []
    for name, caption, picture in _PICTURES:
        with plt.rc_context(_STYLE):
            figure = picture(plt, results)
            if figure is None:
                continue
            file = f"benchmarks_{stem}_{name}.png"
            directory.mkdir(parents=True, exist_ok=True)
            figure.savefig(directory / file, metadata={"Software": None})
            plt.close(figure)
            drawn.append((file, caption))
    return drawn


def _of_lead(results: dict) -> list[Timing]:
    lead = lead_of(results)
    return [row for row in rows_of(results, "ours", Timing) if row.contestant == lead]


def _floor(plt: Any, results: dict) -> Any:
    """Bars of the ratio to the GEMMs, the two heads in panels."""
    rows = _of_lead(results)
    if not rows:
        return None
    labels = list(dict.fromkeys(row.case for row in rows))
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    names = list(dict.fromkeys(row.divergence for row in rows))
    width = 0.8 / len(names)
    for panel, head in zip(panels, ("trained", "frozen"), strict=True):
        for index, name in enumerate(names):
            found = {
                row.case: row.ratio_to_floor
                for row in rows
                if row.head == head and row.divergence == name
            }
            places = [labels.index(case) + (index - (len(names) - 1) / 2) * width for case in found]
            colour = _COLOURS.get(name, _GREY)
            panel.bar(places, list(found.values()), width=0.92 * width, color=colour, label=name)
        panel.axhline(1.0, color="#475569", linewidth=1.0)
        panel.axhline(1.15, color=_LIMIT, linewidth=1.0, linestyle="--", label="goal, 1.15")
        panel.set_title(f"head {head}", fontsize=9)
        names_of_cases = [short(case) for case in labels]
        panel.set_xticks(range(len(labels)), names_of_cases, rotation=25, ha="right")
        panel.set_xlabel("vocabulary, Ds / Dt")
        panel.grid(axis="x", visible=False)
    panels[0].set_ylabel("time over the bare GEMMs")
    panels[0].set_ylim(bottom=0.0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _first_case(results: dict) -> list[Timing]:
    """Rows of the peers in the case that was measured first, head trained."""
    rows = [row for row in rows_of(results, "peers", Timing) if row.ratio_ours is not None]
    if not rows:
        return []
    first = rows[0]
    return [row for row in rows if (row.case, row.head) == (first.case, first.head)]


def _bars(plt: Any, rows: list[Timing], value: Any, label: str, mark: float | None) -> Any:
    """Horizontal bars, a contestant a line, a divergence a colour; who is best on top."""
    names = sorted(
        {row.contestant for row in rows},
        key=lambda name: min(value(row) for row in rows if row.contestant == name),
    )
    kinds = list(dict.fromkeys(row.divergence for row in rows))
    height = 0.8 / len(kinds)
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.42 * len(names)), layout="constrained")
    for index, kind in enumerate(kinds):
        chosen = [row for row in rows if row.divergence == kind]
        places = [
            names.index(row.contestant) + (index - (len(kinds) - 1) / 2) * height for row in chosen
        ]
        colour = _COLOURS.get(kind, _GREY)
        values = [value(row) for row in chosen]
        axes.barh(places, values, height=0.9 * height, color=colour, label=kind)
    if mark is not None:
        axes.axvline(mark, color="#475569", linewidth=1.0)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"{label}; {short(rows[0].case)}, head {rows[0].head}")
    axes.legend(loc="upper right")
    for tick, name in zip(axes.get_yticklabels(), names, strict=True):
        if name.startswith(OURS):
            tick.set_fontweight("bold")
    return figure


def _peers(plt: Any, results: dict) -> Any:
    rows = _first_case(results)
    if not rows:
        return None
    return _bars(plt, rows, lambda row: row.ratio_ours, "time over ours", 1.0)


def _memory(plt: Any, results: dict) -> Any:
    rows = [row for row in _first_case(results) if row.peak_bytes is not None]
    if not rows:
        return None
    return _bars(plt, rows, lambda row: row.peak_bytes / 2**30, "peak extra memory, GiB", None)


_PICTURES = (
    ("floor", "Forward + backward over the bare GEMMs of the same turns; lower is better.", _floor),
    ("peers", "Time of everyone over ours, in turns.", _peers),
    ("memory", "Peak memory of a step on top of inputs and heads, gradients included.", _memory),
)
