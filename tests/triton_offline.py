# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels for a GPU that is not there, and reads registers and spills.

`TRITON_INTERPRET=0 python -m tests.triton_offline [all]` prints one JSON list; its ptxas is that of
the triton package, whose own report is read. The launchers run as they are, up to the launch: what
is compiled is what a call on a GPU would compile. A process of its own, because triton.jit decides
at decoration whether a kernel is compiled or interpreted.
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


def compile_all(capability: int, names: Sequence[str]) -> list[dict]:
    """Registers, spilled bytes and vector loads of each variant, compiled at V = VOCAB_SIZE."""
    triton.runtime.driver.set_active(_AbsentGpu(capability))
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

    modules = (
        divergence,
        _divergence_phases,
        sparse_gradient,
        token_logprobs,
        topk_divergence,
        topk_logprobs,
        sample_tokens,
        speculative_verify,
    )
    for module in modules:
        module.launch = launch
    described = []
    for chosen, call in calls(names):
        described.append(chosen)
        call()
    return rows


def calls(names: Sequence[str]):
    """(what it is, a call of a launcher): every kernel, these divergences, both widths."""
    for name in names:
        chosen = {"options": PLAIN, "divergence": name}
        plain = {"divergence": name, "temperature": (0.7, 1.3), "token_weights": torch.ones(2)}
        for dtype in (torch.float32, torch.bfloat16):
            if dtype == torch.bfloat16 and name not in ("jsd", "skew_reverse_kl", "alpha_beta"):
                continue
            logits, laws = call_of(dtype, **plain)
            yield {**chosen, "dtype": _name(dtype)}, partial(_plain, logits, laws)
    logits, laws = call_of(torch.float32, divergence="skew_forward_kl")
    chosen = {"options": PLAIN, "divergence": "skew_forward_kl", "dtype": "fp32"}
    yield chosen, partial(_phases, logits, laws)
    logits, laws = call_of(torch.float32, **everything())
    every = tuple(names) != FEW
    chosen = {"options": EVERYTHING, "divergence": None, "dtype": "fp32"}
    # of the three kernels that hold every option, a third of a minute each: the one that needs the
    # most registers; with the whole family the other two
    for grad_dtype in (2, -1) if every else (2,):
        yield chosen, partial(divergence.divergence_fwd_grad_, *logits, *laws, True, grad_dtype)
    if every:
        yield chosen, partial(divergence.divergence_fwd, *logits, *laws, True)
    state = torch.empty(2, laws.state_size, dtype=torch.float64)
    yield chosen, partial(divergence.divergence_bwd, torch.ones(2), state, *logits, *laws)
    for dtype in (torch.bfloat16, torch.float32):
        for options in (PLAIN, EVERYTHING):
            chosen = {"options": options, "divergence": None, "dtype": _name(dtype)}
            yield chosen, partial(_token_logprobs, dtype, options)
            for num_ids in (64, MAX_IDS):
                yield chosen, partial(_topk_divergence, dtype, options, num_ids)
            yield chosen, partial(_topk_logprobs, dtype, options)
            if dtype == torch.float32:
                yield chosen, partial(_sample_tokens, dtype, options)
                yield chosen, partial(_speculative_verify, options)
    yield {"options": PLAIN, "divergence": None, "dtype": "fp32"}, _sparse_gradient


def call_of(dtype: torch.dtype, **keywords):
    """([student, teacher, reference], laws) of two rows."""
    has_reference = keywords.get("has_reference", False)
    logits = [torch.empty(2, VOCAB_SIZE, dtype=dtype) for _ in range(2 + has_reference)]
    return [*logits, None][:3], laws_of(logits[0], VOCAB_SIZE, **keywords)


