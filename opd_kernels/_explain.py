# SPDX-License-Identifier: Apache-2.0
"""explain(op, ...): which backend a call would take and how it would be cut, in words."""

from __future__ import annotations

from torch import Tensor

from . import _checks, _dispatch, _linear

# where the heads are among the tensors of a call
_HEADS = {"fused_linear_divergence": (1, 3), "fused_linear_token_logprobs": (1,)}
# arguments of the calls that change neither the choice nor the plan
_OTHER_OPTIONS = ("divergence", "temperature", "token_weights", "reduction", "statistics")


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
    known = ("backend", "vocab_size", "workspace_bytes")
    for name in options:
        _checks.one_of("explain", "option", name, (*known, *_OTHER_OPTIONS))
    heads = _HEADS.get(op, ())
    if heads and len(tensors) <= heads[-1]:
        raise ValueError(
            f"explain: {op} must be given {heads[-1] + 1} tensors, got {len(tensors)}."
        )
    meta = _dispatch.meta_of(tensors[0])
    chosen = _dispatch.select(op, meta, options.get("backend"))
    lines = [f"{op}: backend '{chosen}' for {meta.dtype} on {meta.device}"]
    for backend, available, reason in _dispatch.table(op, meta):
        state = "can run" if available else "cannot run"
        lines.append(f"  {backend}: {state}{f' ({reason})' if reason else ''}")
    if heads and chosen != "reference":
        weights = [tensors[i] for i in heads]
        widths = {f"head {i}": weight.shape[0] for i, weight in enumerate(weights)}
        vocab_size = _checks.vocab_prefix(op, options.get("vocab_size"), **widths)
        budget = options.get("workspace_bytes", _checks.DEFAULT_WORKSPACE_BYTES)
        plan = _linear.plan(op, tensors[0].shape[0], vocab_size, weights, budget)
        lines.append(f"  {plan}")
    return "\n".join(lines)
