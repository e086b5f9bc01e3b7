# SPDX-License-Identifier: Apache-2.0
"""Other people's losses at our shapes, in turns with ours: time, peak memory, gradient error."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from benchmarks.gpu import cases, contestants, verification
from benchmarks.gpu.context import Context
from benchmarks.gpu.device import Device, Run
from benchmarks.gpu.part_ours import peak_of
from benchmarks.gpu.results import Precision, Timing
from benchmarks.peers import Peer

# seconds that a first call may take: with a compiler, and without
FIRST_CALL_S = {True: 25.0, False: 3.0}
# ours with one of torch's defaults off, in case cuBLAS makes use of it for float32 results too
FLOAT32_REDUCTIONS = "no reduced-precision reduction"
# a peer this many times slower than ours needs no further round
SLOW = 3.0


def ordered_cases(sizes: cases.Sizes) -> list[tuple[cases.Shape, str, str]]:
    """(shape, head, divergence), those first that a short run should have."""
    shapes = sizes.shapes
    large = [shape for shape in shapes if shape.vocab_size == shapes[0].vocab_size]
    groups = [(large, "trained"), (large, "frozen")]
    rest = [shape for shape in shapes if shape not in large]
    groups += [(rest, "trained"), (rest, "frozen")]
    return [
        (shape, head, name)
        for group, head in groups
        for shape in group
        for name in cases.DIVERGENCES
    ]


def starts(device: Device, context: Context, name: str, run: Run) -> bool:
    """Whether a first call goes through; if not, the reason is kept."""
    try:
        run()
        device.synchronize()
        return True
    except Exception as error:
        if "CUDA error" in str(error):
            # nothing runs in this process after an illegal access
            raise
        why = "out of memory" if device.is_out_of_memory(error) else f"{type(error).__name__}"
        context.left_out(name, f"{why}: {error}")
        return False


def compete(
    device: Device,
    context: Context,
    inputs: cases.Inputs,
    gemms: cases.Gemms,
    split: int,
    case: tuple[cases.Shape, str, str],
    here: list[str],
    compiled: bool,
) -> None:
    """One loss at one shape by ours and everyone who is compiled at the first call, or is not."""
    shape, head, name = case
    sizes = context.sizes
    inputs = inputs.with_head(head)
    ours = f"opd_kernels {context.lead}"
    options = {"backend": context.lead, "workspace_bytes": sizes.workspace_bytes}
    found = {ours: Peer(cases.loss_of(name, **options))}
    found |= {
        label: peer
        for label, peer in contestants.losses_of(name, sizes.dtype, device.kind, here).items()
        if (contestants.COMPILED in label) == compiled
    }
    variants: dict[str, Run] = {}
    for label, peer in found.items():
        what = f"{label}: {shape}, {name}, head {head}"
        run = cases.step(peer.loss, inputs)
        seconds = FIRST_CALL_S[compiled and label != ours]
        if compiled and context.dry_run:
            context.left_out(label, "a dry run compiles nothing")
        elif context.has_time(what, seconds) and starts(device, context, what, run):
            variants[label] = run
        device.free()
    if ours not in variants or len(variants) == 1:
        return
    peaks = {}
    for label, run in variants.items():
        peaks[label] = peak_of(device, inputs, run)
    variants["floor"] = gemms.all_of(head, split)
    times = device.turns(variants, sizes.rounds, context.seconds_left(), SLOW)
    floor = times.pop("floor")
    for label, time in times.items():
        if label == ours and compiled:
            # it has its row already, and its time is in every other
            continue
        context.row(
            Timing(
                str(shape),
                label,
                name,
                head,
                time.median,
                time.best,
                time.rounds,
                floor.median,
                time.median / floor.median,
                times[ours].median,
                time.median / times[ours].median,
                peaks[label],
                None,
                "logits rounded to 16 bits" if found[label].rounds_logits else "",
            )
        )


def relative_error(gradient: Tensor, truth: Tensor) -> float:
    """In the Frobenius norm."""
    return float((gradient.double() - truth).norm() / truth.norm())


def worse(errors: list[float], others: list[float] | None) -> float | None:
    """The larger ratio of the two gradients' errors to another's, if that was measured."""
    if others is None:
        return None
    return max(error / other for error, other in zip(errors, others, strict=True))


def with_float32_reductions(run: Run) -> Run:
    """The same, split-K GEMMs of bfloat16 not allowed to add their parts up in bfloat16."""
    flags = torch.backends.cuda.matmul

    def restricted() -> None:
        before = flags.allow_bf16_reduced_precision_reduction
        flags.allow_bf16_reduced_precision_reduction = False
        try:
            run()
        finally:
            flags.allow_bf16_reduced_precision_reduction = before

    return restricted


def precision(device: Device, context: Context, law: str, name: str, here: list[str]) -> None:
    """Gradients of everyone against float64 on one small problem."""
    sizes = context.sizes
    shape = sizes.precision
    make = cases.close_inputs_of if law == "student near teacher" else cases.inputs_of
    inputs = make(device, shape, sizes.dtype).with_head("trained")
    exact = cases.Inputs(*(tensor.detach().double() for tensor in inputs)).with_head("trained")
    cases.step(cases.loss_of(name, backend="reference"), exact)()
    truth = exact.student_hidden.grad, exact.student_lm_head_weight.grad
    ours = f"opd_kernels {context.lead}"
    restricted = f"{ours}, {FLOAT32_REDUCTIONS}"
    own = Peer(cases.loss_of(name, backend=context.lead))
    peers = contestants.losses_of(name, sizes.dtype, device.kind, here)
    peers = {label: peer for label, peer in peers.items() if contestants.COMPILED not in label}
    # both of eager first: the others are measured by their errors
    found = {label: peer for label, peer in peers.items() if label.startswith("eager")}
    found |= {ours: own, restricted: own} | peers
    of_eager, of_rounded = None, None
    for label, peer in found.items():
        run = cases.step(peer.loss, inputs)
        if label == restricted:
            run = with_float32_reductions(run)
        if not starts(device, context, f"precision, {label}: {name}, {law}", run):
            continue
        factor = shape.num_tokens if peer.averages else 1
        errors = [
            relative_error(tensor.grad.double() * factor, exact)
            for tensor, exact in zip(inputs[:2], truth, strict=True)
        ]
        if label.startswith("eager"):
            if peer.rounds_logits:
                of_rounded = errors
            else:
                of_eager = errors
        ratios = worse(errors, of_eager), worse(errors, of_rounded)
        context.row(Precision(label, name, law, *errors, *ratios))


def verify(device: Device, context: Context) -> None:
    """flashinfer's chain kernel with its softmax, beside ours from the same logits."""
    sizes, shape = context.sizes, context.sizes.shapes[0]
    for num_sequences, num_drafts in verification.SIZES:
        drafts = verification.drafts_of(device, shape, sizes.dtype, num_sequences, num_drafts)
        logits = verification.logits_of(device, drafts)
        peer = verification.flashinfer(drafts, logits)
        name = f"flashinfer, verification B={num_sequences} G={num_drafts}"
        if not starts(device, context, name, peer):
            continue
        variants = {
            "floor": verification.gemms_of(device, drafts),
            "ours": verification.ours_from_logits(drafts, logits, context.lead),
            name: peer,
        }
        times = device.turns(variants, sizes.rounds, context.seconds_left())
        floor, ours, time = (times[label].median for label in ("floor", "ours", name))
        context.row(
            Timing(
                f"{shape._replace(num_tokens=num_sequences * (num_drafts + 1))}",
                name,
                "",
                "frozen",
                time,
                times[name].best,
                times[name].rounds,
                floor,
                time / floor,
                ours,
                time / ours,
                None,
                None,
                "logits given; the GEMMs are the floor's alone",
            )
        )


