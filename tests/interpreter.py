# SPDX-License-Identifier: Apache-2.0
"""What the tests change of Triton 3.7's interpreter: arithmetic no GPU has, and slowness."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.language import core, semantic
from triton.runtime import interpreter


def compute_as_hardware_does(patch: pytest.MonkeyPatch) -> None:
    _round_to_bfloat16_as_hardware_does(patch)
    _fuse_multiply_and_add_as_hardware_does(patch)


def work_things_out_once(patch: pytest.MonkeyPatch) -> None:
    """The interpreter finds the same types, shapes and names anew for each operation.

    That is most of what an operation on a row of a test costs.
    """
    _patch_the_language_once_per_launch(patch)
    _remember_types(patch)
    _broadcast_equal_shapes_as_they_are(patch)


def _round_to_bfloat16_as_hardware_does(patch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts float32 to bfloat16 where every GPU rounds to nearest even."""
    convert = interpreter._convert_float

    def convert_float(values, source, target, rounding_mode):
        if source == tl.float32 and target == tl.bfloat16:
            rounded = torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16)
            return rounded.view(torch.uint16).numpy()
        return convert(values, source, target, rounding_mode)

    patch.setattr(interpreter, "_convert_float", convert_float)


def _fuse_multiply_and_add_as_hardware_does(patch: pytest.MonkeyPatch) -> None:
    """The interpreter rounds the product of a fused multiply-add."""

    def create_fma(self, x, y, z):
        wide = [value.data.astype(np.float64) for value in (x, y, z)]
        fused = (wide[0] * wide[1] + wide[2]).astype(z.data.dtype)
        return interpreter.TensorHandle(fused, z.dtype)

    patch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)


def _patch_the_language_once_per_launch(patch: pytest.MonkeyPatch) -> None:
    """The interpreter patches triton.language anew in each call of a device function.

    That is half of its time. Once per launch is enough, for each of the two modules.
    """
    patch_language = interpreter._patch_lang
    patched, names_of = set(), {}

    def patch_once(function):
        namespace = function.__globals__
        names = names_of.get(id(namespace))
        if names is None:
            values = {id(value) for value in namespace.values()}
            names = frozenset(m.__name__ for m in (tl, tl.core) if id(m) in values)
            names_of[id(namespace)] = names
        if names in patched:
            return None
        is_launch = not patched
        patched.add(names)
        scope = patch_language(function)
        if is_launch:
            restore = scope.restore

            def restore_and_forget():
                patched.clear()
                restore()

            scope.restore = restore_and_forget
        return scope

    patch.setattr(interpreter, "_patch_lang", patch_once)


def _remember_types(patch: pytest.MonkeyPatch) -> None:
    """By their names, which say all of them: what numpy calls a type, its shape, its size."""
    np_dtype, np_dtypes = interpreter._get_np_dtype, {}

    def np_dtype_of(dtype):
        if dtype.name not in np_dtypes:
            np_dtypes[dtype.name] = np_dtype(dtype)
        return np_dtypes[dtype.name]

    init_block_type, block_types = core.block_type.__init__, {}

    def block_type(self, element_ty, shape):
        sizes = tuple(size.value if isinstance(size, core.constexpr) else size for size in shape)
        key = element_ty.name, sizes
        if key not in block_types:
            init_block_type(self, element_ty, shape)
            block_types[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = block_types[key]

    init_tensor, shapes = core.tensor.__init__, {}

    def tensor(self, handle, type):
        if type.name not in shapes:
            init_tensor(self, handle, type)
            shapes[type.name] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[type.name]

    patch.setattr(interpreter, "_get_np_dtype", np_dtype_of)
    patch.setattr(core.block_type, "__init__", block_type)
    patch.setattr(core.tensor, "__init__", tensor)


def _broadcast_equal_shapes_as_they_are(patch: pytest.MonkeyPatch) -> None:
    broadcast = semantic.TritonSemantic.broadcast_impl_value

    def broadcast_others(self, lhs, rhs):
        one, two = lhs.type, rhs.type
        if one.is_block() and two.is_block() and one.shape.values == two.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    patch.setattr(semantic.TritonSemantic, "broadcast_impl_value", broadcast_others)
