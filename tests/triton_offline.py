# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels for a GPU that is not there, and reads registers and spills.

`TRITON_INTERPRET=0 python -m tests.triton_offline [all]` prints one JSON object; its ptxas is that
of the triton package, whose own report is read. The launchers run as they are, up to the launch:
what is compiled is what a call on a GPU would compile. A process of its own, because triton.jit
decides at decoration whether a kernel is compiled or interpreted.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from opd_kernels import divergences as D
from opd_kernels import targets
from opd_kernels._cells import MAX_IDS
from opd_kernels.divergence import FINISH, LSE, ROW_SUMS, TERMS
from opd_kernels.triton import (
    _divergence_phases,
    divergence,
    sample_tokens,
    segment_scan,
    sparse_gradient,
    speculative_verify,
    token_logprobs,
    topk_divergence,
    topk_logprobs,
)
from opd_kernels.triton._divergences import DIVERGENCES
from tests.checks import laws_of

SM_90 = 90
VOCAB_SIZE = 151936
PLAIN, EVERYTHING = "plain", "everything"
# the leanest and one with many live values; test_triton_compile.py runs the rest where it is slow
FEW = ("forward_kl", "skew_reverse_kl")
# tokens of batches that one compilation must serve
BATCHES = (1, 2, 7, 16, 17, 128)


