# SPDX-License-Identifier: Apache-2.0
"""As tests/triton_offline.py, for the segment kernels: their arguments are of other kinds.

`TRITON_INTERPRET=0 python -m tests.triton_offline_segment_scan` prints one JSON list.
"""

from __future__ import annotations

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from opd_kernels.triton import segment_scan
from tests.triton_offline import SM_90, compile_and_read

_POINTERS = {
    "offsets_ptr": "i64", "index_ptr": "i64", "out_index_ptr": "i64", "count_ptr": "i64",
    "totals_ptr": "fp64", "partial_ptr": "fp64", "weight_ptr": "fp64", "mask_ptr": "u8",
}  # fmt: skip
_REAL = ("discount_high", "discount_low", "scale_high", "scale_low")


def variants():
    """(kernel, constexpr values): each kernel, with and without what it may leave out."""
    kernels = segment_scan
    bits = {"LANE_BITS": kernels.CHUNK.bit_length(), "CHUNK": kernels.CHUNK}
    totals = {"TOTALS": kernels._TOTALS, "CHUNK": kernels.CHUNK}
    for flag in (False, True):
        scan = {"PREFIX": flag, "HAS_DISCOUNT": flag, **bits}
        yield kernels._scan_totals_kernel, scan
        yield kernels._scan_kernel, {**scan, **totals, "CHUNK_BITS": kernels._CHUNK_BITS}
        yield kernels._window_kernel, {"PREFIX": flag, "CHUNK": kernels.CHUNK}
        yield kernels._broadcast_kernel, {"HAS_WEIGHTS": flag, "CHUNK": kernels.CHUNK}
        yield kernels._group_statistics_kernel, {"HAS_MASK": flag, "CHUNK": kernels.CHUNK}
    for sign in (-1, 0, 1):
        weighted = {"HAS_WEIGHTS": sign != 0, "SIGN": sign, "CHUNK": kernels.CHUNK}
        yield kernels._reduce_chunks_kernel, weighted
        yield kernels._reduce_segments_kernel, {"IS_MEAN": True, "SIGN": sign, **totals}


def compile_for(kernel, constants: dict, capability: int) -> dict:
    """Registers and spilled bytes of one variant."""
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = f"*{_POINTERS.get(name, 'fp32')}"
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            assert name in _REAL or name in segment_scan._SIZES, name
            signature[name] = "fp32" if name in _REAL else "i32"
    num_warps = 1 if kernel is segment_scan._reduce_segments_kernel else segment_scan._NUM_WARPS
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    _, usage = compile_and_read(
        lambda: triton.compile(source, target=target, options={"num_warps": num_warps})
    )
    return {"kernel": kernel.__name__, "num_warps": num_warps, **usage}


if __name__ == "__main__":
    print(json.dumps([compile_for(*variant, SM_90) for variant in variants()], indent=1))