def run(context: Context) -> None:
    device, sizes = context.device(), context.sizes
    versions, missing = contestants.importable(context.only_peers)
    for distribution, why in missing.items():
        context.left_out(distribution, why)
    here = list(versions)
    for law in ("independent", "student near teacher"):
        for name in cases.DIVERGENCES:
            if context.has_time(f"precision, {name}, {law}", FIRST_CALL_S[False]):
                precision(device, context, law, name, here)
    if "flashinfer-python" in here and context.has_time("verification", FIRST_CALL_S[True]):
        with context.attempt("verification"):
            verify(device, context)
    current = None
    # a compiler takes longer than all the others together, so it waits for them
    for compiled, case in itertools.product((False, True), ordered_cases(sizes)):
        shape, head, name = case
        if not context.has_time(f"{shape}, {name}, head {head}", FIRST_CALL_S[False]):
            continue
        if current is None or current[0] != shape:
            current = None
            device.free()
            torch.compiler.reset()
            inputs = cases.inputs_of(device, shape, sizes.dtype)
            cut = cases.cut_of(inputs, sizes.workspace_bytes, context.lead)
            gemms = cases.Gemms(device, inputs, cut)
            current = shape, inputs, gemms, gemms.best_split()
        compete(device, context, *current[1:], case, here, compiled)
