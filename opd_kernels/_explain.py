# SPDX-License-Identifier: Apache-2.0
"""explain(op, ...): which backend a call would take and how it would be cut, in words."""

from __future__ import annotations

import importlib
import inspect

import torch
from torch import Tensor

from . import _checks, _dispatch, _laws, _parallel, _plan, _topk_divergence_path
from .divergences import parse_sum

# where the heads are among the tensors of a call
_HEADS = {
    "fused_linear_divergence": (1, 3),
    "fused_linear_token_logprobs": (1,),
    "fused_linear_topk": (1,),
    "fused_linear_topk_divergence": (1,),
    "fused_linear_overlap_divergence": (1, 3),
    "fused_linear_sample_tokens": (1,),
    "fused_linear_sorted_l1": (1, 3),
    "fused_linear_speculative_verify": (2, 4),
}
_OVERLAP = "fused_linear_overlap_divergence"
_TWO_VOCABULARIES = (_OVERLAP, "fused_linear_sorted_l1")
# the tensor whose dtype and device the choice depends on, where it is not the first
_MODEL = {"speculative_verify": 2, "fused_linear_speculative_verify": 3}


def explain(op: str, *tensors: Tensor, **options: object) -> str:
    """The dispatch and the plan of a call, as text; nothing is computed.

    Args:
        op: name of a public op, such as "fused_linear_divergence".
        tensors: the tensors of the call, in its order.
        options: its keyword arguments; `backend`, the vocabulary sizes, `workspace_bytes`,
            `divergence`, `reference_lm_head_weight`, `process_group`, `gradient_tolerance` and the
            low-rank pair matter. With `process_group` every rank must ask: they exchange their row
            counts.

    Returns:
        One line for the choice, one per backend with its reason, and the plan of a fused op.

    Raises:
        ValueError: no such op, or a workspace that holds no token. UnsupportedBackendError.
    """
    _checks.one_of("explain", "op", op, _dispatch.OPS)
    if not tensors:
        raise ValueError(f"explain: {op} must be given the tensors of the call, got none.")
    module = importlib.import_module(f"opd_kernels.{op}")
    known = [
        item.name
        for name in _dispatch.FUNCTIONS.get(op, (op,))
        for item in inspect.signature(getattr(module, name)).parameters.values()
        if item.kind is item.KEYWORD_ONLY
    ]
    for name in options:
        _checks.one_of("explain", "option", name, known)
    heads = _HEADS.get(op, ())
    if heads and len(tensors) <= heads[-1]:
        raise ValueError(
            f"explain: {op} must be given {heads[-1] + 1} tensors, got {len(tensors)}."
        )
    model = _MODEL.get(op, 0)
    if len(tensors) <= model:
        raise ValueError(f"explain: {op} must be given {model + 1} tensors, got {len(tensors)}.")
    meta = _dispatch.meta_of(tensors[model])
    chosen = _dispatch.select(op, meta, options.get("backend"))
    lines = [f"{op}: backend '{chosen}' for {meta.dtype} on {meta.device}"]
    for backend, available, reason in _dispatch.table(op, meta):
        state = "can run" if available else "cannot run"
        lines.append(f"  {backend}: {state}{f' ({reason})' if reason else ''}")
    if op == "fused_linear_speculative_verify" and chosen != "reference":
        lines.append(f"  {_verification(module, tensors, options)}")
    elif op in _TWO_VOCABULARIES and chosen != "reference":
        lines.append(f"  {_two_vocabularies(op, module, tensors, options)}")
    elif heads and chosen != "reference":
        lines.append(f"  {_plan_of(op, tensors, heads, options)}")
    return "\n".join(lines)


def _plan_of(
    op: str, tensors: tuple[Tensor, ...], positions: tuple[int, ...], options: dict
) -> _plan.Plan:
    weights = {f"head {i}": tensors[i] for i in positions}
    if options.get("reference_lm_head_weight") is not None:
        weights["reference_lm_head_weight"] = options["reference_lm_head_weight"]
    weights, group = _parallel.local_heads(op, weights, options.get("process_group"))
    widths = {name: weight.shape[0] for name, weight in weights.items()}
    vocab_size, group_name = _parallel.vocabulary(op, options.get("vocab_size"), widths, group)
    whole_rows, in_parts = _plan.NO_PATH_B, True
    trained = bool(group_name) or (tensors[1].requires_grad and torch.is_grad_enabled())
    if op in ("fused_linear_topk", "fused_linear_sample_tokens"):
        trained = False
    if op == "fused_linear_divergence":
        ids = [
            divergence.id for _, divergence in parse_sum(options.get("divergence", "reverse_kl"))
        ]
        whole_rows = _parallel.WHOLE_ROWS if group_name else _laws.needs_whole_rows(ids)
        in_parts = not group_name and not options.get("gradient_tolerance")
    per_token = 0
    if op == "fused_linear_topk_divergence":
        whole_rows = _parallel.WHOLE_ROWS if group_name else whole_rows
        in_parts = False
        if len(tensors) > 2 and tensors[2].dim() == 2:
            per_token = _topk_divergence_path.BYTES_PER_ID * tensors[2].shape[1]
    lora = options.get("student_lora", options.get("lora"))
    return _plan.plan(
        op,
        tensors[0].shape[0],
        _parallel.planned_size(group_name, vocab_size),
        list(weights.values()),
        options.get("workspace_bytes", _checks.DEFAULT_WORKSPACE_BYTES),
        whole_rows=whole_rows,
        in_parts=in_parts,
        low_rank=0 if lora is None else lora[0].shape[0],
        per_token=per_token,
        packs_columns=bool(options.get("gradient_tolerance")),
        frozen_head=tensors[0].requires_grad and not tensors[1].requires_grad,
        trained=trained,
    )


def _two_vocabularies(op: str, module, tensors: tuple[Tensor, ...], options: dict) -> str:
    one = module.as_one_vocabulary(tensors, options) if op == _OVERLAP else None
    if one is None:
        return str(module.cut(tensors, options))
    inner = "fused_linear_divergence"
    return f"{inner}: {_plan_of(inner, tuple(one[0]), _HEADS[inner], one[1])}"


def _verification(module, tensors: tuple[Tensor, ...], options: dict) -> _plan.Plan:
    heads = [tensors[i] for i in _HEADS[module._OP] if tensors[i] is not None]
    widths = {f"head {i}": head.shape[0] for i, head in enumerate(heads)}
    plan, _ = module.cut(
        module._OP,
        tuple(tensors[0].shape),
        _checks.vocab_prefix(module._OP, options.get("vocab_size"), **widths),
        heads,
        options.get("workspace_bytes", _checks.DEFAULT_WORKSPACE_BYTES),
        options.get("mode", "rejection"),
        options.get("with_acceptance", False),
        0 if options.get("student_lora") is None else options["student_lora"][0].shape[0],
    )
    return plan
