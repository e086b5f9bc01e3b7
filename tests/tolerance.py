# SPDX-License-Identifier: Apache-2.0
"""One rule for every backend: at most twice the error of eager torch with float32 logits.

    err(kernel, truth) <= 2 * err(eager, truth) + floor

truth: float64. In the max norm, floor = 4 * eps(dtype of the output) * max|truth|; and again in the
L2 norm, where the floor is 4 * eps(float32) * |truth| even for 16-bit outputs: rounding averages
out there, so a kernel that rounds its logits to 16 bits fails. No environment changes any of this.
"""

from __future__ import annotations

import torch
from torch import Tensor

EAGER_FACTOR = 2.0
FLOOR_EPS = 4.0

# the truth is itself a float64 sum over V: its own rounding bounds a float64 kernel, in nats
FLOAT64_FLOOR = 1e-12


def assert_within_eager(actual: Tensor, eager: Tensor, truth: Tensor, what: str) -> None:
    """Fail, naming the worst element, unless `actual` is as close to `truth` as the rule asks."""
    assert actual.shape == truth.shape == eager.shape, (
        f"{what}: shapes differ: kernel {tuple(actual.shape)}, eager {tuple(eager.shape)}, "
        f"float64 {tuple(truth.shape)}"
    )
    if truth.numel() == 0:
        return
    got, baseline, exact = (x.detach().to(torch.float64) for x in (actual, eager, truth))
    _assert_same_special_values(got, exact, what)
    finite = exact.isfinite()
    assert baseline[finite].isfinite().all(), f"{what}: the eager baseline is not finite"
    zero = torch.zeros((), dtype=torch.float64, device=exact.device)
    error = torch.where(finite, got - exact, zero).abs()
    eager_error = torch.where(finite, baseline - exact, zero).abs()
    scale = torch.where(finite, exact, zero).abs()

    bound = EAGER_FACTOR * eager_error.max() + _floor(actual.dtype, scale.max())
    worst = int(error.argmax())
    assert error.max() <= bound, (
        f"{what}: max error {error.max():.3e} exceeds {bound:.3e} at index {_index(exact, worst)}: "
        f"kernel {got.flatten()[worst]:.9e}, eager {baseline.flatten()[worst]:.9e}, "
        f"float64 {exact.flatten()[worst]:.9e}; kernel/eager error ratio "
        f"{error.max() / eager_error.max():.2f}, largest float64 value {scale.max():.3e}"
    )
    accumulator = torch.float64 if actual.dtype == torch.float64 else torch.float32
    norm_bound = EAGER_FACTOR * eager_error.norm() + _floor(accumulator, scale.norm())
    assert error.norm() <= norm_bound, (
        f"{what}: L2 error {error.norm():.3e} exceeds {norm_bound:.3e}; kernel/eager error ratio "
        f"{error.norm() / eager_error.norm():.2f}, worst index {_index(exact, worst)}, "
        f"norm of float64 {scale.norm():.3e}"
    )


def assert_relative(actual: Tensor, truth: Tensor, bound: float, what: str) -> None:
    """Fail unless |actual - truth| <= bound * |truth|, element by element."""
    got, exact = actual.detach().to(torch.float64).cpu(), truth.detach().to(torch.float64).cpu()
    assert got.shape == exact.shape, f"{what}: {tuple(got.shape)} against {tuple(exact.shape)}"
    relative = (got - exact).abs() / exact.abs().clamp_min(torch.finfo(torch.float64).tiny)
    worst = int(relative.argmax())
    assert bool((relative <= bound).all()), (
        f"{what}: relative error {relative.max():.3e} > {bound:.1e} at {_index(exact, worst)}: "
        f"kernel {got.flatten()[worst]:.9e}, float64 {exact.flatten()[worst]:.9e}"
    )


def _floor(dtype: torch.dtype, scale: Tensor) -> Tensor:
    if dtype == torch.float64:
        return FLOAT64_FLOOR * scale.clamp_min(1.0)
    return FLOOR_EPS * torch.finfo(dtype).eps * scale


def _assert_same_special_values(got: Tensor, exact: Tensor, what: str) -> None:
    """NaN and infinities of the truth are the kernel's too, and it has no others."""
    same = torch.where(
        exact.isfinite(), got.isfinite(), (got == exact) | (got.isnan() & exact.isnan())
    )
    if not bool(same.all()):
        worst = int((~same).flatten().nonzero()[0])
        raise AssertionError(
            f"{what}: at index {_index(exact, worst)} kernel has {got.flatten()[worst]}, "
            f"float64 {exact.flatten()[worst]} ({int((~same).sum())} such elements)"
        )


def _index(tensor: Tensor, flat: int) -> tuple[int, ...]:
    index = []
    for size in reversed(tensor.shape):
        index.append(flat % size)
        flat //= size
    return tuple(reversed(index))
