# SPDX-License-Identifier: Apache-2.0
"""Values and gradients computed once, apart from this code, to nine digits (natural logarithm).

The student's logits are its log-probabilities, temperature 1; gradients are by student logit.
"""

from __future__ import annotations

from tests.cases import spec

# name -> (teacher probabilities, student probabilities)
PAIRS = {
    "two": ([0.75, 0.25], [0.5, 0.5]),
    "four": ([0.5, 0.3, 0.15, 0.05], [0.2, 0.4, 0.1, 0.3]),
}


def _entry(value_two, slope_two, value_four, gradient_four):
    return {"two": (value_two, [slope_two, -slope_two]), "four": (value_four, gradient_four)}


GOLDEN = {
    spec("forward_kl"): _entry(
        0.130812036, -0.250000000, 0.343072537,
        [-0.300000000, 0.100000000, -0.050000000, 0.250000000],
    ),
    spec("reverse_kl"): _entry(
        0.143841036, -0.274653072, 0.428796013,
        [-0.269017349, -0.056445576, -0.083426112, 0.408889037],
    ),
    spec("jsd", beta=0.5): _entry(
        0.033822076, -0.063853203, 0.088838174,
        [-0.064048978, 0.010531480, -0.015200877, 0.068718376],
    ),
    spec("jsd", beta=0.1): _entry(
        0.011830682, -0.022518778, 0.030841113,
        [-0.025768993, 0.007890724, -0.004697037, 0.022575306],
    ),
    spec("jsd", beta=0.9): _entry(
        0.012752429, -0.024235014, 0.036302038,
        [-0.023284422, -0.002196541, -0.006813693, 0.032294657],
    ),
    spec("skew_forward_kl", alpha=0.1): _entry(
        0.107042736, -0.203007519, 0.277818952,
        [-0.222126395, 0.061432828, -0.043982452, 0.204676020],
    ),
    spec("skew_reverse_kl", alpha=0.1): _entry(
        0.113136722, -0.214136973, 0.309805787,
        [-0.203950843, 0.001229719, -0.056331477, 0.259052600],
    ),
    spec("skew_reverse_kl", alpha=0.1, detach_mixture=True): _entry(
        0.113136722, -0.242350139, 0.309805787,
        [-0.232844223, -0.021965415, -0.068136934, 0.322946572],
    ),
    spec("total_variation"): _entry(
        0.250000000, -0.250000000, 0.350000000,
        [-0.140000000, 0.120000000, -0.070000000, 0.090000000],
    ),
}  # fmt: skip
