# SPDX-License-Identifier: Apache-2.0
"""explain(op, ...): which backend a call would take and how it would be cut, in words."""

from __future__ import annotations

from torch import Tensor

from . import _checks, _dispatch, _linear


def explain(op: str, *tensors: Tensor, **options: object) -> str:
    """The dispatch and the plan of a call, as text; nothing is computed.

    Args:
        op: name of a public op, such as "fused_linear_divergence".
        tensors: the tensors of the call, in its order.
        options: its keyword arguments; `backend`, `vocab_size` and `workspace_bytes` matter.

    Returns:
        One line for the choice, one per backend with its reason, and the plan of a fused op.

    Raises:
        ValueError: no such op, or a workspace that holds no token. UnsupportedBackendError.
    """
    _checks.one_of("explain", "op", op, _dispatch.OPS)
    if not tensors:
        raise ValueError(f"explain: {op} must be given the tensors of the call, got none.")
    meta = _dispatch.meta_of(tensors[0])
    chosen = _dispatch.select(op, meta, options.get("backend"))
    lines = [f"{op}: backend '{chosen}' for {meta.dtype} on {meta.device}"]
    for backend, available, reason in _dispatch.table(op, meta):
        state = "can run" if available else "cannot run"
        lines.append(f"  {backend}: {state}{f' ({reason})' if reason else ''}")
    if op.startswith("fused_linear_") and chosen != "reference":
        heads = [tensors[i] for i in ((1, 3) if op == "fused_linear_divergence" else (1,))]
        vocab_size = options.get("vocab_size") or min(head.shape[0] for head in heads)
        budget = options.get("workspace_bytes", _checks.DEFAULT_WORKSPACE_BYTES)
        plan = _linear.plan(op, tensors[0].shape[0], vocab_size, heads, budget)
        lines.append(f"  {plan}")
    return "\n".join(lines)
