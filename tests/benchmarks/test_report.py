# SPDX-License-Identifier: Apache-2.0
"""The page shows every goal and every group, those it does not know included."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import report

RUN = {
    "machine_info": {
        "cpu": "CPU",
        "cores": 2,
        "threads": 2,
        "python": "3",
        "torch": "2",
        "commit": "abc",
        "peers": {"trl": "1.16.0"},
    },
    "benchmarks": [
        {
            "group": "peers float32 T2-V3-Ds4-Dt5",
            "name": "bench_float32[T2-jsd]",
            "extra_info": {
                "row": "jsd",
                "floor": "gemms",
                "ratio_to_floor": {"gemms": 1.0, "opd_kernels": 1.05, "trl": 4.0},
                "ratio_to_floor_medians": {"gemms": 1.0, "opd_kernels": 1.1, "trl": 4.2},
                "left_out": {"liger": "because"},
                "goals": [
                    {
                        "goal": "quick",
                        "sense": "at least",
                        "limit": 1.2,
                        "measured": 1.1,
                        "medians": 1.15,
                        "met": False,
                        "note": "best peer: trl",
                    }
                ],
            },
        },
        {
            "group": "something new",
            "name": "bench_new[a]",
            "extra_info": {
                "floor": "copy",
                "ratio_to_floor": {"copy": 1.0, "opd_kernels": 2.0},
                "ratio_to_floor_medians": {"copy": 1.0, "opd_kernels": 2.5},
            },
        },
        {
            "group": "peers peak memory T2-V3-Ds4-Dt5",
            "name": "bench_peak",
            "extra_info": {
                "peak_extra_bytes": {"opd_kernels": {"a": 1 << 20}, "trl": {"a": 3 << 20}}
            },
        },
    ],
}


def test_page():
    results = report.condense(RUN)
    assert [goal["goal"] for goal in results["goals"]] == ["quick"]
    text = report.page(results)
    assert "| quick | at least 1.20 | 1.10 (1.15) | **missed** | best peer: trl |" in text
    assert "| jsd | 1.05 (1.10) | 4.00 (4.20) |" in text
    assert "Not timed: liger. because." in text
    assert "## something new" in text and "| a | 2.00 (2.50) |" in text
    assert "| trl | 3 MiB (3.00) |" in text
    assert text.index("## Goals") < text.index("## How to reproduce") < text.index("jsd")


def test_groups_find_their_question():
    assert report.question_of("peers float32 frozen head X") == "peers float32 frozen head"
    assert report.question_of("peers float32 X") == "peers float32"
    assert report.question_of("nothing known") == "nothing known"


def test_every_benchmark_has_a_question():
    folder = Path(report.__file__).parent
    text = "".join(path.read_text() for path in sorted(folder.glob("bench_*.py")))
    groups = re.findall(r'benchmark\.group = f?"([^"{]+)', text)
    assert len(groups) > 20
    assert [group for group in groups if report.question_of(group) not in report.QUESTIONS] == []
