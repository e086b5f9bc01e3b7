# SPDX-License-Identifier: Apache-2.0
"""Which backend runs, and what is said when it can't: argument, context, environment, table."""

from __future__ import annotations

import threading

import pytest
import torch

import opd_kernels as opk
from opd_kernels import _dispatch, env
from opd_kernels._dispatch import Meta, select

CPU = Meta("cpu", torch.float32)


def test_cpu_tensors_run_on_the_cpu_kernel_unless_told():
    assert select("divergence", CPU) == "cpu"


def test_gpu_tensors_run_on_triton():
    pytest.importorskip("triton")
    assert select("divergence", Meta("cuda", torch.bfloat16)) == "triton"


def test_a_named_backend_wins_over_context_and_environment(monkeypatch):
    monkeypatch.setenv("OPD_BACKEND", "reference")
    assert select("divergence", CPU) == "reference"
    with opk.use_backend("cpu"):
        assert select("divergence", CPU) == "cpu"
        with opk.use_backend("reference"):
            assert select("divergence", CPU) == "reference"
            assert select("divergence", CPU, "cpu") == "cpu"
        assert select("divergence", CPU) == "cpu"
    assert select("divergence", CPU) == "reference"


def test_use_backend_is_undone_by_an_error():
    with pytest.raises(RuntimeError, match="inside"), opk.use_backend("reference"):
        raise RuntimeError("inside")
    assert select("divergence", CPU) == "cpu"


def test_use_backend_is_of_one_thread():
    chosen = []
    with opk.use_backend("reference"):
        thread = threading.Thread(target=lambda: chosen.append(select("divergence", CPU)))
        thread.start()
        thread.join()
        assert select("divergence", CPU) == "reference"
    assert chosen == ["cpu"]


def test_an_empty_environment_variable_is_none(monkeypatch):
    monkeypatch.setenv("OPD_BACKEND", "")
    assert env.forced_backend() is None


def test_unknown_backend_names_are_refused(monkeypatch):
    with (
        pytest.raises(ValueError, match=r"use_backend: backend must be one of .*, got 'tpu'"),
        opk.use_backend("tpu"),
    ):
        pass
    monkeypatch.setenv("OPD_BACKEND", "tpu")
    with pytest.raises(ValueError, match="got 'tpu'"):
        select("divergence", CPU)


@pytest.mark.parametrize(
    ("backend", "meta", "reason"),
    [
        ("cuda", CPU, "no CUDA C\\+\\+ kernels"),
        ("cpu", Meta("cuda", torch.float32), "the tensors are on cuda"),
        ("triton", Meta("cpu", torch.float64), "float64 is not supported by the Triton kernels"),
        ("triton", Meta("mps", torch.float32), "the tensors are on mps"),
    ],
)
def test_a_forced_backend_that_cannot_run_says_why(backend, meta, reason):
    pytest.importorskip("triton")
    with pytest.raises(
        opk.UnsupportedBackendError, match=f"'{backend}' was requested but.*{reason}"
    ):
        select("divergence", meta, backend)


def test_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(opk.UnsupportedBackendError, match="TRITON_INTERPRET=1"):
        select("divergence", CPU, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select("divergence", CPU, "triton") == "triton"


def test_nothing_that_can_run_lists_every_reason():
    with pytest.raises(opk.UnsupportedBackendError) as raised:
        select("divergence", Meta("mps", torch.float32))
    for word in ("cuda:", "cpu:", "triton:", "backend='reference'"):
        assert word in str(raised.value)


def test_kernel_table_has_a_row_for_each_op_and_backend():
    rows = opk.kernel_table()
    backends = [row.backend for row in _dispatch.BACKENDS["divergence"]]
    assert {(row["op"], row["backend"]) for row in rows} == {
        (op, backend) for op in _dispatch.OPS for backend in backends
    }
    for row in rows:
        assert row["available"] or row["reason"], row


def test_every_op_obeys_use_backend():
    # the reference differs from the kernels in the last bits, which tells who ran
    student, teacher = torch.randn(2, 4, 200)
    with opk.use_backend("reference"):
        forced = opk.divergence(student, teacher)
    assert torch.equal(forced, opk.divergence(student, teacher, backend="reference"))


def test_errors_are_the_builtins_that_a_caller_expects():
    for error in (opk.UnsupportedBackendError, opk.BuildError):
        assert issubclass(error, opk.OpdError)
    assert issubclass(opk.UnsupportedBackendError, NotImplementedError)
    assert issubclass(opk.BuildError, ImportError)
