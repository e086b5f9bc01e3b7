# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io

from rich.console import Console

from opd.progress import Display

VALUES = {"loss": 0.5, "reverse_kl": 0.25, "tokens_per_s": 1234.5, "other": 1.0}

EVALUATED = {
    "eval/accuracy/t1": 0.125,
    "eval/accuracy/t1/n4": 0.5,
    "eval/student_states/reverse_kl": 2.0,
    "eval/student_states/forward_kl": 1.0,
}


def _show(*, terminal, width=120):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=width, highlight=False)
    with Display(3, console=console) as display:
        display.evaluated(0, EVALUATED)
        for step in (1, 2, 3):
            display.step(step, VALUES)
        display.say("[bold]kept as it is[/bold]")
    return stream.getvalue()


def test_a_log_gets_plain_lines():
    out = _show(terminal=False)
    assert "\x1b" not in out and "\r" not in out
    lines = out.splitlines()
    assert lines[0] == "eval 0/3  acc t1 0.1250  rkl student 2.0000"
    assert lines[1] == "step 1/3  loss 0.5000  rkl 0.2500  acc 0.125  tok/s 1,234"
    # the second step came too soon after the first, the last is always shown
    assert lines[2].startswith("step 3/3")
    assert lines[3] == "[bold]kept as it is[/bold]"


def test_a_terminal_gets_a_live_line():
    out = _show(terminal=True)
    assert "3/3" in out and "\x1b" in out
    assert "loss 0.5000" in out and "acc 0.125" in out


def test_a_narrow_terminal_keeps_the_bar_and_drops_the_last_numbers():
    out = _show(terminal=True, width=80)
    assert "3/3" in out and "loss 0.5000" in out
    assert "tok/s" not in out and "…" not in out


def test_quiet_is_silent(capsys):
    with Display(2, quiet=True) as display:
        display.step(1, VALUES)
        display.say("nothing")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
