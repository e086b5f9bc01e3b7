# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import base64
from types import SimpleNamespace
from xml.etree import ElementTree

from opd.plots import figures, smooth


def _run(**values):
    empty = {"name": "run", "steps": [], "evaluations": [], "ledger": {}}
    return SimpleNamespace(**{**empty, **values})


def test_only_what_there_are_numbers_for_is_drawn():
    assert figures([_run()]) == []
    found = figures([_run(steps=[{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}])])
    assert [figure["title"] for figure in found] == ["Loss"]


def test_speculation_has_its_pictures():
    names = ("acceptance_rate", "mean_accepted_length", "draft_tokens_per_s")
    row = {f"speculative/{name}": 0.5 for name in names}
    found = figures([_run(steps=[{"step": step, **row} for step in (1, 2)])])
    assert [figure["title"] for figure in found] == [
        "Speculation",
        "Drafts kept at a time",
        "Speed of writing together",
    ]


def test_pictures_are_well_formed_svg_and_the_same_every_time():
    run = _run(ledger={"seconds": {"rollout": 2.0, "student": 1.0}})
    first, second = figures([run]), figures([run])
    assert first == second
    data = first[0]["uri"].removeprefix("data:image/svg+xml;base64,")
    assert ElementTree.fromstring(base64.b64decode(data)).tag.endswith("svg")


def test_smoothing_keeps_length_constants_and_mean():
    assert smooth([2.0] * 50) == [2.0] * 50
    values = [float(i % 2) for i in range(400)]
    assert len(smooth(values)) == 400
    assert all(abs(value - 0.5) < 0.1 for value in smooth(values)[20:-20])
    assert smooth([]) == []
