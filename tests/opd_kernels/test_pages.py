# SPDX-License-Identifier: Apache-2.0
"""What the system is told about pages changes no value that is still wanted."""

from __future__ import annotations

import torch

from opd_kernels import _pages


def test_huge_pages_leave_the_values_alone():
    values = torch.arange(3 << 20, dtype=torch.float32)
    assert _pages.ask_for_huge(values) is values
    assert torch.equal(values, torch.arange(3 << 20, dtype=torch.float32))
    # nothing to ask for
    assert _pages.ask_for_huge(torch.ones(5)).sum() == 5
    assert _pages.ask_for_huge(torch.empty(0)).numel() == 0
    assert _pages.ask_for_huge(torch.empty(3 << 20, device="meta")).is_meta
