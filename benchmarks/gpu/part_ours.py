# SPDX-License-Identifier: Apache-2.0
"""Our ops, forward and backward, beside the bare GEMMs of the same turns; row kernels; memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import opd_kernels as opk
from benchmarks import laws
from benchmarks.gpu import cases, part_ceilings, sparse_teacher, two_vocabularies, verification
from benchmarks.gpu.context import Context
from benchmarks.gpu.device import Device, Run, Time
from benchmarks.gpu.goals import EAGER, FUSED_TOPK, ONE_VOCABULARY, SPARSE, TOLERANT, TOPK, VERIFY
from benchmarks.gpu.results import RowKernel, Timing
from opd_kernels import _dispatch, _gemms, _laws

TOKEN_LOGPROBS, SAMPLES = "token_logprobs", "sample_tokens"
# of the same cost: one to see, and one whose gradient is not that of a weighted likelihood
SPARSE_DIVERGENCES = ("forward_kl", "reverse_kl")
NUM_TOPK, NUM_DRAWS = 64, 50
# calls of a row kernel between two events: one alone would be timed with its launch
CALLS = 10


def grad_dtype_of(student: Tensor) -> int:
    """In what the row kernel leaves dZ of a bfloat16 head, whose logits these are."""
    return _gemms.grad_dtype(student.new_empty(0, dtype=torch.bfloat16))


def row_kernel(name: str, backend: str, student: Tensor, teacher: Tensor) -> tuple:
    """Path A's row kernel and its arguments: loss of each row, dZ in place of student logits."""
    rows = _laws.rows_of("divergence", student)
    packed = _laws.pack(
        rows,
        student.shape[1],
        divergence=name,
        temperature=1.0,
        token_weights=None,
        target=None,
        has_reference=False,
        softcaps=(None, None, None),
        logit_scales=(1.0, 1.0, 1.0),
        labels=None,
        label_weights=None,
    )
    kernel = _dispatch.row_ops(backend).divergence_fwd_grad_
    return kernel, (student, teacher, None, *packed, False, grad_dtype_of(student))


def row_call(name: str, backend: str, student: Tensor, teacher: Tensor) -> Run:
    """A call of it, to be timed."""
    kernel, arguments = row_kernel(name, backend, student, teacher)
    return lambda: kernel(*arguments)


def topk_call(backend: str, logits: Tensor) -> Run:
    """Top-k, log-sum-exp, tail and entropy of the rows."""
    return lambda: opk.topk_logprobs(logits, NUM_TOPK, backend=backend)


def sample_call(backend: str, logits: Tensor) -> Run:
    """Draws from the rows, their weights and log-probs."""
    uniforms = torch.rand(len(logits), NUM_DRAWS, device=logits.device, dtype=torch.float64)
    return lambda: opk.sample_tokens(logits, uniforms, backend=backend)


