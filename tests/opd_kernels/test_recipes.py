# SPDX-License-Identifier: Apache-2.0
"""Every line of the recipes table of docs/divergences.md runs, and has a gradient."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import opd_kernels as opk
from tests.checks import leaf

PAGE = (Path(__file__).parents[2] / "docs" / "divergences.md").read_text(encoding="utf-8")


def recipes() -> list[tuple[str, str]]:
    """(name, the first code span of its second column)."""
    table = PAGE.partition("| recipe | arguments | source |")[2].partition("\n\n")[0]
    rows = (line.split(" | ") for line in table.splitlines() if line.startswith("| "))
    return [(row[0].removeprefix("| "), re.match(r"`([^`]+)`", row[1])[1]) for row in rows]


@pytest.mark.parametrize(("name", "arguments"), recipes(), ids=[row[0] for row in recipes()])
def test_recipe_runs_as_printed(name, arguments):
    generator = torch.Generator().manual_seed(2)
    student, teacher, reference, raw_student, raw_teacher = (
        torch.randn(6, 30, generator=generator) * 2 for _ in range(5)
    )
    per_token = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.9, 1.0])
    values = {
        "D": opk.divergences,
        "targets": opk.targets,
        "labels": torch.tensor([3, 0, -100, 29, 5, 5]),
        "sampled_ids": torch.tensor([[3, 4, -1]] * 6),
        "sampled_weights": torch.full((6, 3), 0.5),
        "on_student_text": (per_token > 0.5).float(),
        "mask": (per_token > 0.2).float(),
        "alpha": per_token,
        "pass_rate": per_token,
        "tau": per_token + 0.5,
        "teacher_entropy": per_token * 2,
        "reference_logits": reference,
        "raw_student_logits": raw_student,
        "raw_teacher_logits": raw_teacher,
        "t": 0.4,
        "a": 0.8,
    }
    keywords = eval(f"dict({arguments})", {"__builtins__": {"dict": dict}}, values)
    student = leaf(student)
    loss = opk.divergence(student, teacher, **keywords)
    loss.sum().backward()
    truth = opk.divergence(student.detach(), teacher, **keywords, backend="reference")
    torch.testing.assert_close(loss.detach(), truth, rtol=1e-4, atol=1e-5)
    assert student.grad.isfinite().all() and student.grad.abs().max() > 0


def test_every_recipe_of_the_plan_is_in_the_table():
    names = " ".join(name for name, _ in recipes())
    for method in (
        "GKD", "DistiLLM", "DistiLLM-2", "TAID", "Veto", "ExOPD", "Delta-KD", "AKL", "ToDi",
        "ABKD", "CSD", "EOPD", "AdaKD", "PACED",
    ):  # fmt: skip
        assert re.search(rf"(^|\W){method}(\W|$)", names), method
