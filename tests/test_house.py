# SPDX-License-Identifier: Apache-2.0
"""The laws of the house, each with a gate that names what is missing. docs/adding.md says why."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

import opd_kernels
from opd_kernels import _dispatch, _registration
from opd_kernels.divergences import DIVERGENCES
from opd_kernels.reference import divergences as reference_divergences
from tests import native, public_api
from tests.cases import LABEL_SPECS, SPECS

ROOT = Path(__file__).parents[1]
HEADER = "csrc/include/opd/divergences.h"
OPS_CPP = "csrc/torch/ops.cpp"
ROW_OPS = "csrc/torch/row_ops.h"
MIRROR = "opd_kernels/triton/_divergences.py"
SOURCE_SUFFIXES = (".py", ".cpp", ".cc", ".c", ".h", ".cu", ".cuh")
STANDARD_LIBRARY = sys.stdlib_module_names

# -- what an op is made of -----------------------------------------------------------------------

LAYERS = (
    "csrc/core/{op}.cpp",
    "csrc/cuda/{op}.cu",
    "opd_kernels/{op}.py",
    "opd_kernels/triton/{op}.py",
    "opd_kernels/reference/{op}.py",
    "tests/opd_kernels/test_{op}.py",
    "tests/opd_kernels/test_cuda_{op}.py",
    "tests/opd_kernels/test_triton_{op}.py",
    "tests/csrc/test_{op}.cpp",
    "tests/csrc/test_cuda_{op}.cpp",
    "benchmarks/bench_{op}.py",
)
_ROW_KERNEL = "its GEMMs are the library's and its row kernel is that of the op without the prefix"
ABSENT = {
    (op, layer): _ROW_KERNEL
    for op in (
        "fused_linear_divergence",
        "fused_linear_token_logprobs",
        "fused_linear_topk",
        "fused_linear_sample_tokens",
        "fused_linear_sorted_l1",
        "fused_linear_speculative_verify",
        "fused_linear_topk_divergence",
        "fused_linear_overlap_divergence",
    )
    for layer in (
        "csrc/core/{op}.cpp",
        "csrc/cuda/{op}.cu",
        "opd_kernels/triton/{op}.py",
        "tests/opd_kernels/test_cuda_{op}.py",
        "tests/opd_kernels/test_triton_{op}.py",
        "tests/csrc/test_{op}.cpp",
        "tests/csrc/test_cuda_{op}.cpp",
    )
}
_LIBRARY = "on a GPU the GEMMs are the library's"
ABSENT |= {
    ("gemm", layer): _LIBRARY
    for layer in (
        "csrc/cuda/{op}.cu",
        "opd_kernels/triton/{op}.py",
        "tests/csrc/test_cuda_{op}.cpp",
        "tests/opd_kernels/test_cuda_{op}.py",
        "tests/opd_kernels/test_triton_{op}.py",
    )
}
_LIBRARY_SORTS = "on a GPU the library's sort (CUB's), which the rest of the op is small beside"
ABSENT |= {
    ("sorted_l1", layer): _LIBRARY_SORTS
    for layer in (
        "csrc/cuda/{op}.cu",
        "opd_kernels/triton/{op}.py",
        "tests/opd_kernels/test_cuda_{op}.py",
        "tests/opd_kernels/test_triton_{op}.py",
        "tests/csrc/test_cuda_{op}.cpp",
    )
}
_NO_TRITON = "bytes are written where laws are scored and read where they are used: CPU and CUDA"
ABSENT |= {
    ("topk_codec", layer): _NO_TRITON
    for layer in ("opd_kernels/triton/{op}.py", "tests/opd_kernels/test_triton_{op}.py")
}
# text is in the memory of the host and is aligned there, on integers: no kernel of a GPU, no schema
HOST_OPS = {"align_tokens": ("align_tokens", "align_batch")}
_HOST = "text is aligned on the host"
ABSENT |= {
    (op, layer): _HOST
    for op in HOST_OPS
    for layer in (
        "csrc/cuda/{op}.cu",
        "opd_kernels/triton/{op}.py",
        "tests/csrc/test_cuda_{op}.cpp",
        "tests/opd_kernels/test_cuda_{op}.py",
        "tests/opd_kernels/test_triton_{op}.py",
    )
}
# kernels that a public op uses and nobody calls by themselves: no reference, their tests hold them
# against plain torch
INTERNAL_OPS = ("gemm", "sparse_gradient")

# arguments that say how, not what: the reference has none of them
ONLY_OF_KERNELS = frozenset(
    (
        "backend",
        "workspace_bytes",
        "process_group",
        "gradient_tolerance",
        "student_lm_head_weight_grad",
        "lm_head_weight_grad",
        "grad_scale",
        "compact_tokens",
        "num_threads",
    )
)

# modules without a test file of their own name, and what tests them
TESTED_ELSEWHERE = {
    "opd_kernels/_catalogue.py": "tests/opd_kernels/test_divergences.py",
    "opd_kernels/_checks.py": "the error texts of each op's test",
    "opd_kernels/_divergence_paths.py": "tests/opd_kernels/test_fused_linear_divergence.py",
    "opd_kernels/_formed.py": "tests/opd_kernels/test_fused_linear_*.py",
    "opd_kernels/_gemms.py": "tests/opd_kernels/test_gpu_paths.py and test_fused_linear_*.py",
    "opd_kernels/_laws.py": "tests/opd_kernels/test_divergence.py and test_fused_linear_*.py",
    "opd_kernels/_library.py": "every test: it loads the ops",
    "opd_kernels/_linear.py": "tests/opd_kernels/test_fused_linear_*.py",
    "opd_kernels/_overlap_cells.py": "tests/opd_kernels/test_fused_linear_overlap_divergence.py",
    "opd_kernels/_one_head.py": "tests/opd_kernels/test_fused_linear_*.py",
    "opd_kernels/_ranks.py": "tests/opd_kernels/test_*sorted_l1.py",
    "opd_kernels/_registration.py": "opcheck in each op's test, and this file",
    "opd_kernels/_token_check.py": "tests/opd_kernels/test_token_bytes.py",
    "opd_kernels/_token_cut.py": "tests/opd_kernels/test_token_bytes.py",
    "opd_kernels/_token_formats.py": "tests/opd_kernels/test_token_bytes.py",
    "opd_kernels/_token_formats_hf.py": "tests/opd_kernels/test_token_bytes.py",
    "opd_kernels/_token_roles.py": "tests/opd_kernels/test_token_bytes.py",
    "opd_kernels/_topk_divergence_path.py": (
        "tests/opd_kernels/test_fused_linear_topk_divergence.py"
    ),
    "opd_kernels/_verify.py": "tests/opd_kernels/test_*speculative_verify*.py",
    "opd_kernels/env.py": "tests/opd_kernels/test_dispatch.py",
    "opd_kernels/errors.py": "the error texts of each op's test",
    "python/opd/__main__.py": "tests/opd/test_cli.py",
    "python/opd/clients/arrays.py": "tests/opd/clients/test_sglang.py and test_trl.py",
    "python/opd/clients/http_client.py": "tests/opd/clients/test_kinds.py",
    "python/opd/clients/laws.py": "tests/opd/clients/test_vllm.py and test_fuzz.py",
    "python/opd/clients/openai_rows.py": "tests/opd/clients/test_vllm.py",
    "python/opd/clients/opd_replies.py": "tests/opd/clients/test_opd_server.py and test_fuzz.py",
    "python/opd/clients/protocol.py": "the tests of each client",
    "python/opd/clients/reading.py": "tests/opd/clients/test_vllm.py and test_fuzz.py",
    "python/opd/clients/transport.py": "tests/opd/clients/test_kinds.py",
    "python/opd/objectives/standardized.py": "tests/opd/objectives/test_multilevel_ot.py",
    "python/opd/objectives/crossing.py": "tests/opd/objectives/test_{alm,simct,overlap,mined}.py",
    "python/opd/rollouts/protocol.py": "the tests of each engine",
    "python/opd/server/monitor.py": "tests/opd/server/test_app.py",
    "python/opd/server/replies.py": "tests/opd/server/test_app.py",
    "python/opd/tasks/chain_repair_gauges.py": "tests/opd/tasks/test_chain_repair.py",
    "python/opd/tasks/train_chain_repair_teacher.py": "tests/opd/tasks/test_chain_repair.py",
}

# who may import what besides the standard library: prefix of path -> allowed top-level modules
MAY_IMPORT = {
    "opd_kernels/reference/": {"torch"},
    "opd_kernels/triton/": {"torch", "triton"},
    "opd_kernels/": {"torch"},
}
MAY_INCLUDE = {
    "csrc/include/": r"opd/\w+\.h",
    "csrc/core/": r"opd/\w+\.h|\w+\.h",
    "csrc/torch/": r"opd/opd\.h|(arguments|row_ops|sorted_l1)\.h|"
    r"torch/(csrc/(stable|inductor/aoti_torch/c)|headeronly)/.*",
    "csrc/python/": r"opd/\w+\.h|pybind11/\w+\.h",
    "csrc/cuda/": r"opd/\w+\.h|\w+\.(h|cuh)|cuda\w*\.h",
}
OP_CODE = ("opd_kernels/*.py", "opd_kernels/triton/*.py")
# the declared exceptions: one sync per call, only with weights or a masked loss; one per chunk,
# only with a gradient_tolerance; a check of ids that returns early unless they are on the CPU
SYNCS = {
    ("opd_kernels/_linear.py", "nonzero"),
    ("opd_kernels/sparse_gradient.py", "nonzero"),
    # on a CPU alone: which sequences are still open
    ("opd_kernels/fused_linear_speculative_verify.py", "nonzero"),
    ("opd_kernels/_verify.py", "nonzero"),
    ("opd_kernels/_checks.py", "nonzero"),
    # ids as text, on the host
    ("opd_kernels/token_bytes.py", "tolist"),
    # two vocabularies, once a run, on the host
    *(("opd_kernels/project_vocab.py", name) for name in ("tolist", "numpy", "cpu")),
    # row counts of the ranks of a process_group
    ("opd_kernels/_parallel.py", "tolist"),
}


@cache
def tracked() -> tuple[str, ...]:
    """Every committed or staged file; without git, every file that is not built or cached."""
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode == 0 and listing.stdout:
        return tuple(name for name in listing.stdout.splitlines() if (ROOT / name).is_file())
    ignored = re.compile(r"(^|/)(\.venv|\.git|build|dist|runs|__pycache__|[^/]*\.egg-info)(/|$)")
    names = (str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file())
    return tuple(name for name in names if not ignored.search(name) and not name.endswith(".so"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def sources(prefix: str = "", suffixes: tuple[str, ...] = SOURCE_SUFFIXES) -> list[str]:
    return [name for name in tracked() if name.startswith(prefix) and name.endswith(suffixes)]


def text_files() -> Iterator[tuple[str, str]]:
    for name in tracked():
        try:
            yield name, read(name)
        except UnicodeDecodeError:
            continue


def report(findings: list[str]) -> None:
    assert not findings, "\n  " + "\n  ".join(findings)


# -- ops -----------------------------------------------------------------------------------------


def schemas() -> dict[str, list[str]]:
    """Op name -> argument names, from the m.def calls of ops.cpp and the macros in them."""
    text = read(OPS_CPP)
    macros = {
        name: "".join(re.findall(r"\"([^\"]*)\"", body))
        for name, body in re.findall(r"#define (OPD_\w+)((?:[^\n]*\\\n)*[^\n]*)", text)
    }
    found = {}
    for call in re.findall(r"m\.def\(((?:\s*(?:\"[^\"]*\"|OPD_\w+))+)\s*\)", text):
        parts = re.findall(r"\"([^\"]*)\"|(OPD_\w+)", call)
        schema = "".join(macros[macro] if macro else literal for literal, macro in parts)
        name, _, rest = schema.partition("(")
        arguments = re.split(r",\s*(?![^(]*\))", rest.partition(") ->")[0])
        found[name] = [argument.split()[-1] for argument in arguments if argument]
    return found


def functions_of(op: str) -> tuple[str, ...]:
    return HOST_OPS.get(op) or _dispatch.FUNCTIONS.get(op, (op,))


@pytest.mark.parametrize("op", (*_dispatch.OPS, *HOST_OPS))
def test_op_is_complete_in_its_layers(op):
    missing = [
        f"{op}: {layer.format(op=op)} is missing"
        for layer in LAYERS
        if (op, layer) not in ABSENT and not (ROOT / layer.format(op=op)).is_file()
    ]
    superfluous = [
        f"{op}: {layer.format(op=op)} exists, but this file says: {reason}"
        for (name, layer), reason in ABSENT.items()
        if name == op and (ROOT / layer.format(op=op)).is_file()
    ]
    schema = f"{op}_" if op in _dispatch.FUNCTIONS else f"{op}_fwd"
    if op not in HOST_OPS and not any(name.startswith(schema) for name in schemas()):
        missing.append(f"{op}: {OPS_CPP} has no schema {schema}")
    for function in functions_of(op):
        if function not in opd_kernels.__all__:
            missing.append(f"{op}: opd_kernels.__all__ does not list {function}")
    report(missing + superfluous)


@pytest.mark.parametrize("op", INTERNAL_OPS)
def test_internal_op_is_complete_in_its_layers(op):
    layers = [
        layer.format(op=op)
        for layer in LAYERS
        if "/reference/" not in layer and (op, layer) not in ABSENT
    ]
    missing = [f"{op}: {layer} is missing" for layer in layers if not (ROOT / layer).is_file()]
    if not any(name.startswith(f"{op}_") for name in schemas()):
        missing.append(f"{op}: {OPS_CPP} has no schema {op}_*")
    if op in opd_kernels.__all__:
        missing.append(f"{op}: opd_kernels.__all__ lists it, so it belongs in _dispatch.OPS")
    report(missing)


def test_every_reference_and_triton_file_belongs_to_an_op():
    strays = [
        f"{name} belongs to no op of _dispatch.OPS, HOST_OPS or INTERNAL_OPS"
        for folder in ("opd_kernels/reference/", "opd_kernels/triton/")
        for name in sources(folder, (".py",))
        if not Path(name).stem.startswith("_")
        and Path(name).stem not in (*_dispatch.OPS, *HOST_OPS, *INTERNAL_OPS, "divergences")
    ]
    report(strays)


def test_schemas_are_the_registered_fakes():
    declared = {f"opd::{name}" for name in schemas()}
    registered = {name for name in _registration.REGISTERED if name.startswith("opd::")}
    assert declared, f"no schema was found in {OPS_CPP}"
    report(
        [f"{name}: schema in {OPS_CPP}, no fake" for name in sorted(declared - registered)]
        + [f"{name}: fake without a schema" for name in sorted(registered - declared)]
    )


def test_every_row_kernel_has_a_body_for_cpu_and_cuda():
    """An op of a schema is a loop in Python, or has a body in row_ops.h and a twin in opd_cuda."""
    block = read(ROW_OPS).partition("#define OPD_ROW_OPS(X)")[2].partition("\n\n")[0]
    bodies = set(re.findall(r"X\((\w+)\)", block))
    assert bodies, f"no OPD_ROW_OPS list was found in {ROW_OPS}"
    twins = {
        name.removeprefix("opd_cuda::")
        for name in _registration.REGISTERED
        if name.startswith("opd_cuda::")
    }
    report(
        [f"{name}: a twin in opd_cuda and no body in {ROW_OPS}" for name in sorted(twins - bodies)]
        + [f"{name}: a body in {ROW_OPS} and no opd_cuda::{name}" for name in bodies - twins]
        + [f"{name}: a body without a schema in {OPS_CPP}" for name in bodies - set(schemas())]
    )


def test_every_cuda_entry_point_has_a_kernel_and_a_refusal():
    declared = native.cuda_entry_points()
    assert declared, "no entry point opd_*_cuda was found in csrc/include/opd/opd.h"
    refusals = read("csrc/core/without_cuda.cpp")
    report(
        [f"{name}: no kernel in csrc/cuda" for name in native.unwritten("")]
        + [
            f"csrc/core/without_cuda.cpp: {name} is missing"
            for name in declared
            if not re.search(rf"\b{name}\b", refusals)
        ]
    )


def test_triton_launchers_have_the_signatures_of_the_schemas():
    pytest.importorskip("triton")
    findings = []
    for qualified in _registration.REGISTERED:
        namespace, _, name = qualified.partition("::")
        if namespace != "opd_triton":
            continue
        ops = (*_dispatch.OPS, *INTERNAL_OPS)
        op = next(op for op in ops if name.startswith(f"{op}_"))
        launcher = getattr(importlib.import_module(f"opd_kernels.triton.{op}"), name, None)
        if launcher is None:
            findings.append(f"opd_kernels/triton/{op}.py has no launcher {name}")
        elif list(inspect.signature(launcher).parameters) != schemas()[name]:
            findings.append(
                f"opd_kernels/triton/{op}.py: {name}{inspect.signature(launcher)} differs from "
                f"the schema's {schemas()[name]}"
            )
    report(findings)


@pytest.mark.parametrize("op", (*_dispatch.OPS, *HOST_OPS))
def test_reference_has_the_signature_of_the_op(op):
    def parameters(function) -> list[tuple[str, object]]:
        return [
            (parameter.name, parameter.default)
            for parameter in inspect.signature(function).parameters.values()
            if parameter.name not in ONLY_OF_KERNELS
        ]

    for function in functions_of(op):
        public, truth = getattr(opd_kernels, function), getattr(opd_kernels.reference, function)
        assert parameters(truth) == parameters(public)


# -- divergences ---------------------------------------------------------------------------------


def header_list() -> dict[str, int]:
    block = read(HEADER).partition("#define OPD_DIVERGENCES(X)")[2].partition("\n\n")[0]
    return {name: int(number) for number, name in re.findall(r"X\((\d+), (\w+),", block)}


def test_divergences_are_the_same_in_all_four_places():
    expected = header_list()
    assert expected, f"no OPD_DIVERGENCES list was found in {HEADER}"
    mirror = ast.parse(read(MIRROR))
    functions = {node.name for node in mirror.body if isinstance(node, ast.FunctionDef)}
    (names,) = (
        ast.literal_eval(node.value)
        for node in mirror.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "DIVERGENCES"
    )
    dispatched = dict(re.findall(r"DIVERGENCE == (\d+):\s+return (\w+)_term\(", read(MIRROR)))
    if f"kCrossEntropy = {DIVERGENCES['cross_entropy'].id};" not in read(HEADER):
        # it has no term of the teacher's law, and so no functor
        expected["cross_entropy"] = DIVERGENCES["cross_entropy"].id
    c_enum = dict(re.findall(r"OPD_(\w+) = (\d+)", read("csrc/include/opd/opd.h")))
    findings = [
        f"opd_kernels/divergences.py: {name} is missing or has another id than {number} of {HEADER}"
        for name, number in expected.items()
        if name not in DIVERGENCES or DIVERGENCES[name].id != number
    ]
    for name, number in expected.items():
        if name not in reference_divergences.DIVERGENCES:
            findings.append(f"opd_kernels/reference/divergences.py: {name} is missing")
        for function in (f"{name}_term", f"{name}_dterm"):
            if function not in functions:
                findings.append(f"{MIRROR}: {function} is missing")
        if names[number : number + 1] != (name,):
            findings.append(f"{MIRROR}: DIVERGENCES[{number}] is not {name}")
        if number < max(expected.values()) and dispatched.get(str(number)) != name:
            findings.append(f"{MIRROR}: divergence_term does not send id {number} to {name}")
        if c_enum.get(name.upper()) != str(number):
            findings.append(f"csrc/include/opd/opd.h: OPD_{name.upper()} = {number} is missing")
        if name not in {divergence.name for divergence in (*SPECS, *LABEL_SPECS)}:
            findings.append(f"tests/cases.py: no Spec of {name}")
        if not re.search(rf"\b{name}\b", read("docs/divergences.md")):
            findings.append(f"docs/divergences.md: `{name}` is not explained")
    for where, found in (
        ("opd_kernels/divergences.py", DIVERGENCES),
        ("opd_kernels/reference/divergences.py", reference_divergences.DIVERGENCES),
        (MIRROR, names),
    ):
        findings += [
            f"{where}: {name} is not in {HEADER}"
            for name in found
            if name not in expected and name != "cross_entropy"
        ]
    report(findings)


# -- layers --------------------------------------------------------------------------------------


def imports(name: str) -> Iterator[str]:
    """Absolute dotted names that a Python file imports anywhere, its relative ones resolved."""
    package = Path(name).with_suffix("").parts[:-1]
    if package[:1] == ("python",):
        package = package[1:]
    for node in ast.walk(ast.parse(read(name))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_python_layers_import_only_what_they_may():
    findings = []
    for name in sources("opd_kernels/", (".py",)):
        allowed = next(allowed for prefix, allowed in MAY_IMPORT.items() if name.startswith(prefix))
        for module in imports(name):
            top = module.partition(".")[0]
            if top != "opd_kernels" and top not in allowed and top not in STANDARD_LIBRARY:
                findings.append(f"{name} imports {module}; allowed: {', '.join(sorted(allowed))}")
            # the truth shares no code with what it checks; kernels do not know the ops above them
            for folder in ("reference", "triton"):
                inside = f"opd_kernels.{folder}"
                is_inside = name.startswith(f"opd_kernels/{folder}/")
                if is_inside and top == "opd_kernels" and not module.startswith(inside):
                    findings.append(f"{name} imports {module} from outside {inside}")
    report(findings)


def test_triton_is_imported_only_when_a_kernel_runs():
    # asked of the source: torch itself imports triton on some builds
    findings = []
    for name in sources("opd_kernels/", (".py",)):
        if name.startswith("opd_kernels/triton/") and name != "opd_kernels/triton/__init__.py":
            continue
        for node in ast.parse(read(name)).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)) and re.search(
                r"\btriton\b", ast.unparse(node)
            ):
                findings.append(f"{name}: `{ast.unparse(node)}` at module level")
    report(findings)


def test_loop_layers_import_only_what_they_may():
    findings = []
    folders = ("rollouts", "teachers", "objectives")
    for name in sources("python/opd/", (".py",)):
        for module in imports(name):
            if re.match(r"opd_kernels\._|opd_kernels\.triton", module):
                findings.append(f"{name} imports {module}, which is private")
            for folder in folders:
                others = [f"opd.{other}" for other in folders if other != folder]
                if name.startswith(f"python/opd/{folder}/") and module.startswith(tuple(others)):
                    findings.append(f"{name} imports {module}; they meet in batch.py")
    report(findings)


def test_c_layers_include_only_what_they_may():
    findings = []
    for prefix, allowed in MAY_INCLUDE.items():
        for name in sources(prefix):
            for bracket, header in re.findall(
                r"^\s*#\s*include\s+([<\"])([^>\"]+)", read(name), re.M
            ):
                standard = bracket == "<" and re.fullmatch(r"(sys/)?[a-z_]+(\.h)?", header)
                if not standard and not re.fullmatch(allowed, header):
                    findings.append(f"{name} includes {header}")
    report(findings)


def test_core_knows_neither_torch_nor_python():
    pattern = re.compile(r"\b(torch|at|c10)::|\bPyObject\b|\bTORCH_")
    findings = [
        f"{name}:{number}: {line.strip()}"
        for folder in ("csrc/include/", "csrc/core/")
        for name in sources(folder)
        for number, line in enumerate(read(name).splitlines(), 1)
        if pattern.search(line)
    ]
    report(findings)


def test_environment_is_read_in_one_place():
    findings = []
    for name in sources("opd_kernels/", (".py",)):
        if name == "opd_kernels/env.py":
            continue
        for node in ast.walk(ast.parse(read(name))):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                findings.append(f"{name}:{node.lineno} reads the environment")
    variables = re.findall(r"os\.environ\.get\(\"(\w+)\"", read("opd_kernels/env.py"))
    findings += [
        f"opd_kernels/env.py: {variable} is not in its table"
        for variable in variables
        if f"`{variable}`" not in read("opd_kernels/env.py")
    ]
    assert variables
    report(findings)


def test_ops_neither_wait_for_the_device_nor_hide_nan():
    banned = {"item", "tolist", "cpu", "numpy", "nan_to_num", "nonzero", "masked_select"}
    findings = []
    for name in (str(path.relative_to(ROOT)) for glob in OP_CODE for path in ROOT.glob(glob)):
        for node in ast.walk(ast.parse(read(name))):
            is_banned = isinstance(node, ast.Attribute) and node.attr in banned
            if is_banned and (name, node.attr) not in SYNCS:
                findings.append(f"{name}:{node.lineno}: .{node.attr}")
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Compare):
                findings.append(f"{name}:{node.lineno}: indexing by a mask, a data-dependent shape")
    report(findings)


# -- files ---------------------------------------------------------------------------------------


def test_files_are_small():
    lengths = {name: read(name).count("\n") for name in sources()}
    long = [
        f"{name}: {length} lines, at most 700" for name, length in lengths.items() if length > 700
    ]
    report(long)
    median = statistics.median(lengths.values())
    assert median <= 200, f"the median source file has {median} lines, at most 200"


def test_source_files_name_their_licence_first():
    findings = []
    for name in [*sources(), "Makefile", "CMakeLists.txt"]:
        first = read(name).splitlines()[:1]
        if first and "SPDX-License-Identifier: Apache-2.0" not in first[0]:
            findings.append(f"{name}: the first line has no SPDX tag")
    report(findings)


def test_every_todo_has_an_anchor():
    mark = re.compile(r"\b(TO" + r"DO|FIX" + r"ME)\b(?!\(#\d+\))")
    findings = [
        f"{name}:{number}: {line.strip()[:80]}"
        for name, text in text_files()
        for number, line in enumerate(text.splitlines(), 1)
        if mark.search(line)
    ]
    report(findings)


def test_text_names_no_machine_path():
    path = re.compile(r"(?<![\w.~}/-])/(" + "work|root|home|mnt|Users" + r")/\w")
    findings = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in text_files()
        for number, line in enumerate(text.splitlines(), 1)
        if path.search(line)
    ]
    report(findings)


def test_tests_mirror_the_code():
    mirrored = {"opd_kernels/": "tests/opd_kernels/", "python/opd/": "tests/opd/"}
    findings = []
    for prefix, tests in mirrored.items():
        for name in sources(prefix, (".py",)):
            path = Path(name)
            inside = path.relative_to(prefix)
            if path.name == "__init__.py" or inside.parts[0] in ("triton", "reference"):
                continue
            test = Path(tests, inside.parent, f"test_{path.stem.lstrip('_')}.py")
            if not (ROOT / test).is_file() and name not in TESTED_ELSEWHERE:
                findings.append(f"{name}: {test} is missing")
    findings += [
        f"{name} of TESTED_ELSEWHERE does not exist"
        for name in TESTED_ELSEWHERE
        if not (ROOT / name).is_file()
    ]
    report(findings)


# -- names, docs, recipes ------------------------------------------------------------------------


def test_public_api_is_the_listed_one():
    listed = read("tests/public_api.txt").splitlines()
    actual = public_api.describe()
    report(
        [f"gone or changed: {line}" for line in listed if line not in actual]
        + [f"new, not in tests/public_api.txt: {line}" for line in actual if line not in listed]
    )


def test_all_names_exist_and_are_documented():
    documents = "\n".join(
        text
        for name, text in text_files()
        if name == "README.md" or (name.startswith("docs/") and name.endswith(".md"))
    )
    findings = []
    for name in opd_kernels.__all__:
        if not hasattr(opd_kernels, name):
            findings.append(f"opd_kernels.__all__ names {name}, which does not exist")
        if not re.search(rf"\b{name}\b", documents):
            findings.append(f"README.md and docs/*.md never mention {name}")
        value = getattr(opd_kernels, name)
        if callable(value) and not inspect.getdoc(value):
            findings.append(f"{name} has no docstring")
    report(findings)


@pytest.mark.parametrize("op", (*_dispatch.OPS, *HOST_OPS))
def test_op_docstring_has_its_sections(op):
    unit = "bytes" if op in HOST_OPS else "nats"
    for function in functions_of(op):
        text = inspect.getdoc(getattr(opd_kernels, function))
        missing = [
            part for part in ("Args:", "Returns:", "Raises:", "Source:", unit) if part not in text
        ]
        assert not missing, f"{function}: its docstring lacks {missing}"


def test_recipes_parse_and_say_where_they_come_from():
    recipes = [name for name in tracked() if re.match(r"python/opd/recipes/.*\.ya?ml$", name)]
    assert recipes, "python/opd/recipes holds no recipe"
    findings = []
    for name in recipes:
        text = read(name)
        comments = [line for line in text.splitlines()[:4] if line.startswith("# ")]
        if len(comments) < 3:
            findings.append(f"{name}: after the licence, two comment lines: what it is, its source")
        if not isinstance(yaml.safe_load(text), dict):
            findings.append(f"{name}: not a mapping")
    report(findings)
