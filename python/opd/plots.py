# SPDX-License-Identifier: Apache-2.0
"""The curves of a report, as SVG pictures inside data URIs."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#475569")
_PHASES = {
    "rollout": "#2563eb",
    "translate": "#0891b2",
    "teacher": "#ea580c",
    "student": "#059669",
    "optim": "#9333ea",
}
_SIZE = (5.2, 3.1)
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "opd",
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": "#475569",
    "axes.grid": True,
    "grid.color": "#e2e8f0",
    "grid.linewidth": 0.7,
    "xtick.color": "#64748b",
    "ytick.color": "#64748b",
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 2.6,
}

Draw = Callable[[Any, Sequence[Any]], bool]


def figures(runs: Sequence[Any]) -> list[dict[str, str]]:
    """`{"title", "caption", "uri"}` for every picture that the runs have numbers for."""
    import matplotlib

    # no window, whatever the machine has
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = []
    for title, caption, draw in _PICTURES:
        with plt.rc_context(_STYLE):
            figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
            if draw(axes, runs):
                stream = io.StringIO()
                figure.savefig(stream, format="svg", metadata={"Date": None})
                data = base64.b64encode(stream.getvalue().encode()).decode()
                uri = f"data:image/svg+xml;base64,{data}"
                found.append({"title": title, "caption": caption, "uri": uri})
            plt.close(figure)
    return found


def smooth(values: Sequence[float]) -> list[float]:
    """Means over a window around each value, a fortieth of the curve long on either side."""
    radius = max(1, len(values) // 40)
    windows = (values[max(0, i - radius) : i + radius + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _curves(*names: tuple[str, str], rows: str = "steps", low: float | None = None) -> Draw:
    """Lines over steps: a colour a run, a dash a name; noisy ones also faint and unsmoothed."""

    def draw(axes: Any, runs: Sequence[Any]) -> bool:
        drawn = 0
        for run, colour in _coloured(runs):
            for (name, label), dash in zip(names, ("-", "--", ":"), strict=False):
                points = [(row["step"], row[name]) for row in getattr(run, rows) if name in row]
                if not points:
                    continue
                drawn += 1
                steps, values = zip(*points, strict=True)
                # one run has colours to spare
                line = colour if len(runs) > 1 else _COLOURS[drawn - 1]
                style = {"color": line, "linestyle": dash if len(runs) > 1 else "-"}
                if rows == "steps" and len(values) > 20:
                    axes.plot(steps, values, color=line, alpha=0.2, linewidth=0.9)
                    values = smooth(values)
                if rows == "evaluations":
                    style |= {"marker": "o", "markersize": 3.5}
                axes.plot(steps, values, label=_label(run, label, runs, names), **style)
        axes.set_xlabel("optimizer step")
        if low is not None:
            axes.set_ylim(bottom=low)
        _legend(axes)
        return drawn > 0

    return draw


def _accuracy_by_length(axes: Any, runs: Sequence[Any]) -> bool:
    """Before (dashed) and after, at the first temperature that was evaluated."""
    drawn = False
    for run, colour in _coloured(runs):
        if not run.evaluations:
            continue
        for row, is_last in ((run.evaluations[0], False), (run.evaluations[-1], True)):
            points = sorted(_by_length(row))
            if len(points) < 2 or (is_last and row is run.evaluations[0]):
                continue
            drawn = True
            lengths, values = zip(*points, strict=True)
            when = f"step {row['step']}"
            label = when if len(runs) == 1 else f"{_short(run.name)}, {when}"
            axes.plot(
                lengths,
                values,
                color=colour,
                linestyle="-" if is_last else "--",
                alpha=1.0 if is_last else 0.55,
                marker="o",
                markersize=3.5,
                label=label,
            )
            axes.set_xticks(lengths)
    axes.set_xlabel("length n of the task")
    axes.set_ylim(-0.02, 1.02)
    _legend(axes)
    return drawn


def _by_length(row: dict[str, Any]) -> Iterator[tuple[int, float]]:
    matches = [(re.fullmatch(r"eval/accuracy/([^/]+)/n(\d+)", name), name) for name in row]
    tags = [match[1] for match, _ in matches if match]
    for match, name in matches:
        if match and match[1] == tags[0]:
            yield int(match[2]), row[name]


def _seconds_by_phase(axes: Any, runs: Sequence[Any]) -> bool:
    shown = [run for run in runs if run.ledger.get("seconds")]
    if not shown:
        return False
    for place, run in enumerate(reversed(shown)):
        left = 0.0
        for phase, value in run.ledger["seconds"].items():
            label = phase if place == 0 else None
            colour = _PHASES.get(phase, "#94a3b8")
            axes.barh(place, value, left=left, color=colour, height=0.55, label=label)
            if value > 0.07 * sum(run.ledger["seconds"].values()):
                share = f"{value:.1f} s" if len(runs) == 1 else f"{value:.0f}"
                middle = left + value / 2
                axes.text(middle, place, share, ha="center", va="center", color="white", size=8)
            left += value
    axes.set_yticks(range(len(shown)), [_short(run.name) for run in reversed(shown)])
    axes.set_ylim(-0.8, max(1.2, len(shown) - 0.2))
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("seconds")
    axes.legend(loc="upper center", ncols=4)
    return True


def _coloured(runs: Sequence[Any]) -> Iterator[tuple[Any, str]]:
    for number, run in enumerate(runs):
        yield run, _COLOURS[number % len(_COLOURS)]


def _label(run: Any, label: str, runs: Sequence[Any], names: Sequence[Any]) -> str:
    if len(runs) == 1:
        return label
    return _short(run.name) if len(names) == 1 else f"{_short(run.name)}, {label}"


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"...{name[-22:]}"


def _legend(axes: Any) -> None:
    handles, _ = axes.get_legend_handles_labels()
    if len(handles) > 1:
        axes.legend()


_PICTURES: tuple[tuple[str, str, Draw], ...] = (
    (
        "Accuracy",
        "Share of right answers on held-out prompts of all lengths. A point is an evaluation.",
        _curves(
            ("eval/accuracy/t1", "sampled at T = 1"),
            ("eval/accuracy/greedy", "greedy"),
            rows="evaluations",
            low=0.0,
        ),
    ),
    (
        "Accuracy by length",
        "Before training (dashed) and at the last evaluation; sampled.",
        _accuracy_by_length,
    ),
    (
        "Loss",
        "The objective, mean over trained tokens, nats; faint before smoothing.",
        _curves(("loss", "loss")),
    ),
    (
        "KL to the teacher, in training",
        "On the states trained on, nats a token. Reverse: KL(student || teacher); k1 is its "
        "one-sample estimate.",
        _curves(
            ("reverse_kl", "reverse KL"),
            ("forward_kl", "forward KL"),
            ("reverse_kl_k1", "reverse KL, k1"),
        ),
    ),
    (
        "KL to the teacher, held out",
        "Reverse KL on what the student writes and on given completions. The gap is the shift "
        "between the two kinds of states.",
        _curves(
            ("eval/student_states/reverse_kl", "student's states"),
            ("eval/data_states/reverse_kl", "data's states"),
            rows="evaluations",
        ),
    ),
    (
        "Bits per byte, held out",
        "Of the data's completions: what they cost, over their bytes. It compares models of any "
        "tokenizer.",
        _curves(
            ("eval/data_states/bits_per_byte", "student"),
            ("eval/data_states/teacher_bits_per_byte", "teacher"),
            rows="evaluations",
        ),
    ),
    (
        "Gap to a teacher with other tokens, held out",
        "log p(student) - log p(teacher) of a chunk of bytes, nats, mean of their absolute values.",
        _curves(
            ("eval/student_states/chunk_gap_abs", "student's states"),
            ("eval/data_states/chunk_gap_abs", "data's states"),
            rows="evaluations",
        ),
    ),
    (
        "Entropy",
        "Of the next-token laws on the states trained on, nats.",
        _curves(("entropy", "student"), ("teacher_entropy", "teacher")),
    ),
    (
        "Completion length",
        "Tokens, mean of a step.",
        _curves(("completions/mean_length", "mean length")),
    ),
    (
        "Cut completions",
        "Share that reached the length limit without an end token.",
        _curves(("completions/clipped_ratio", "cut"), low=0.0),
    ),
    (
        "Speed",
        "Training tokens a second, generation included.",
        _curves(("tokens_per_s", "tokens a second"), low=0.0),
    ),
    ("Time by phase", "Seconds of training; evaluation is not counted.", _seconds_by_phase),
    (
        "Speculation",
        "Share of the student's drafts that stayed, and of the tokens that the teacher wrote.",
        _curves(
            ("speculative/acceptance_rate", "accepted drafts"),
            ("speculative/teacher_token_share", "teacher's tokens"),
            low=0.0,
        ),
    ),
    (
        "Drafts kept at a time",
        "Mean number of drafts that stayed each time the teacher looked at a completion.",
        _curves(("speculative/mean_accepted_length", "drafts"), low=0.0),
    ),
    (
        "Speed of writing together",
        "Tokens drafted, verified and written by the teacher alone, a second of each phase.",
        _curves(
            ("speculative/draft_tokens_per_s", "drafting"),
            ("speculative/verify_tokens_per_s", "verifying"),
            ("speculative/teacher_tokens_per_s", "teacher alone"),
            low=0.0,
        ),
    ),
    (
        "Chunks",
        "Tokens of a chunk of bytes that both tokenizers cut out, mean of a step.",
        _curves(
            ("chunks/student_tokens", "student's tokens"),
            ("chunks/teacher_tokens", "teacher's tokens"),
            low=0.0,
        ),
    ),
    (
        "Share of student data",
        "DistiLLM's phi.",
        _curves(("replay/phi", "phi"), low=0.0),
    ),
)
