# SPDX-License-Identifier: Apache-2.0
"""Which backend runs, and what is said when it can't: argument, context, environment, table."""

from __future__ import annotations

import re
import threading

import pytest
import torch

import opd_kernels as opk
from opd_kernels import _dispatch, _library, env
from opd_kernels._dispatch import Meta, select

CPU = Meta("cpu", torch.float32)
HOPPER = Meta("cuda", torch.bfloat16, (9, 0))
BUILT = ("80-real", "90a-real", "100a-real")


@pytest.fixture(autouse=True)
def _not_emulated(monkeypatch):
    monkeypatch.delenv("OPD_CUDA_EMULATION", raising=False)


@pytest.fixture
def cuda_kernels(monkeypatch):
    """As if the CUDA kernels were built and loaded."""
    monkeypatch.setattr(_library, "CUDA_OBJECTION", None)
    monkeypatch.setattr(_library, "architectures", lambda: BUILT)


@pytest.fixture
def no_cuda_kernels(monkeypatch):
    monkeypatch.setattr(_library, "CUDA_OBJECTION", "the CUDA kernels were not built")


def test_cpu_tensors_run_on_the_cpu_kernel_unless_told():
    assert select("divergence", CPU) == "cpu"


@pytest.mark.usefixtures("no_cuda_kernels")
def test_gpu_tensors_run_on_triton_where_the_cuda_kernels_are_not_built():
    pytest.importorskip("triton")
    assert select("divergence", HOPPER) == "triton"


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize("op", _dispatch.OPS)
def test_gpu_tensors_run_on_the_cuda_kernels(op):
    assert select(op, HOPPER) == "cuda"
    assert _dispatch.row_ops("cuda") is torch.ops.opd_cuda


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        (Meta("cuda", torch.float32, (7, 5)), r"compute capability 7\.5 .* need 8\.0"),
        (
            Meta("cuda", torch.float32, (12, 0)),
            r"built for 80-real, 90a-real, 100a-real; .*OPD_CUDA_ARCHITECTURES=120",
        ),
        (Meta("cuda", torch.float64, (9, 0)), "float64 is not supported by the CUDA kernels"),
        (Meta("cuda", torch.float64), "float64 is not supported by the CUDA kernels"),
    ],
)
def test_the_cuda_kernels_say_what_they_do_not_take(meta, reason):
    with pytest.raises(opk.UnsupportedBackendError, match=f"'cuda' was requested but.*{reason}"):
        select("divergence", meta, "cuda")


@pytest.mark.usefixtures("cuda_kernels")
def test_segments_of_float64_run_on_the_cuda_kernels():
    assert select("segment_scan", Meta("cuda", torch.float64, (9, 0))) == "cuda"


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 0), BUILT, True),
        ((8, 9), BUILT, True),
        ((9, 0), BUILT, True),
        ((10, 0), BUILT, True),
        ((10, 3), BUILT, False),
        ((12, 0), BUILT, False),
        ((9, 0), ("80-real",), False),
        ((9, 0), ("80",), True),
        ((9, 0), ("80-virtual",), True),
        ((8, 0), ("86-real",), False),
        ((10, 3), ("100f-real",), True),
        ((12, 0), ("100f",), False),
    ],
)
def test_code_runs_where_cuda_says(capability, architectures, runs):
    assert _library.runs_on(capability, architectures) is runs


def test_kernels_that_were_not_built_say_how_to_build_them(monkeypatch, tmp_path):
    assert torch.version.cuda or "without CUDA" in _library.CUDA_OBJECTION
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_library, "CUDA_PATH", tmp_path / "_C_cuda.so")
    assert re.search(r"not built; .*OPD_CUDA=1 pip install .*nvcc", _library._load_cuda())
    _library.CUDA_PATH.write_text("not a library")
    assert re.search(r"_C_cuda\.so does not load \(.*rebuild", _library._load_cuda())


def test_the_emulation_takes_cpu_tensors_when_asked(monkeypatch):
    loaded = []
    monkeypatch.setattr(_library, "_load_emulation", loaded.append)
    monkeypatch.setenv("OPD_CUDA_EMULATION", "opd_emulated.so")
    assert select("divergence", CPU, "cuda") == "cuda"
    assert select("divergence", CPU) == "cpu"
    assert set(loaded) == {"opd_emulated.so"}


def test_an_emulation_that_does_not_load_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("OPD_CUDA_EMULATION", str(tmp_path / "missing.so"))
    with pytest.raises(opk.BuildError, match=r"path of opd_emulated\.so, got .*missing\.so"):
        select("divergence", CPU, "cuda")


@pytest.mark.usefixtures("cuda_kernels")
def test_the_choice_for_a_gpu_is_traced_by_dynamo(monkeypatch):
    # what select() asks of a GPU is a constant to torch.compile, not a graph break
    ask = _dispatch._constant_for_dynamo(lambda device, index: (9, 0) if device == "cpu" else None)
    monkeypatch.setattr(_dispatch, "_capability", ask)

    def doubled_by_cuda(x):
        meta = _dispatch.meta_of(x)._replace(device="cuda")
        return x * 2 if select("divergence", meta) == "cuda" else x

    torch._dynamo.reset()
    compiled = torch.compile(doubled_by_cuda, fullgraph=True, backend="eager")
    assert compiled(torch.ones(2)).tolist() == [2.0, 2.0]


def test_capability_is_asked_of_gpus_only(monkeypatch):
    assert _dispatch.meta_of(torch.zeros(1)) == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", {3: (9, 0)}.__getitem__)
    assert _dispatch._capability("cuda", 3) == (9, 0)


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
    monkeypatch.setenv("OPD_CUDA_EMULATION", "")
    assert env.forced_backend() is None
    assert env.cuda_emulation() is None


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
        ("cuda", CPU, "the tensors are on cpu"),
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
