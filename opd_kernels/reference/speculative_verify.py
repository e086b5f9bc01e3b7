# SPDX-License-Identifier: Apache-2.0
"""Verification of drafts from its definitions: every law formed whole, in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .divergences import forward_kl


class SpeculativeVerification(NamedTuple):
    """num_accepted, next_token [B] int32; accepted [B, G] bool; the rest float64, nats.

    student_logprobs [B, G], teacher_logprobs [B, G + 1]; acceptance and divergence [B, G], of which
    the one that was not asked for is NaN.
    """

    num_accepted: Tensor
    next_token: Tensor
    accepted: Tensor
    student_logprobs: Tensor
    teacher_logprobs: Tensor
    acceptance: Tensor
    divergence: Tensor


def speculative_verify(
    draft_token_ids: Tensor,
    student_logits: Tensor | None,
    teacher_logits: Tensor,
    *,
    uniforms: Tensor | None = None,
    mode: str = "rejection",
    num_draft: Tensor | None = None,
    temperature: float = 1.0,
    student_temperature: float | None = None,
    top_k: int = 0,
    student_top_k: int | None = None,
    top_p: float = 1.0,
    student_top_p: float | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    vocab_size: int | None = None,
    num_topk: int = 25,
    threshold: float | None = None,
    history: Tensor | None = None,
    with_acceptance: bool = False,
) -> SpeculativeVerification:
    """Keeps the first n drafts of each sequence and draws the token after them.

    rejection: u_i q_i(x_i) < p_i(x_i), then norm(max(p_n - q_n, 0)), or p_G;
    block: n = max {i: u_{i-1} < h_i}, then norm(max(w_n p_n - q_n, 0)), or p_G;
    topk: rank of x_i in p_i < num_topk, then p_n;
    threshold: until KL(p_i || q_i) > threshold * mean of the last window, if whole, then p_n;
    greedy: x_i = argmax p_i, then argmax p_n

    Args:
        draft_token_ids: [B, G].
        student_logits: [B, G, >= V] or None. teacher_logits: [B, G + 1, >= V].
        uniforms: [B, G + 1] in [0, 1): a coin per draft and the one that draws.
        mode: as above.
        num_draft: [B] drafts that there are.
        temperature, top_k, top_p: of both sides, or the teacher's; 0 and 1 cut nothing.
        student_temperature, student_top_k, student_top_p: the student's.
        student_softcap, teacher_softcap: c of cap(x) = c tanh(x / c); None for none.
        student_logit_scale, teacher_logit_scale: factors before cap.
        vocab_size: V. Default: every column.
        num_topk: of topk. threshold, history [B, window]: of threshold.
        with_acceptance: sum_v min(p_v, q_v) too.

    Returns:
        SpeculativeVerification without gradient.

    Source: arXiv:2211.17192, 2302.01318, 2403.10444, 2410.11325, 2510.07842.
    """
    drafts = draft_token_ids.long()
    num_sequences, num_drafts = drafts.shape
    is_greedy = mode == "greedy"
    teacher_options = (temperature, top_k, top_p)
    student_options = tuple(
        of_both if value is None else value
        for value, of_both in zip(
            (student_temperature, student_top_k, student_top_p), teacher_options, strict=True
        )
    )
    z_p = _logits(teacher_logits, vocab_size, teacher_logit_scale, teacher_softcap)
    log_p = _law(z_p, *((1.0, 0, 1.0) if is_greedy else teacher_options))
    has_student = student_logits is not None
    if has_student:
        z_q = _logits(student_logits, vocab_size, student_logit_scale, student_softcap)
        log_q = _law(z_q, *((1.0, 0, 1.0) if is_greedy else student_options))
    else:
        log_q = torch.full_like(log_p[:, :num_drafts], math.nan)
    p, q = log_p.exp(), log_q.exp()
    if num_draft is None:
        num_draft = torch.full((num_sequences,), num_drafts, device=drafts.device)
    left = num_draft.long()
    places = torch.arange(num_drafts, device=drafts.device)
    real = places < left.unsqueeze(1)
    known = real & (drafts >= 0) & (drafts < p.shape[2])
    ids = torch.where(known, drafts, 0).unsqueeze(2)
    # as logs: a ratio of two probabilities may be one of numbers that are too small for float64
    p_of, q_of = (
        torch.where(known, law[:, :num_drafts].gather(2, ids).squeeze(2), math.nan)
        for law in (log_p, log_q)
    )
    broken = p_of.isnan()
    if mode in ("rejection", "block", "threshold"):
        broken |= q_of.isnan()
    divergence = torch.full(drafts.shape, math.nan, dtype=torch.float64, device=drafts.device)
    if uniforms is None:
        uniforms = p.new_zeros(num_sequences, num_drafts + 1)
    uniforms = uniforms.to(torch.float64)
    coins = uniforms[:, :num_drafts]
    weight = torch.ones_like(p[:, 0, 0])
    if mode == "block":
        n, weight = _block(p, q, p_of, q_of, coins, left)
        lost = (broken & real).any(1)
    else:
        if mode == "rejection":
            keep = coins.log() + q_of < p_of
        elif mode == "topk":
            keep = _ranks(z_p[:, :num_drafts], ids) < min(num_topk, z_p.shape[2])
        elif mode == "greedy":
            keep = ids.squeeze(2) == z_p[:, :num_drafts].argmax(2)
        else:
            whole = [_law(z, t, 0, 1.0) for z, t in ((z_p, temperature), (z_q, student_options[0]))]
            divergence = _without_noise(forward_kl(whole[0][:, :num_drafts], whole[1]))
            keep = ~_is_above(divergence, threshold, history)
        n = (keep & real & ~broken).cumprod(1).sum(1)
        lost = torch.nn.functional.pad(broken & real, (0, 1)).gather(1, n.unsqueeze(1)).squeeze(1)
    accepted = places < n.unsqueeze(1)
    refused = n < left
    rows = torch.arange(num_sequences, device=drafts.device)
    p_next = p[rows, n]
    log_q_next = torch.nn.functional.pad(log_q, (0, 0, 0, 1), value=math.nan)[rows, n]
    if is_greedy:
        best = torch.where(z_p.isnan(), -math.inf, z_p)[rows, n].argmax(1)
        residual = torch.nn.functional.one_hot(best, p.shape[2]).to(torch.float64)
        residual = torch.where(p_next.isnan(), math.nan, residual)
        uniforms = torch.zeros_like(uniforms)
    elif mode in ("rejection", "block"):
        minus = (weight.unsqueeze(1) * p_next - log_q_next.exp()).clamp(min=0.0)
        residual = torch.where(refused.unsqueeze(1), minus, p_next)
        residual = torch.where(residual.sum(1, keepdim=True) == 0, p_next, residual)
    else:
        residual = p_next
    lost = lost | residual.isnan().any(1)
    residual = torch.where(lost.unsqueeze(1), 1.0, residual)
    token = _drawn(residual, uniforms[:, -1])
    is_next = torch.arange(num_drafts + 1, device=drafts.device) == n.unsqueeze(1)
    at_token = [law.gather(1, token.unsqueeze(1)) for law in (log_q_next, log_p[rows, n])]
    at_token = [torch.where(lost.unsqueeze(1), math.nan, value) for value in at_token]
    student = torch.where(accepted, q_of, math.nan)
    student = torch.where(is_next[:, :-1] & refused.unsqueeze(1), at_token[0], student)
    teacher = torch.where(accepted, p_of, math.nan)
    teacher = torch.nn.functional.pad(teacher, (0, 1), value=math.nan)
    teacher = torch.where(is_next, at_token[1], teacher)
    judged = real & (places <= n.unsqueeze(1)) & ~broken
    overlap = torch.minimum(p[:, :num_drafts], q).sum(2)
    wanted = judged & (with_acceptance and mode in ("rejection", "block"))
    return SpeculativeVerification(
        n.to(torch.int32),
        torch.where(lost, -1, token).to(torch.int32),
        accepted,
        student,
        teacher,
        torch.where(wanted, overlap, math.nan),
        torch.where(judged, divergence, math.nan),
    )


def _logits(logits: Tensor, vocab_size: int | None, scale: float, cap: float | None) -> Tensor:
    z = scale * logits.detach()[..., :vocab_size].to(torch.float64)
    return z if cap is None else cap * torch.tanh(z / cap)


def _law(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Log-probabilities; NaN in every entry of a row that is no law."""
    z = logits / temperature
    if 0 < top_k < z.shape[-1]:
        smallest = z.topk(top_k, -1).values[..., -1:]
        z = torch.where(z < smallest, -math.inf, z)
    if top_p < 1.0:
        sorted_p, order = z.softmax(-1).sort(-1, descending=True)
        before = sorted_p.cumsum(-1) - sorted_p
        # the first entry is always kept, and the last one that is has the smallest z
        count = (before < top_p).sum(-1, keepdim=True).clamp(min=1)
        smallest = z.gather(-1, order.gather(-1, count - 1))
        z = torch.where(z < smallest, -math.inf, z)
    is_broken = (z.isnan() | (z == math.inf)).any(-1, keepdim=True)
    return torch.where(is_broken, math.nan, z.log_softmax(-1))