def logits_pairs(device: Device, sizes: cases.Sizes, count: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Random float32 logits of a chunk, more of them than a cache holds."""
    shape = sizes.shapes[0]
    generator = device.generator(0)

    def logits() -> Tensor:
        values = torch.empty(sizes.row_tokens, shape.vocab_size, device=device.kind)
        return values.normal_(generator=generator).mul_(2.0)

    return [(logits(), logits()) for _ in range(count)]


def in_rotation(runs: list[Run]) -> Run:
    """CALLS calls of one after the other in turn."""

    def run() -> None:
        for turn in range(CALLS):
            runs[turn % len(runs)]()

    return run


def row_kernels(device: Device, context: Context, backends: list[str]) -> None:
    """Bandwidth of the kernels that read and write logits, against a copy in the same part."""
    sizes = context.sizes
    copy = part_ceilings.copy(device, sizes)
    context.row(copy)
    pairs = logits_pairs(device, sizes)
    size = pairs[0][0].numel() * 4
    ids = torch.zeros(sizes.row_tokens, dtype=torch.long, device=device.kind)
    for backend in backends:
        if backend == "reference":
            continue
        variants: dict[str, tuple[Run, int]] = {}
        for name in cases.DIVERGENCES:
            runs = [row_call(name, backend, *pair) for pair in pairs]
            # both rows are read and dZ is written
            is_narrow = grad_dtype_of(pairs[0][0]) != _gemms.AS_LOGITS
            written = size // 2 if is_narrow else size
            variants[f"divergence {name}"] = in_rotation(runs), 2 * size + written
        runs = [
            lambda logits=pair[0], backend=backend: opk.token_logprobs(logits, ids, backend=backend)
            for pair in pairs
        ]
        variants[TOKEN_LOGPROBS] = in_rotation(runs), size
        variants |= sparse_rows(device, backend, pairs)
        for dtype in (torch.float32, torch.bfloat16):
            logits = [pair[0].to(dtype) for pair in pairs]
            for call, name in (
                (topk_call, f"{TOPK} K={NUM_TOPK}"),
                (sample_call, f"{SAMPLES} N={NUM_DRAWS}"),
            ):
                runs = [call(backend, values) for values in logits]
                # one read of the logits
                variants[f"{name} {str(dtype).removeprefix('torch.')}"] = (
                    in_rotation(runs),
                    size * dtype.itemsize // 4,
                )
        times = device.turns({name: run for name, (run, _) in variants.items()}, sizes.rounds)
        for name, time in times.items():
            ms = time.median / CALLS
            rate = variants[name][1] / (1e-3 * ms) / 1e9
            context.row(RowKernel(name, backend, ms, variants[name][1], rate, rate / copy.rate))


def sparse_rows(
    device: Device, backend: str, pairs: list[tuple[Tensor, Tensor]]
) -> dict[str, tuple[Run, int]]:
    """The row kernels of topk_divergence: the second overwrites what the first does not read."""
    num_tokens, vocab_size = pairs[0][0].shape
    size, grad_dtype = pairs[0][0].numel() * 4, grad_dtype_of(pairs[0][0])
    ids = sparse_teacher.teacher_of(device, num_tokens, vocab_size).teacher_ids
    calls: dict[str, list[Run]] = {}
    for overwritten, kept in pairs:
        of_kept = sparse_teacher.row_kernels(backend, kept, ids, grad_dtype)
        of_overwritten = sparse_teacher.row_kernels(backend, overwritten, ids, grad_dtype)
        forward, backward = of_kept
        for name, kernels in ((forward, of_kept), (backward, of_overwritten)):
            kernel, arguments = kernels[name]
            call = partial(kernel, *arguments)
            calls.setdefault(name, []).append(call)
    written = size // 2 if grad_dtype != _gemms.AS_LOGITS else size
    forward, backward = calls
    return {
        forward: (in_rotation(calls[forward]), size),
        backward: (in_rotation(calls[backward]), size + written),
    }


def timing(
    case: str, contestant: str, name: str, head: str, time: Time, floor: Time, **rest
) -> Timing:
    """A row of a contestant that is one of ours."""
    defaults = {"ours_ms": None, "ratio_ours": None, "peak_bytes": None, "allowed_bytes": None}
    return Timing(
        case,
        contestant,
        name,
        head,
        time.median,
        time.best,
        time.rounds,
        floor.median,
        time.median / floor.median,
        **(defaults | rest),
    )


def peak_of(device: Device, inputs: cases.Inputs, run: Run) -> int:
    """Peak of a step that starts without gradients."""
    for tensor in inputs:
        tensor.grad = None
    peak = device.peak_bytes(run)
    for tensor in inputs:
        tensor.grad = None
    return peak


def fused(device: Device, context: Context, shape: cases.Shape, backend: str) -> None:
    """The KLs and JSD, head trained and frozen."""
    sizes = context.sizes
    plain = cases.inputs_of(device, shape, sizes.dtype)
    cut = cases.cut_of(plain, sizes.workspace_bytes, context.lead)
    gemms = cases.Gemms(device, plain, cut)
    split = gemms.best_split()
    options = {"backend": backend, "workspace_bytes": sizes.workspace_bytes}
    variants: dict[tuple[str, ...], Run] = {}
    steps: dict[tuple[str, ...], tuple[cases.Inputs, Run]] = {}
    for head in cases.HEADS:
        inputs = plain.with_head(head)
        variants["floor", head] = gemms.all_of(head, split)
        for name in cases.DIVERGENCES:
            run = cases.step(cases.loss_of(name, **options), inputs)
            variants[name, head] = run
            steps[name, head] = inputs, run
    times = device.turns(variants, sizes.rounds, context.seconds_left())
    for (name, head), (inputs, run) in steps.items():
        context.row(
            timing(
                str(shape),
                f"opd_kernels {backend}",
                name,
                head,
                times[name, head],
                times["floor", head],
                peak_bytes=peak_of(device, inputs, run),
                allowed_bytes=sizes.workspace_bytes + cases.gradient_bytes(shape, head),
                note=f"{cut}, dX in {split}",
            )
        )


def tolerant(device: Device, context: Context, shape: cases.Shape) -> None:
    """`gradient_tolerance` on peaked laws, against the dense GEMMs."""
    sizes = context.sizes
    plain = cases.Inputs(*laws.peaked(shape, sizes.dtype, device=device.kind))
    cut = cases.cut_of(plain, sizes.workspace_bytes, context.lead)
    gemms = cases.Gemms(device, plain, cut)
    inputs = plain.with_head("trained")
    options = {"backend": context.lead, "workspace_bytes": sizes.workspace_bytes}
    variants: dict[object, Run] = {"floor": gemms.all_of("trained", gemms.best_split())}
    for tolerance in (None, *cases.TOLERANCES):
        loss = cases.loss_of("reverse_kl", gradient_tolerance=tolerance, **options)
        variants[tolerance] = cases.step(loss, inputs)
    times = device.turns(variants, sizes.rounds, context.seconds_left())
    for tolerance in (None, *cases.TOLERANCES):
        label = "exact on peaked laws" if tolerance is None else f"{TOLERANT} {tolerance:g}"
        time, floor = times[tolerance], times["floor"]
        context.row(timing(str(shape), label, "reverse_kl", "trained", time, floor))


def token_logprobs(device: Device, context: Context, shape: cases.Shape) -> None:
    """`fused_linear_token_logprobs` over its four GEMMs: it forms the logits twice."""
    sizes = context.sizes
    plain = cases.inputs_of(device, shape, sizes.dtype)
    inputs = plain.with_head("trained")
    # without a teacher a chunk has twice the tokens; the GEMMs are as quick at ours
    cut = cases.cut_of(plain, sizes.workspace_bytes, context.lead)
    gemms = cases.Gemms(device, plain, cut)
    split = gemms.best_split()
    ids = torch.arange(shape.num_tokens, device=device.kind) * 61 % shape.vocab_size

    def floor() -> None:
        for rows in gemms.chunks():
            gemms.student(rows)
            gemms.student(rows)
            gemms.grad_of_hidden(rows, split)
            gemms.grad_of_weight(rows)

    def loss(hidden: Tensor, weight: Tensor, *_: Tensor) -> Tensor:
        out = opk.fused_linear_token_logprobs(
            hidden, weight, ids, workspace_bytes=sizes.workspace_bytes, backend=context.lead
        )
        return out.logprobs.sum()

    run = cases.step(loss, inputs)
    times = device.turns({"floor": floor, "ours": run}, sizes.rounds)
    row = timing(
        str(shape), f"fused_linear_{TOKEN_LOGPROBS}", "", "trained", times["ours"], times["floor"]
    )
    context.row(row)


def sparse(device: Device, context: Context, shape: cases.Shape) -> None:
    """`fused_linear_topk_divergence` over its three GEMMs: no teacher of size V."""
    sizes = context.sizes
    plain = cases.inputs_of(device, shape, sizes.dtype)
    teacher = sparse_teacher.teacher_of(device, shape.num_tokens, shape.vocab_size)
    # without a teacher's logits a chunk has twice the tokens; the GEMMs are as quick at ours
    cut = cases.cut_of(plain, sizes.workspace_bytes, context.lead)
    gemms = cases.Gemms(device, plain, cut)
    split = gemms.best_split()
    options = {"backend": context.lead, "workspace_bytes": sizes.workspace_bytes}
    variants: dict[tuple[str, str], Run] = {}
    for head in cases.HEADS:
        inputs = plain.with_head(head)
        variants["floor", head] = sparse_teacher.floor_of(gemms, head, split)
        for name in SPARSE_DIVERGENCES:
            loss = sparse_teacher.loss_of(name, teacher, **options)
            variants[name, head] = cases.step(loss, inputs)
    times = device.turns(variants, sizes.rounds, context.seconds_left())
    for name, head in variants:
        if name == "floor":
            continue
        num_ids = teacher.teacher_ids.shape[1]
        context.row(
            timing(
                str(shape),
                f"{SPARSE}, K = {num_ids}",
                name,
                head,
                times[name, head],
                times["floor", head],
                note=f"{cut}, dX in {split}",
            )
        )


def topk(device: Device, context: Context, shape: cases.Shape) -> None:
    """`fused_linear_topk` over the teacher's GEMM alone."""
    sizes = context.sizes
    inputs = cases.inputs_of(device, shape, sizes.dtype)
    gemms = cases.Gemms(device, inputs, cases.cut_of(inputs, sizes.workspace_bytes, context.lead))

    def floor() -> None:
        for rows in gemms.chunks():
            gemms.teacher(rows)

    def run() -> None:
        opk.fused_linear_topk(
            inputs.teacher_hidden,
            inputs.teacher_lm_head_weight,
            num_topk=NUM_TOPK,
            workspace_bytes=sizes.workspace_bytes,
            backend=context.lead,
        )

    times = device.turns({"floor": floor, "ours": run}, sizes.rounds)
    label = f"{FUSED_TOPK} K={NUM_TOPK}"
    context.row(timing(str(shape), label, "", "frozen", times["ours"], times["floor"]))


def verify(device: Device, context: Context, shape: cases.Shape) -> None:
    """`fused_linear_speculative_verify` over its two GEMMs, as it is called and as a graph."""
    sizes = context.sizes
    for num_sequences, num_drafts in verification.SIZES:
        drafts = verification.drafts_of(device, shape, sizes.dtype, num_sequences, num_drafts)
        floor = verification.gemms_of(device, drafts)
        variants = {"floor": floor, "floor, graph": device.capture(floor)}
        for mode, options in (
            ("rejection", {}),
            ("block", {}),
            ("rejection, top_p", {"top_p": 0.95}),
        ):
            run = verification.ours(drafts, mode.partition(",")[0], context.lead, **options)
            variants |= {mode: run, f"{mode}, graph": device.capture(run)}
        times = device.turns(variants, sizes.rounds, context.seconds_left())
        case = f"{shape._replace(num_tokens=num_sequences * (num_drafts + 1))}"
        for mode, time in times.items():
            if not mode.startswith("floor"):
                bare = times["floor, graph" if mode.endswith("graph") else "floor"]
                label = f"{VERIFY}, B={num_sequences} G={num_drafts}, {mode}"
                context.row(timing(case, label, "", "frozen", time, bare))


def across(device: Device, context: Context, shape: cases.Shape) -> None:
    """The losses of two vocabularies over their four GEMMs, over eager torch on whole logits, and
    over the loss of one vocabulary; of as many tokens as eager torch has room for."""
    sizes = context.sizes
    shape = shape._replace(num_tokens=min(shape.num_tokens, sizes.row_tokens))
    pair = two_vocabularies.pair_of(device, shape, sizes.dtype)
    whole = cases.inputs_of(device, shape, sizes.dtype)
    cut = cases.cut_of(whole, sizes.workspace_bytes, context.lead)
    gemms = cases.Gemms(device, pair.inputs, cut)
    floor = gemms.all_of("trained", gemms.best_split())
    options = {"workspace_bytes": sizes.workspace_bytes, "backend": context.lead}
    losses = {
        two_vocabularies.OVERLAP: (
            two_vocabularies.overlap_loss(pair, **options),
            two_vocabularies.eager_overlap(pair),
        )
    }
    # the library's sort, which Triton has not
    for backend in context.backends(two_vocabularies.SORTED)[:1]:
        losses[two_vocabularies.SORTED] = (
            two_vocabularies.sorted_loss(**options | {"backend": backend}),
            two_vocabularies.eager_sorted,
        )
    variants: dict[tuple[str, str], Run] = {("", "floor"): floor}
    for op, (ours, eager) in losses.items():
        variants[op, "ours"] = cases.step(ours, pair.inputs)
        variants[op, EAGER] = cases.step(eager, pair.inputs)
    variants["", ONE_VOCABULARY] = cases.step(
        cases.loss_of("reverse_kl", **options), whole.with_head("trained")
    )
    times = device.turns(variants, sizes.rounds, context.seconds_left())
    for op in losses:
        time = times[op, "ours"]
        context.row(timing(str(shape), op, "", "trained", time, times["", "floor"]))
        label = f"{op} over {EAGER}"
        context.row(timing(str(shape), label, "", "trained", time, times[op, EAGER]))
    label = f"{two_vocabularies.OVERLAP} over {ONE_VOCABULARY}"
    time = times[two_vocabularies.OVERLAP, "ours"]
    context.row(timing(str(shape), label, "", "trained", time, times["", ONE_VOCABULARY]))


def sorted_rows(device: Device, context: Context, shape: cases.Shape) -> None:
    """`sorted_l1` from logits over the library's two sorts alone, and over eager torch."""
    sizes = context.sizes
    shape = shape._replace(num_tokens=min(shape.num_tokens, sizes.row_tokens))
    pair = two_vocabularies.pair_of(device, shape, sizes.dtype)
    student, teacher = two_vocabularies.logits_of(device, pair)
    found = [logits.detach().softmax(1) for logits in (student, teacher)]
    for backend in context.backends(two_vocabularies.ROWS)[:1]:

        def loss(student: Tensor, teacher: Tensor, backend: str = backend) -> Tensor:
            return opk.sorted_l1(student, teacher, backend=backend).sum()

        times = device.turns(
            {
                "two sorts": lambda: [law.sort(dim=1, descending=True) for law in found],
                "ours": two_vocabularies.rows_step(loss, student, teacher),
                EAGER: two_vocabularies.rows_step(
                    two_vocabularies.eager_sorted_rows, student, teacher
                ),
            },
            sizes.rounds,
            context.seconds_left(),
        )
        for name in ("two sorts", EAGER):
            label = f"{two_vocabularies.ROWS} over {name}"
            context.row(timing(str(shape), label, "", "", times["ours"], times[name]))


def each(context: Context, what: str, shapes: tuple, case: Callable[[cases.Shape], None]) -> None:
    """A case after the other while there is time; one that fails does not stop the rest."""
    device = context.device()
    for shape in shapes:
        device.free()
        name = f"{what}, {shape}"
        if not context.has_time(name, 1.0):
            continue
        with context.attempt(name):
            case(shape)


def run(context: Context) -> None:
    device = context.device()
    sizes, lead = context.sizes, context.lead
    others = [backend for backend in context.backends() if backend != lead]
    if context.has_time("row kernels"):
        with context.attempt("row kernels"):
            row_kernels(device, context, [lead])
    each(context, "fused", sizes.shapes, lambda shape: fused(device, context, shape, lead))
    # the narrowest pair and the widest, at one vocabulary
    some = tuple(dict.fromkeys((sizes.shapes[0], sizes.shapes[min(2, len(sizes.shapes) - 1)])))
    each(context, "tolerance", some, lambda shape: tolerant(device, context, shape))
    each(context, "logprobs", some[:1], lambda shape: token_logprobs(device, context, shape))
    each(context, "sparse teacher", some, lambda shape: sparse(device, context, shape))
    each(context, "top-k", some, lambda shape: topk(device, context, shape))
    each(context, "verification", some[:1], lambda shape: verify(device, context, shape))
    each(context, "two vocabularies", some[:1], lambda shape: across(device, context, shape))
    each(context, "sorted rows", some[:1], lambda shape: sorted_rows(device, context, shape))
    for backend in others:
        if backend != "reference" and context.has_time(f"row kernels, {backend}", 1.0):
            with context.attempt(f"row kernels, {backend}"):
                row_kernels(device, context, [backend])
        each(
            context,
            f"fused, {backend}",
            sizes.shapes[:3],
            lambda shape, backend=backend: fused(device, context, shape, backend),
        )