class _AbsentGpu:
    """What triton asks the driver for before it launches."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


MODULES = (
    divergence,
    _divergence_phases,
    segment_scan,
    sparse_gradient,
    token_logprobs,
    topk_divergence,
    topk_logprobs,
    sample_tokens,
    speculative_verify,
)


def launch_by(launch: Callable) -> None:
    """What the launchers call from here on."""
    for module in MODULES:
        module.launch = launch


def variants_of(batches: Sequence[int], names: Sequence[str]) -> dict[str, int]:
    """How often calls that differ in their batch alone would compile each kernel."""
    launched: list[list[tuple[str, str]]] = []

    def launch(kernel, num_programs, num_warps, *args, **constants):
        assert num_programs > 0
        kernel.warmup(*args, **constants, num_warps=num_warps, grid=(1,))

    def found(*, key, fn, **_):
        launched[-1].append((fn.name.rsplit(".")[-1], key))
        # not to be compiled
        return True

    launch_by(launch)
    triton.knobs.runtime.jit_cache_hook = found
    for rows in batches:
        launched.append([])
        for _, call in (*calls(names, rows), *_segment_calls(rows)):
            call()
    triton.knobs.runtime.jit_cache_hook = None
    variants: dict[str, int] = {}
    for same in zip(*launched, strict=True):
        (name,) = {kernel for kernel, _ in same}
        variants[name] = max(variants.get(name, 0), len(set(same)))
    return variants


def compile_all(names: Sequence[str]) -> list[dict]:
    """Registers, spilled bytes and vector loads of each variant, compiled at V = VOCAB_SIZE."""
    rows = []

    def launch(kernel, num_programs, num_warps, *args, **constants):
        compiled, usage = compile_and_read(
            lambda: kernel.warmup(*args, **constants, num_warps=num_warps, grid=(1,))
        )
        loads = re.findall(r"ld\.global\S*\.v[48]\.", compiled.asm["ptx"])
        rows.append(
            {
                "kernel": kernel.__name__,
                **described[-1],
                "num_warps": num_warps,
                "vector_loads": len(loads),
                **usage,
            }
        )

    launch_by(launch)
    described = []
    for chosen, call in calls(names):
        described.append(chosen)
        call()
    return rows


def calls(names: Sequence[str], rows: int = 2):
    """(what it is, a call of a launcher): every kernel, these divergences, both widths."""
    ones = torch.ones(rows)
    for name in names:
        chosen = {"options": PLAIN, "divergence": name}
        plain = {"divergence": name, "temperature": (0.7, 1.3), "token_weights": ones}
        for dtype in (torch.float32, torch.bfloat16):
            if dtype == torch.bfloat16 and name not in ("jsd", "skew_reverse_kl", "alpha_beta"):
                continue
            logits, laws = call_of(rows, dtype, **plain)
            yield {**chosen, "dtype": _name(dtype)}, partial(_plain, logits, laws)
    logits, laws = call_of(rows, torch.float32, divergence="skew_forward_kl")
    chosen = {"options": PLAIN, "divergence": "skew_forward_kl", "dtype": "fp32"}
    yield chosen, partial(_phases, logits, laws)
    logits, laws = call_of(rows, torch.float32, **everything(rows))
    every = tuple(names) != FEW
    chosen = {"options": EVERYTHING, "divergence": None, "dtype": "fp32"}
    # of the three kernels that hold every option, a third of a minute each: the one that needs the
    # most registers; with the whole family the other two
    for grad_dtype in (2, -1) if every else (2,):
        yield chosen, partial(divergence.divergence_fwd_grad_, *logits, *laws, True, grad_dtype)
    if every:
        yield chosen, partial(divergence.divergence_fwd, *logits, *laws, True)
    state = torch.empty(rows, laws.state_size, dtype=torch.float64)
    yield chosen, partial(divergence.divergence_bwd, ones, state, *logits, *laws)
    for dtype in (torch.bfloat16, torch.float32):
        for options in (PLAIN, EVERYTHING):
            chosen = {"options": options, "divergence": None, "dtype": _name(dtype)}
            yield chosen, partial(_token_logprobs, rows, dtype, options)
            for num_ids in (64, MAX_IDS):
                yield chosen, partial(_topk_divergence, rows, dtype, options, num_ids)
            yield chosen, partial(_topk_logprobs, rows, dtype, options)
            if dtype == torch.float32:
                yield chosen, partial(_sample_tokens, rows, dtype, options)
                yield chosen, partial(_speculative_verify, rows, options)
    yield {"options": PLAIN, "divergence": None, "dtype": "fp32"}, partial(_sparse_gradient, rows)


def call_of(rows: int, dtype: torch.dtype, **keywords):
    """([student, teacher, reference], laws) of so many rows."""
    has_reference = keywords.get("has_reference", False)
    logits = [torch.empty(rows, VOCAB_SIZE, dtype=dtype) for _ in range(2 + has_reference)]
    return [*logits, None][:3], laws_of(logits[0], VOCAB_SIZE, **keywords)


def everything(rows: int) -> dict:
    """Every option of a call at once."""
    ones, ids = torch.ones(rows), torch.zeros(rows, 3 + rows % 2, dtype=torch.int64)
    return {
        "divergence": [
            (ones, D.renyi(0.3)),
            (0.5, "cross_entropy"),
            (1.0, "concrete_score"),
            (0.7, D.skew_forward_kl(0.2)),
        ],
        "temperature": (ones, 2.0),
        "token_weights": ones,
        "target": targets.geometric(0.3, 0.5, 0.2, detach=False),
        "has_reference": True,
        "softcaps": (5.0, 4.0, 3.0),
        "logit_scales": (0.5, 1.5, 2.0),
        "biases": tuple(torch.empty(VOCAB_SIZE) for _ in range(3)),
        "labels": ids,
        "label_weights": torch.ones(ids.shape),
        "token_ids": ids[:, 0].contiguous(),
        "topk_ids": ids,
    }


def both_ways(logits, laws, with_statistics: bool) -> None:
    _, state, _ = divergence.divergence_fwd(*logits, *laws, with_statistics)
    divergence.divergence_bwd(torch.ones(2), state, *logits, *laws)


def _plain(logits, laws) -> None:
    if logits[0].dtype == torch.float32:
        # with the gradient in 16 bits, as 16-bit heads on a GPU take it, and in float32
        for grad_dtype in (2, -1):
            divergence.divergence_fwd_grad_(*logits, *laws, False, grad_dtype)
    else:
        both_ways(logits, laws, False)


def _phases(logits, laws) -> None:
    rows = len(logits[0])
    state = torch.empty(rows, laws.state_size, dtype=torch.float64)
    for phase in (LSE, ROW_SUMS, TERMS, FINISH):
        divergence.divergence_phase_(state, *logits, *laws, phase, 16, True)
    for grad_dtype in (2, -1):
        divergence.divergence_bwd_(torch.ones(rows), state, *logits, *laws, 16, grad_dtype)


def _law(rows: int, options: str, temperature: float = 0.7) -> tuple:
    """OPD_LAW of so many rows."""
    if options == EVERYTHING:
        return torch.empty(VOCAB_SIZE), torch.ones(rows), [0.5, 30.0, 1.0], VOCAB_SIZE
    return None, None, [1.0, 0.0, temperature], VOCAB_SIZE


def _token_logprobs(rows: int, dtype: torch.dtype, options: str) -> None:
    logits, ids = torch.empty(rows, VOCAB_SIZE, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    ones, law = torch.ones(rows), _law(rows, options)
    _, lse, entropy = token_logprobs.token_logprobs_fwd(logits, ids, *law)
    grads = ones, ones.double(), ones
    token_logprobs.token_logprobs_bwd(*grads, logits, ids, lse, entropy, *law)
    if dtype == torch.float32:
        token_logprobs.token_logprobs_bwd_(*grads, logits, ids, lse, entropy, *law, 2)


def _topk_divergence(rows: int, dtype: torch.dtype, options: str, num_ids: int) -> None:
    logits, num_ids = torch.empty(rows, VOCAB_SIZE, dtype=dtype), num_ids - rows % 2
    ids, law = torch.zeros(rows, num_ids, dtype=torch.int64), _law(rows, options)
    _, _, lse, _ = topk_divergence.topk_divergence_fwd(logits, ids, *law)
    arguments = logits, ids, torch.ones(rows, num_ids), torch.ones(rows), lse, *law
    topk_divergence.topk_divergence_bwd(*arguments)
    if dtype == torch.float32:
        topk_divergence.topk_divergence_bwd_(*arguments, 2)


def _topk_logprobs(rows: int, dtype: torch.dtype, options: str) -> None:
    logits = torch.empty(rows, VOCAB_SIZE, dtype=dtype)
    law, ids, num_topk = _law(rows, options, 1.0), None, 64
    if options == EVERYTHING:
        ids, num_topk = torch.zeros(rows, 3 + rows % 2, dtype=torch.int64), 4096
    topk_logprobs.topk_logprobs_fwd(logits, ids, *law, num_topk)


def _sample_tokens(rows: int, dtype: torch.dtype, options: str) -> None:
    logits, uniforms = torch.empty(rows, VOCAB_SIZE, dtype=dtype), torch.zeros(rows, 50).double()
    sample_tokens.sample_tokens_fwd(logits, uniforms, *_law(rows, options, 1.0), 1.3)


def _speculative_verify(rows: int, options: str) -> None:
    """Both sides under one law; with a cut, which plain calls have too."""
    logits, ids = torch.empty(rows, VOCAB_SIZE), torch.zeros(rows, dtype=torch.int64)
    bias, temperatures, numbers, vocab_size = _law(rows, options)
    law = bias, temperatures, numbers, vocab_size
    lse, floor, *_ = speculative_verify.speculative_verify_rows_fwd(logits, ids, *law, 50, 0.9)
    ones, sides = torch.ones(rows).double(), (bias, bias, temperatures, temperatures)
    speculative_verify.speculative_verify_residual_fwd(
        logits, logits, ids, ids, lse, floor, lse, floor, ones, ones, ones, *sides, numbers * 2,
        vocab_size, True,
    )  # fmt: skip


def _sparse_gradient(rows: int) -> None:
    grad_logits, weights = torch.empty(rows, VOCAB_SIZE), torch.ones(rows)
    kept = sparse_gradient.sparse_gradient_mark(grad_logits, weights, 1e-4)
    columns = torch.arange(rows)
    packed = torch.empty(rows, len(columns))
    sparse_gradient.sparse_gradient_pack_(packed, grad_logits, weights, columns, kept)
    sparse_gradient.sparse_gradient_add_(
        torch.empty(VOCAB_SIZE, 64), columns, torch.empty(len(columns), 64)
    )


def _segment_calls(rows: int):
    """Of kernels that tests/triton_offline_segment_scan.py compiles; so many segments."""
    values = torch.empty(3 * rows)
    offsets = torch.arange(0, 3 * rows + 1, 3)
    for num_steps in ((1 << 63) - 1, rows):
        yield (
            None,
            partial(segment_scan.segment_scan_fwd, values, offsets, 0.9, 0, num_steps, 1, False),
        )
    for reduction in (0, 2):
        yield None, partial(segment_scan.segment_scan_reduce, values, None, offsets, reduction)
    per_segment = torch.empty(rows)
    yield None, partial(segment_scan.segment_scan_broadcast, per_segment, None, offsets, 3 * rows)
    yield None, partial(segment_scan.segment_scan_group_statistics, values, None, offsets, 1)


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


_REPORTS: dict[str, str] = {}


def compile_and_read(compile: Callable[[], CompiledKernel]) -> tuple[CompiledKernel, dict]:
    """A kernel, with its registers and spilled bytes: the report of the assembler that made it."""
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        kernel = compile()
    # nothing is printed of a kernel that this process has compiled before
    report = _REPORTS.setdefault(kernel.hash, printed.getvalue())
    (registers,) = re.findall(r"Used (\d+) registers", report)
    stores = re.findall(r"(\d+) bytes spill stores", report)
    loads = re.findall(r"(\d+) bytes spill loads", report)
    return kernel, {"registers": int(registers), "spilled_bytes": sum(map(int, stores + loads))}


if __name__ == "__main__":
    names = DIVERGENCES if "all" in sys.argv[1:] else FEW
    triton.runtime.driver.set_active(_AbsentGpu(SM_90))
    variants = variants_of(BATCHES, FEW)
    print(json.dumps({"variants": variants, "compiled": compile_all(names)}, indent=1))
