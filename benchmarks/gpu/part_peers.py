# SPDX-License-Identifier: Apache-2.0
"""Other people's losses at our shapes, in turns with ours: time, peak memory, gradient error."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import cases, contestants, verification
from benchmarks.gpu.context import Context, DeviceLost, is_lost
from benchmarks.gpu.device import Device, Run
from benchmarks.gpu.part_ours import peak_of
from benchmarks.gpu.results import Precision, Timing
from benchmarks.peers import Peer

# seconds that a first call may take: with a compiler, and without
FIRST_CALL_S = {True: 25.0, False: 3.0}
# and until a compiler is taken to hang; who may have one at the first call
SILENT_S = 120.0
COMPILERS = (contestants.COMPILED, "flashinfer")
# ours with one of torch's defaults off, in case cuBLAS makes use of it for float32 results too
FLOAT32_REDUCTIONS = "no reduced-precision reduction"
# a peer this many times slower than ours needs no further round
SLOW = 3.0
# before the errors of gradients: both KLs, since one peer has the forward one alone, and a compiler
FIRST_CASES = 3


class Case(NamedTuple):
    """A loss at a shape; `compiled`: by those whose first call compiles, or by the others."""

    shape: cases.Shape
    head: str
    name: str
    compiled: bool

    def __str__(self) -> str:
        who = ", compiled" if self.compiled else ""
        return f"{self.shape}, {self.name}, head {self.head}{who}"


def ordered_cases(sizes: cases.Sizes) -> list[Case]:
    """Those first that a short run should have: a first figure of everyone before a second one.

    A compiler takes longer than all the others together, so after one case it waits for them.
    """
    shapes = sizes.shapes
    large = [shape for shape in shapes if shape.vocab_size == shapes[0].vocab_size]
    groups = [(large, "trained"), (large, "frozen")]
    rest = [shape for shape in shapes if shape not in large]
    groups += [(rest, "trained"), (rest, "frozen")]
    plain = [
        Case(shape, head, name, False)
        for group, head in groups
        for shape in group
        for name in cases.DIVERGENCES
    ]
    compiled = [case._replace(compiled=True) for case in plain]
    return [plain[0], compiled[0], *plain[1:], *compiled[1:]]


def starts(device: Device, context: Context, name: str, run: Run, who: str = "") -> bool:
    """Whether a first call goes through; if not, the reason is kept.

    `who`, by default `name`, is not called any more once its call took a process down.
    """
    who = who or name
    if who in context.done:
        context.left_out(name, "its call ended an earlier process of this part")
        return False
    compiles = any(word in who for word in COMPILERS)
    with context.underway(who, again=True, silent_s=SILENT_S if compiles else 0.0):
        try:
            run()
            device.synchronize()
            return True
        except Exception as error:
            if is_lost(error):
                context.failed(name, error)
                raise DeviceLost(f"{name}: {error}") from error
            why = "out of memory" if device.is_out_of_memory(error) else f"{type(error).__name__}"
            context.left_out(name, f"{why}: {error}")
            return False


def compete(
    device: Device,
    context: Context,
    inputs: cases.Inputs,
    gemms: cases.Gemms,
    split: int,
    case: Case,
    here: list[str],
) -> None:
    """One loss at one shape by ours and everyone who is compiled at the first call, or is not."""
    shape, head, name, compiled = case
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
        # ours may fail at one shape; a peer that takes a process down is not tried again
        elif context.has_time(what, seconds) and starts(
            device, context, what, run, what if label == ours else label
        ):
            variants[label] = run
        device.free()
    if ours not in variants or len(variants) == 1:
        return
    peaks = {}
    for label, run in variants.items():
        peaks[label] = peak_of(device, inputs, run)
    variants["floor"] = gemms.all_of(head, split)
    # everyone has run twice by now
    gemms.all_of(head, split)()
    times = device.turns(variants, sizes.rounds, context.seconds_left(), SLOW, warm=False)
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
    current: dict[cases.Shape, tuple] = {}

    def at(case: Case) -> None:
        if case.shape not in current:
            current.clear()
            device.free()
            torch.compiler.reset()
            inputs = cases.inputs_of(device, case.shape, sizes.dtype)
            cut = cases.cut_of(inputs, sizes.workspace_bytes, context.lead)
            gemms = cases.Gemms(device, inputs, cut)
            current[case.shape] = inputs, gemms, gemms.best_split()
        compete(device, context, *current[case.shape], case, here)

    def compete_in(chosen: list[Case]) -> None:
        for case in chosen:
            context.case(str(case), partial(at, case), FIRST_CALL_S[False])

    ordered = ordered_cases(sizes)
    compete_in(ordered[:FIRST_CASES])
    for law in ("independent", "student near teacher"):
        for name in cases.DIVERGENCES:
            measure = partial(precision, device, context, law, name, here)
            context.case(f"precision, {name}, {law}", measure, FIRST_CALL_S[False])
    if "flashinfer-python" in here:
        context.case("verification", partial(verify, device, context), FIRST_CALL_S[True])
    compete_in(ordered[FIRST_CASES:])