def _ranks(z: Tensor, ids: Tensor) -> Tensor:
    """Entries before the id, by z descending and then by id."""
    own = z.gather(2, ids)
    columns = torch.arange(z.shape[2], device=z.device)
    return ((z > own) | ((z == own) & (columns < ids))).sum(2)


def _without_noise(divergence: Tensor) -> Tensor:
    """What is below 1e-10 is the rounding of equal laws."""
    return torch.where(divergence < 1e-10, 0.0, divergence)


def _is_above(divergence: Tensor, threshold: float, history: Tensor | None) -> Tensor:
    """d_i > threshold * mean of the last window, 0 * inf = 0; False while a value is missing."""
    above = torch.zeros(divergence.shape, dtype=torch.bool, device=divergence.device)
    before = divergence[:, :0]
    if history is not None:
        before = _without_noise(history.to(torch.float64))
    window = divergence.shape[1] if history is None else history.shape[1]
    for i in range(divergence.shape[1]):
        if window > 0 and before.shape[1] >= window and threshold < math.inf:
            mean = before[:, before.shape[1] - window :].mean(1)
            limit = torch.where(mean.isnan(), math.nan, 0.0) if threshold == 0 else threshold * mean
            above[:, i] = divergence[:, i] > limit
        before = torch.cat([before, divergence[:, i : i + 1]], 1)
    return above


