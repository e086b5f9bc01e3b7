# SPDX-License-Identifier: Apache-2.0
"""The paragraph under the tables: what the numbers show and what they do not, from the numbers."""

from __future__ import annotations

import math
import statistics

SAMPLES_LONGEST = 1024
ON, SFT, OFF = "on_policy_reverse_kl", "more_sft", "off_policy_reverse_kl"

Results = dict[str, list[dict[str, float]]]


def write(results: Results, num_seeds: int) -> str:
    """Sentences about the arms that ran; the ones it compares must be among them.

    Args:
        results: arm -> one flat mapping of numbers for each seed.
        num_seeds: how many seeds there are.
    """
    if ON not in results or SFT not in results:
        return f"No summary: it compares {ON} with {SFT}, and one of them did not run."
    sentences = [_headline(results, num_seeds)]
    if OFF in results:
        sentences.append(_divergence_or_policy(results))
    sentences += [_greedy(results), _repair(results), _states(results)]
    if "more_sft_equal_flops" in results:
        sentences.append(_equal_flops(results))
    sentences.append(
        "This is one toy task with 128 table entries to learn and students that know it already "
        "when the arms part; it says nothing about large models."
    )
    return " ".join(sentences)


def _headline(results: Results, num_seeds: int) -> str:
    on, sft = _longest(results, ON), _longest(results, SFT)
    gaps = [
        100 * (a["accuracy/16"] - b["accuracy/16"])
        for a, b in zip(results[ON], results[SFT], strict=True)
    ]
    per_seed = ", ".join(f"{gap:+.1f}" for gap in gaps)
    seeds = f"{num_seeds} seeds: {per_seed}" if num_seeds > 1 else "one seed"
    costs = [_mean(results, arm, "student_cost") for arm in (ON, SFT)]
    extra = _mean(results, ON, "total_cost") / _mean(results, SFT, "total_cost")
    return (
        f"On chains of 16 steps at temperature 1, on-policy reverse KL takes the warm student from "
        f"{_longest(results, 'warm_sft'):.1f}% to {on:.1f}%, more SFT takes it to {sft:.1f}%: "
        f"{statistics.fmean(gaps):+.1f} points ({seeds}; sampling error about "
        f"{_error(on, sft, num_seeds):.1f}) at {costs[0]:.2f} against {costs[1]:.2f} million "
        f"student tokens; the teacher is at {_longest(results, 'teacher'):.1f}%. The teacher's "
        f"judging is not in that cost; with it the on-policy arm costs {extra:.1f} times as much."
    )


def _divergence_or_policy(results: Results) -> str:
    on, off, sft = (_longest(results, arm) for arm in (ON, OFF, SFT))
    gap, error = on - off, _error(on, off, len(results[ON]))
    if abs(gap) <= 2 * error:
        return (
            f"Off-policy reverse KL, which never lets the student write, reaches {off:.1f}% at the "
            f"same student cost: no difference that these samples can show ({gap:+.1f} points). "
            "So here the gain comes from the loss, the teacher's whole law under a mode-seeking "
            "divergence, and not from whose text it is taken on."
        )
    if gap > 0:
        share = 100 * (off - sft) / (on - sft) if on > sft else math.nan
        return (
            f"Off-policy reverse KL, which never lets the student write, reaches {off:.1f}%, "
            f"{gap:.1f} points less: {share:.0f}% of the gain over SFT comes from the loss, the "
            "rest from training on the student's own text."
        )
    return (
        f"Off-policy reverse KL, which never lets the student write, reaches {off:.1f}%, "
        f"{-gap:.1f} points more: here the gain over SFT comes from the loss, the teacher's whole "
        "law under a mode-seeking divergence; writing the text itself buys this student nothing "
        "and costs it a quarter of its steps."
    )


