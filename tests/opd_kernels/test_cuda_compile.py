# SPDX-License-Identifier: Apache-2.0
"""The machine code of the CUDA kernels, read on a machine without a GPU.

Every kernel of the build is held to the same limits: it has launch bounds, its registers fit in a
multiprocessor at them, it has no stack and spills nothing, and it reads and writes rows 16 bytes at
a time. EXCEPTIONS lists what a kernel is let off, and why.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from tests import cuda_offline
from tests.cuda_offline import SM_80, Kernel

REGISTERS_OF_A_MULTIPROCESSOR = 65536
DEFAULT, ALL = "few", "all"

LOCAL_MEMORY, WIDE_LOADS, WIDE_STORES = "local memory", "wide loads", "wide stores"


class Exemption(NamedTuple):
    """What the kernels whose whole name matches are let off."""

    kernels: str
    limit: str
    reason: str


EXCEPTIONS = [
    Exemption(r"topk_codec_\w+", WIDE_LOADS, "rows of a few hundred bytes, at multiples of 4"),
    Exemption(r"topk_codec_\w+", WIDE_STORES, "as its loads"),
    Exemption(
        r"(segment_\w+|group_statistics)<\w+>",
        WIDE_LOADS,
        "a segment begins at any token, is read in either direction and with any stride",
    ),
    Exemption(
        r"(segment_\w+|group_statistics)<\w+>",
        WIDE_STORES,
        "as its loads",
    ),
    Exemption(
        r"forward_grad_cluster_kernel<Renyi, \w+>",
        LOCAL_MEMORY,
        "32 bytes of stack on the path of a mass beyond float32, which few rows ever take",
    ),
    Exemption(
        r"divergence_rows<-1, \d+, \d+>",
        LOCAL_MEMORY,
        "every divergence and option in one kernel, with the 255 registers that a thread may have; "
        "plain calls have kernels of their own",
    ),
    Exemption(r"token_logprobs_forward<.*>", WIDE_STORES, "writes three numbers per row"),
    Exemption(
        r"topk_divergence_forward<.*>", WIDE_STORES, "writes three numbers per row and one per id"
    ),
    Exemption(r"topk_logprobs_forward<.*>", WIDE_STORES, "writes num_topk numbers per row"),
    Exemption(r"sample_tokens_sums<.*>", WIDE_STORES, "writes three numbers per 512 columns"),
    Exemption(r"sample_tokens_draw<.*>", WIDE_STORES, "writes a number per draw, where it belongs"),
    Exemption(
        r"speculative_verify_close<\w+>", WIDE_LOADS, "reads 24 bytes per 1,024 columns of a row"
    ),
    Exemption(r"speculative_verify_\w+<\w+>", WIDE_STORES, "writes a few numbers per row or tile"),
    Exemption(r"sparse_gradient_mark", WIDE_STORES, "writes one byte per column, after all rows"),
    Exemption(r"sparse_gradient_pack", WIDE_STORES, "gathers: each value comes from elsewhere"),
]


def is_exempt(kernel: Kernel, limit: str) -> bool:
    return any(row.limit == limit and re.fullmatch(row.kernels, kernel.name) for row in EXCEPTIONS)


@pytest.fixture(scope="module", params=[DEFAULT, pytest.param(ALL, marks=pytest.mark.slow)])
def kernels(request) -> list[Kernel]:
    """Every source for sm_90a and some for the rest, or every source for each architecture."""
    if cuda_offline.missing():
        pytest.skip(cuda_offline.missing())
    return cuda_offline.compile_all(cuda_offline.jobs(request.param == ALL))


def report(kernels: list[Kernel], what: str) -> None:
    lines = "\n".join(map(str, kernels))
    assert not kernels, f"{what}:\n{lines}"


def test_every_source_has_its_kernels(kernels):
    compiled = {kernel.source for kernel in kernels}
    # divergence.cu has the checks and the entry points; its kernels are in files beside it
    expected = set(cuda_offline.sources()) - {"csrc/cuda/divergence.cu"}
    empty = sorted(expected - compiled)
    assert not empty, f"no kernel came of {empty}"
    report([k for k in kernels if k.is_empty and k.arch != SM_80], "compiled to nothing")


def test_cuda_kernels_have_launch_bounds_that_their_registers_fit(kernels):
    report([k for k in kernels if k.threads == 0], "no launch bounds")
    crowded = [k for k in kernels if k.registers_of_all > REGISTERS_OF_A_MULTIPROCESSOR]
    report(crowded, f"more than {REGISTERS_OF_A_MULTIPROCESSOR} registers")


def test_cuda_kernels_use_no_local_memory(kernels):
    spilling = [
        k
        for k in kernels
        if (k.stack_bytes or k.spilled_bytes or k.instructions["local_accesses"])
        and not is_exempt(k, LOCAL_MEMORY)
    ]
    report(spilling, "a stack, spilled registers or accesses of local memory")


def test_cuda_kernels_move_16_bytes_at_a_time(kernels):
    rows = [k for k in kernels if not k.is_empty]
    narrow = [
        k
        for k in rows
        if not k.instructions["wide_loads"] + k.instructions["bulk_copies"]
        and not is_exempt(k, WIDE_LOADS)
    ]
    report(narrow, "no 128-bit load of global memory")
    narrow = [
        k for k in rows if not k.instructions["wide_stores"] and not is_exempt(k, WIDE_STORES)
    ]
    report(narrow, "no 128-bit store to global memory")


def test_every_exception_is_one_of_some_kernel(kernels):
    names = {kernel.name for kernel in kernels}
    stale = [
        row for row in EXCEPTIONS if not any(re.fullmatch(row.kernels, name) for name in names)
    ]
    assert not stale, stale


def test_the_reader_sees_what_it_is_to_find():
    """On text of the form that nvcc 13 and cuobjdump print, so that it runs without them."""
    name = "_Z3rowIfEvPfi"
    log = f"""
ptxas info    : Compiling entry function '{name}' for 'sm_90a'
ptxas info    : Function properties for {name}
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 61 registers, used 1 barriers, 16 bytes stack, 128 bytes smem
"""
    ptx = (
        f".visible .entry {name}(\n.param .u64 a\n)\n.maxntid 512, 1, 1\n.minnctapersm 2\n{{\n}}\n"
    )
    sass = f"""
\t\tFunction : {name}
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;   /* 0x0 */
        /*0010*/              @!P0 STL [R1], R4 ;                     /* 0x0 */
        /*0020*/                   STG.E desc[UR4][R2.64], R4 ;       /* 0x0 */
        /*0030*/                   UBLKCP.S.G [UR8], [UR4], UR6 ;     /* 0x0 */
"""
    (kernel,) = cuda_offline.read(log, ptx, sass, "row.cu", "90a")
    assert kernel.name == "row<float>"
    assert (kernel.registers, kernel.threads, kernel.blocks) == (61, 512, 2)
    assert (kernel.stack_bytes, kernel.spilled_bytes, kernel.shared_bytes) == (16, 12, 128)
    assert kernel.registers_of_all == 64 * 1024
    found = {what for what, count in kernel.instructions.items() if count}
    assert found == {"local_accesses", "global_loads", "wide_loads", "global_stores", "bulk_copies"}
