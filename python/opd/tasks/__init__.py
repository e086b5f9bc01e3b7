# SPDX-License-Identifier: Apache-2.0
"""Tasks that make their own rows and check their own answers. `task.kind` in a config picks one."""

from __future__ import annotations

from opd.tasks.chain_repair import ChainRepair

TASKS = {"chain_repair": ChainRepair}

__all__ = ["TASKS", "ChainRepair"]