def _block(p, q, p_of, q_of, coins, left) -> tuple[Tensor, Tensor]:
    """(n, w_n) by Algorithm 2 of arXiv:2403.10444; p_of and q_of are logs."""
    weight = torch.ones_like(p[:, 0, 0])
    n, chosen = torch.zeros_like(left), weight
    for i in range(1, p_of.shape[1] + 1):
        ratio = (p_of[:, i - 1] - q_of[:, i - 1]).exp()
        ratio = torch.where((p_of[:, i - 1] == -math.inf) & ~q_of[:, i - 1].isnan(), 0.0, ratio)
        weight = torch.where(
            weight == 0, 0.0 * ratio.clamp(max=1.0), (weight * ratio).clamp(max=1.0)
        )
        chance = weight
        if i < p_of.shape[1]:
            mass = (weight[:, None] * p[:, i] - q[:, i]).clamp(min=0.0).sum(1)
            inside = torch.where(mass == 0, 0.0, mass / (mass + 1.0 - weight))
            chance = torch.where(left == i, weight, inside)
        passed = (coins[:, i - 1] < chance) & (i <= left)
        n = torch.where(passed, i, n)
        chosen = torch.where(passed, weight, chosen)
    return n, chosen


def _drawn(masses: Tensor, uniforms: Tensor) -> Tensor:
    """min {v: the sum of masses up to v > u * their sum}, never one without mass."""
    upto = masses.cumsum(1)
    place = uniforms.unsqueeze(1) * upto[:, -1:]
    first = torch.searchsorted(upto, place, right=True).squeeze(1)
    last = masses.shape[1] - 1 - (masses > 0).flip(1).to(torch.int8).argmax(1)
    return torch.minimum(first, last)
