# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels for a GPU that is not there, and reads registers and spills.

`TRITON_INTERPRET=0 python -m tests.triton_offline` prints one JSON list; its tools (ptxas,
cuobjdump) are those inside the triton package. A process of its own, because triton.jit decides at
decoration whether a kernel is compiled or interpreted.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from opd_kernels.triton import _divergences, divergence, sparse_gradient, token_logprobs
from opd_kernels.triton._rows import tile

SM_90 = 90
VOCAB_SIZE = 151936
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

_FLOAT64 = ("student_lse_ptr", "teacher_lse_ptr", "lse_ptr", "grad_lse_ptr")
_FLOAT32 = (
    "loss_ptr", "grad_sum_ptr", "statistics_ptr", "token_weights_ptr", "grad_loss_ptr",
    "logprobs_ptr", "entropy_ptr", "grad_logprobs_ptr", "grad_entropy_ptr", "dropped_ptr",
)  # fmt: skip
_INT64, _UINT8 = ("token_ids_ptr", "columns_ptr"), ("kept_ptr",)
_REAL = (
    "student_temperature", "teacher_temperature", "temperature", "weight", "rest", "live",
    "tolerance",
)  # fmt: skip


def variants():
    """(kernel, logits dtype, constexpr values): every kernel, every divergence, both widths."""
    flags = {"HAS_TEMPERATURE": True, "HAS_WEIGHTS": True}
    statistics = {"WITH_STATISTICS": True}
    for number, name in enumerate(_divergences.DIVERGENCES):
        chosen = {"DIVERGENCE": number, **flags}
        yield divergence._divergence_fwd_grad_kernel, "fp32", {**chosen, **statistics}
        # the two with the most live values stand for the rest
        if name in ("jsd", "skew_reverse_kl"):
            yield divergence._divergence_fwd_kernel, "bf16", {**chosen, **statistics}
            yield divergence._divergence_bwd_kernel, "bf16", chosen
    for dtype in ("bf16", "fp32"):
        yield token_logprobs._token_logprobs_fwd_kernel, dtype, {"HAS_TEMPERATURE": True}
        yield token_logprobs._token_logprobs_bwd_kernel, dtype, {"HAS_TEMPERATURE": True}
    marks = {"BLOCK_T": sparse_gradient._MARK_ROWS, "BLOCK_V": sparse_gradient._MARK_COLUMNS}
    weights = {"HAS_WEIGHTS": True}
    yield sparse_gradient._sparse_gradient_mark_kernel, "fp32", {**weights, **marks}
    yield sparse_gradient._sparse_gradient_pack_kernel, "fp32", weights
    yield sparse_gradient._sparse_gradient_add_kernel, "fp32", {}


def compile_for(kernel, dtype: str, constants: dict, capability: int) -> dict:
    """Registers, spilled bytes and vector loads of one variant, compiled at V = VOCAB_SIZE."""
    block_v, num_warps = tile(VOCAB_SIZE)
    constants = {"BLOCK_V": block_v, **constants}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in _FLOAT64:
            signature[name] = "*fp64"
        elif name in _FLOAT32:
            signature[name] = "*fp32"
        elif name in _INT64:
            signature[name] = "*i64"
        elif name in _UINT8:
            signature[name] = "*u8"
        elif name.endswith("_ptr"):
            signature[name] = f"*{dtype}"
        else:
            signature[name] = "fp32" if name in _REAL else "i32"
        # what the launcher finds at V = 151,936 in contiguous rows: everything divisible by 16
        if name.endswith("_ptr") or signature[name] == "i32":
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps}
    )
    usage = _resource_usage(compiled.asm["ptx"], capability)
    return {
        "kernel": kernel.__name__,
        "dtype": dtype,
        "divergence": constants.get("DIVERGENCE"),
        "num_warps": num_warps,
        "vector_loads": len(re.findall(r"ld\.global\S*\.v[48]\.", compiled.asm["ptx"])),
        **usage,
    }


def _resource_usage(ptx: str, capability: int) -> dict[str, int]:
    arch = f"sm_{capability}a" if capability >= SM_90 else f"sm_{capability}"
    assembler = "ptxas-blackwell" if capability >= 100 else "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [
            TOOLS / assembler,
            f"-arch={arch}",
            "-v",
            path,
            "-o",
            Path(folder, "kernel.cubin"),
        ]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", report)
    stores = re.findall(r"(\d+) bytes spill stores", report)
    loads = re.findall(r"(\d+) bytes spill loads", report)
    return {"registers": int(registers), "spilled_bytes": sum(map(int, stores + loads))}


if __name__ == "__main__":
    print(json.dumps([compile_for(*variant, SM_90) for variant in variants()], indent=1))