def _greedy(results: Results) -> str:
    students = [arm for arm in results if arm != "teacher"]
    worst = min(students, key=lambda arm: _mean(results, arm, "greedy_accuracy/16"))
    lowest = 100 * _mean(results, worst, "greedy_accuracy/16")
    if lowest >= 99.0:
        return (
            f"Greedy, every arm is right on at least {lowest:.1f}% of these chains, the warm "
            "student included: what the arms differ in is how much probability they leave on "
            "wrong tokens, not what they know."
        )
    text = f"Greedy, the arms range from {lowest:.1f}% ({worst}) upwards"
    before = 100 * _mean(results, "warm_sft", "greedy_accuracy/16")
    if lowest < before:
        worst_seed = 100 * min(seed["greedy_accuracy/16"] for seed in results[worst])
        text += (
            f"; the warm student has {before:.1f}%, so sharpening can also settle on a wrong table "
            f"entry (the worst seed has {worst_seed:.1f}%)"
        )
    return text + "."


def _repair(results: Results) -> str:
    students = [arm for arm in results if arm != "teacher"]
    best = max(students, key=lambda arm: _mean(results, arm, "repair_rate"))
    rate, teacher = _mean(results, best, "repair_rate"), _mean(results, "teacher", "repair_rate")
    if rate < 0.1 * teacher:
        return (
            f"No student learned to repair: after an injected wrong value the best of them "
            f"({best}) puts {rate:.3f} on taking it back and going on right, the teacher "
            f"{teacher:.3f}. The gain is fewer slips, not recovery from them."
        )
    return (
        f"After an injected wrong value {best} takes it back and goes on right with probability "
        f"{rate:.3f}, {SFT} with {_mean(results, SFT, 'repair_rate'):.3f}, {ON} with "
        f"{_mean(results, ON, 'repair_rate'):.3f}, the teacher with {teacher:.3f}."
    )


def _states(results: Results) -> str:
    def kl(arm: str, whose: str, direction: str = "reverse") -> float:
        return _mean(results, arm, f"{whose}_states/{direction}_kl")

    text = (
        f"KL(student || teacher) on the student's own states against the teacher's: "
        f"{kl(SFT, 'student'):.4f} against {kl(SFT, 'teacher'):.4f} nats per token after more SFT, "
        f"{kl(ON, 'student'):.4f} against {kl(ON, 'teacher'):.4f} after on-policy reverse KL; the "
        f"slip rate on own states over that on the teacher's: "
        f"{_mean(results, SFT, 'dagger_ratio'):.2f} and {_mean(results, ON, 'dagger_ratio'):.2f}."
    )
    sft, on = kl(SFT, "teacher", "forward"), kl(ON, "teacher", "forward")
    if on > 1.2 * sft:
        text += (
            f" The price is coverage: KL(teacher || student) on the teacher's states is {on:.4f} "
            f"after on-policy reverse KL and {sft:.4f} after more SFT, so what the teacher does "
            "only now and then is what the student drops."
        )
    return text


def _equal_flops(results: Results) -> str:
    longer, on = _longest(results, "more_sft_equal_flops"), _longest(results, ON)
    cost = _mean(results, "more_sft_equal_flops", "total_cost") / _mean(results, ON, "total_cost")
    return (
        f"SFT with {cost:.2f} times the on-policy arm's whole cost, the teacher's judging "
        f"included, reaches {longer:.1f}%, {on - longer:+.1f} points to on-policy reverse KL."
    )


def _mean(results: Results, arm: str, name: str) -> float:
    return statistics.fmean(seed[name] for seed in results[arm])


def _longest(results: Results, arm: str) -> float:
    return 100 * _mean(results, arm, "accuracy/16")


def _error(first: float, second: float, num_seeds: int) -> float:
    """One standard error of a difference of two shares in percent, from the sampling alone."""
    variance = sum(share * (100 - share) for share in (first, second))
    return math.sqrt(variance / (SAMPLES_LONGEST * num_seeds))