def everything() -> dict:
    """Every option of a call at once."""
    rows, ids = torch.ones(2), torch.zeros(2, 4, dtype=torch.int64)
    return {
        "divergence": [
            (rows, D.renyi(0.3)),
            (0.5, "cross_entropy"),
            (1.0, "concrete_score"),
            (0.7, D.skew_forward_kl(0.2)),
        ],
        "temperature": (rows, 2.0),
        "token_weights": rows,
        "target": targets.geometric(0.3, 0.5, 0.2, detach=False),
        "has_reference": True,
        "softcaps": (5.0, 4.0, 3.0),
        "logit_scales": (0.5, 1.5, 2.0),
        "biases": tuple(torch.empty(VOCAB_SIZE) for _ in range(3)),
        "labels": ids[:, :2],
        "label_weights": torch.ones(2, 2),
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
    state = torch.empty(2, laws.state_size, dtype=torch.float64)
    for phase in (LSE, ROW_SUMS, TERMS, FINISH):
        divergence.divergence_phase_(state, *logits, *laws, phase, 16, True)
    for grad_dtype in (2, -1):
        divergence.divergence_bwd_(torch.ones(2), state, *logits, *laws, 16, grad_dtype)


def _law(options: str) -> tuple:
    """OPD_LAW of two rows."""
    if options == EVERYTHING:
        return torch.empty(VOCAB_SIZE), torch.ones(2), [0.5, 30.0, 1.0], VOCAB_SIZE
    return None, None, [1.0, 0.0, 0.7], VOCAB_SIZE


def _token_logprobs(dtype: torch.dtype, options: str) -> None:
    logits, ids = torch.empty(2, VOCAB_SIZE, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    ones, law = torch.ones(2), _law(options)
    _, lse, entropy = token_logprobs.token_logprobs_fwd(logits, ids, *law)
    grads = ones, ones.double(), ones
    token_logprobs.token_logprobs_bwd(*grads, logits, ids, lse, entropy, *law)
    if dtype == torch.float32:
        token_logprobs.token_logprobs_bwd_(*grads, logits, ids, lse, entropy, *law, 2)


def _topk_divergence(dtype: torch.dtype, options: str, num_ids: int) -> None:
    logits = torch.empty(2, VOCAB_SIZE, dtype=dtype)
    ids, law = torch.zeros(2, num_ids, dtype=torch.int64), _law(options)
    _, _, lse, _ = topk_divergence.topk_divergence_fwd(logits, ids, *law)
    arguments = logits, ids, torch.ones(2, num_ids), torch.ones(2), lse, *law
    topk_divergence.topk_divergence_bwd(*arguments)
    if dtype == torch.float32:
        topk_divergence.topk_divergence_bwd_(*arguments, 2)


def _topk_logprobs(dtype: torch.dtype, options: str) -> None:
    logits = torch.empty(2, VOCAB_SIZE, dtype=dtype)
    law, ids, num_topk = (None, None, [1.0, 0.0, 1.0], VOCAB_SIZE), None, 64
    if options == EVERYTHING:
        law = (torch.empty(VOCAB_SIZE), torch.ones(2), [0.5, 30.0, 1.0], VOCAB_SIZE)
        ids, num_topk = torch.zeros(2, 4, dtype=torch.int64), 4096
    topk_logprobs.topk_logprobs_fwd(logits, ids, *law, num_topk)


def _sample_tokens(dtype: torch.dtype, options: str) -> None:
    logits, uniforms = torch.empty(2, VOCAB_SIZE, dtype=dtype), torch.zeros(2, 50).double()
    law = (None, None, [1.0, 0.0, 1.0], VOCAB_SIZE)
    if options == EVERYTHING:
        law = (torch.empty(VOCAB_SIZE), torch.ones(2), [0.5, 30.0, 1.0], VOCAB_SIZE)
    sample_tokens.sample_tokens_fwd(logits, uniforms, *law, 1.3)


def _speculative_verify(options: str) -> None:
    """Both sides under one law; with a cut, which plain calls have too."""
    logits, ids = torch.empty(2, VOCAB_SIZE), torch.zeros(2, dtype=torch.int64)
    bias, temperatures, numbers, vocab_size = _law(options)
    law = bias, temperatures, numbers, vocab_size
    lse, floor, *_ = speculative_verify.speculative_verify_rows_fwd(logits, ids, *law, 50, 0.9)
    ones, sides = torch.ones(2).double(), (bias, bias, temperatures, temperatures)
    speculative_verify.speculative_verify_residual_fwd(
        logits, logits, ids, ids, lse, floor, lse, floor, ones, ones, ones, *sides, numbers * 2,
        vocab_size, True,
    )  # fmt: skip


def _sparse_gradient() -> None:
    grad_logits, weights = torch.empty(2, VOCAB_SIZE), torch.ones(2)
    kept = sparse_gradient.sparse_gradient_mark(grad_logits, weights, 1e-4)
    columns = torch.arange(3)
    packed = torch.empty(2, 3)
    sparse_gradient.sparse_gradient_pack_(packed, grad_logits, weights, columns, kept)
    sparse_gradient.sparse_gradient_add_(torch.empty(VOCAB_SIZE, 64), columns, torch.empty(3, 64))


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
    print(json.dumps(compile_all(SM_90, names), indent=1))
