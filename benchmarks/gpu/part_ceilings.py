# SPDX-License-Identifier: Apache-2.0
"""What this machine can do without us: a copy, and GEMMs at the shapes of our chunks."""

from __future__ import annotations

import torch

from benchmarks.gpu import cases
from benchmarks.gpu.context import Context
from benchmarks.gpu.device import Device, Time
from benchmarks.gpu.results import Ceiling


def copy(device: Device, sizes: cases.Sizes) -> Ceiling:
    """A device-to-device copy, bytes read plus bytes written, over two pairs of buffers."""
    count = sizes.copy_bytes // 4
    generator = device.generator(0)
    pairs = []
    for _ in range(2):
        source = torch.empty(count, device=device.kind).normal_(generator=generator)
        pairs.append((source, torch.empty_like(source)))
    turn = 0

    def run() -> None:
        nonlocal turn
        source, target = pairs[turn % 2]
        target.copy_(source)
        turn += 1

    time = device.turns({"": run}, 3 * sizes.rounds)[""]
    return _ceiling("copy", time, 2 * sizes.copy_bytes, f"{sizes.copy_bytes >> 20} MiB", "GB/s")


def square(device: Device, sizes: cases.Sizes) -> Ceiling:
    """The GEMM that data sheets are about, random numbers in it."""
    size = sizes.square
    generator = device.generator(0)
    left, right = (
        torch.randn(size, size, generator=generator, device=device.kind, dtype=sizes.dtype)
        for _ in range(2)
    )
    out = torch.empty(size, size, device=device.kind)
    time = device.turns({"": lambda: device.mm(left, right, out)}, sizes.rounds)[""]
    return _ceiling("square GEMM", time, 2 * size**3, f"{size}^3", "TFLOP/s")


def _ceiling(name: str, time: Time, work: int, shape: str, unit: str) -> Ceiling:
    scale = 1e9 if unit == "GB/s" else 1e12
    return Ceiling(name, time.median, time.best, work / (1e-3 * time.median) / scale, unit, shape)


def of_chunk(device: Device, context: Context, shape: cases.Shape) -> None:
    """Each of the op's GEMMs over all chunks of the case, dX in every cut."""
    sizes = context.sizes
    inputs = cases.inputs_of(device, shape, sizes.dtype)
    cut = cases.cut_of(inputs, sizes.workspace_bytes, context.lead)
    gemms = cases.Gemms(device, inputs, cut)

    def over_chunks(gemm):
        def run() -> None:
            for rows in gemms.chunks():
                gemm(rows)

        return run

    variants = {
        "student logits": over_chunks(gemms.student),
        "teacher logits": over_chunks(gemms.teacher),
        "dW": over_chunks(gemms.grad_of_weight),
    }
    for split in gemms.splits():
        name = "dX" if split == 1 else f"dX, K in {split}"
        variants[name] = over_chunks(lambda rows, split=split: gemms.grad_of_hidden(rows, split))
    times = device.turns(variants, sizes.rounds)
    for name, time in times.items():
        size = shape.teacher_hidden_size if "teacher" in name else shape.student_hidden_size
        work = 2 * shape.num_tokens * shape.vocab_size * size
        context.row(_ceiling(name, time, work, f"{shape}, {cut}", "TFLOP/s"))


def run(context: Context) -> None:
    device = context.device()
    for name, ceiling in (("copy", copy), ("square GEMM", square)):
        if context.has_time(name):
            with context.attempt(name):
                context.row(ceiling(device, context.sizes))
        device.free()
    for shape in context.sizes.shapes:
        device.free()
        if context.has_time(f"GEMMs of {shape}", 2.0):
            with context.attempt(f"GEMMs of {shape}"):
                of_chunk(device, context, shape)
