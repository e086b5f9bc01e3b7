# SPDX-License-Identifier: Apache-2.0
"""The GPU run on a CPU: every part at tiny sizes, killed in the middle, out of time, reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import laws
from benchmarks.gpu import __main__ as driver
from benchmarks.gpu import (
    cases,
    every_op,
    goals,
    part_build,
    part_ncu,
    part_ours,
    part_peers,
    part_sanitizer,
    report,
    two_vocabularies,
)
from benchmarks.gpu import context as context_module
from benchmarks.gpu import results as schema
from benchmarks.gpu.context import ROOT, Context, public
from benchmarks.gpu.device import Device
from benchmarks.gpu.progress import Progress
from benchmarks.gpu.results import Check, Counter, Precision, RowKernel, Timing, rows_of

SCRIPT = ROOT / "benchmarks" / "gpu.sh"
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable}
CPU = Device("cpu")
NCU = """==PROF== Profiling "rows" - 0: 0%....100% - 1 pass
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","void opd::rows<float>(args)","gpu__time_duration.sum","ns","412,345"
"0","7","void opd::rows<float>(args)","launch__cluster_size","","n/a"
"1","7","rows","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","91.5"
"""


def start(*words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [str(SCRIPT), "--dry-run", *words],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[dict, str, int]:
    """(results, output, exit code) of a dry run of all parts."""
    out = tmp_path_factory.mktemp("gpu")
    process = start("--out", str(out), "--commit", "abc+dirty")
    output, _ = process.communicate(timeout=500)
    return schema.load(out / "dry_run.json"), output, process.returncode


# -- the whole -----------------------------------------------------------------------------------


def test_every_part_runs_its_code_and_passes(whole):
    results, output, code = whole
    assert {name: part["status"] for name, part in results["parts"].items()} == dict.fromkeys(
        schema.PARTS, "passed"
    ), output
    assert code == 0
    assert (results["dry_run"], results["commit"], results["dirty"]) == (True, "abc", True)
    assert results["versions"]["torch"] == torch.__version__


def test_every_part_measures_what_it_is_for(whole):
    results, _, _ = whole
    kernels = rows_of(results, "build", schema.Kernel)
    assert [kernel.registers for kernel in kernels] == [40, 255]
    tests = {row.outcome for row in rows_of(results, "tests", Check)}
    assert tests == {"passed", "skipped"}
    ceilings = {row.name for row in rows_of(results, "ceilings", schema.Ceiling)}
    assert {"copy", "student logits", "teacher logits", "dW", "dX", "dX, K in 4"} <= ceilings
    ours = rows_of(results, "ours", Timing)
    measured = {(row.case, row.contestant, row.divergence, row.head) for row in ours}
    for shape in cases.DRY_SHAPES:
        for head in cases.HEADS:
            for name in cases.DIVERGENCES:
                for contestant in ("opd_kernels cpu", "opd_kernels reference"):
                    assert (str(shape), contestant, name, head) in measured
        for tolerance in cases.TOLERANCES:
            label = f"{goals.TOLERANT} {tolerance:g}"
            assert (str(shape), label, "reverse_kl", "trained") in measured
    assert all(row.floor_ms > 0 and row.ratio_to_floor == row.ms / row.floor_ms for row in ours)
    lead = [row for row in ours if row.contestant == "opd_kernels cpu"]
    assert all(0 < row.peak_bytes <= 1.05 * row.allowed_bytes for row in lead)
    kernels = {row.name: row.bytes for row in rows_of(results, "ours", RowKernel)}
    assert "divergence jsd" in kernels
    logits_bytes = 4 * cases.DRY.row_tokens * cases.DRY_SHAPES[0].vocab_size
    assert kernels["topk_divergence forward"] == logits_bytes
    assert kernels["topk_divergence backward"] == 2 * logits_bytes
    sparse = {(row.contestant, row.head) for row in ours if row.contestant.startswith(goals.SPARSE)}
    assert sparse == {(f"{goals.SPARSE}, K = 64", head) for head in cases.HEADS}
    for name in ("topk_logprobs K=64", "sample_tokens N=50"):
        assert kernels.keys() >= {f"{name} {dtype}" for dtype in ("float32", "bfloat16")}
    assert [row.case for row in ours if row.contestant == "fused_linear_topk K=64"] == [
        str(shape) for shape in cases.DRY_SHAPES
    ]
    over = {row.contestant for row in ours if " over " in row.contestant}
    assert over == {
        *(f"{op} over {goals.EAGER}" for op in ("sorted_l1", *two_vocabularies.OPS)),
        "sorted_l1 over two sorts",
        f"{two_vocabularies.OVERLAP} over {goals.ONE_VOCABULARY}",
    }
    assert set(two_vocabularies.OPS) <= {row.contestant for row in ours}
    peers = rows_of(results, "peers", Timing)
    eager = [row for row in peers if row.contestant == "eager"]
    assert len(eager) == len(cases.DRY_SHAPES) * len(cases.HEADS) * len(cases.DIVERGENCES)
    assert all(row.ratio_ours == row.ms / row.ours_ms for row in eager)
    left_out = [row.name for row in rows_of(results, "peers", Check)]
    assert "torch.compile" in left_out
    precise = rows_of(results, "peers", Precision)
    own = [row for row in precise if row.contestant == "opd_kernels cpu"]
    assert len(own) == 2 * len(cases.DIVERGENCES)
    assert all(0 < row.of_eager < 2 and 0 < row.of_rounded <= 1 for row in own)
    # a flag of CUDA's GEMMs: on a CPU the same bits
    restricted = [row for row in precise if row.contestant.endswith(part_peers.FLOAT32_REDUCTIONS)]
    assert [row.grad_weight for row in restricted] == [row.grad_weight for row in own]


def test_goals_name_what_was_measured(whole):
    results, output, _ = whole
    found = {goal["goal"]: goal for goal in results["goals"]}
    assert len(found) == len(goals.PROMISES)
    assert found["peak extra memory over workspace + gradients"]["met"] is True
    assert (
        found["GPU tests that fail"] | {"met": True, "measured": 0.0}
        == found["GPU tests that fail"]
    )
    assert found["sanitizer runs with findings"]["met"] is None
    assert (
        "topk_logprobs K=64"
        in found["top-k, lse, tail and entropy, of the copy's bandwidth"]["note"]
    )
    topk = found["fused_linear_topk over the teacher's GEMM"]
    # not the loss whose name begins alike
    assert topk["measured"] > 0 and topk["note"].startswith("fused_linear_topk K=64")
    assert found["ops that fail or hang, each alone"]["met"] is True
    assert "GPU tests that fail: 0.000" in output


def test_a_dry_run_is_no_result_of_a_gpu(whole, tmp_path):
    results, _, _ = whole
    schema.save(results, tmp_path / "dry_run.json")
    (tmp_path / "cpu.json").write_text(json.dumps({"machine": {}}))
    (tmp_path / "broken.json").write_text("{")
    assert report.files(tmp_path) == []
    schema.save({**results, "dry_run": False}, tmp_path / "h200.json")
    assert report.files(tmp_path) == [tmp_path / "h200.json"]


def test_the_page_names_its_file_and_its_pictures_repeat_themselves(whole, tmp_path):
    results, _, _ = whole
    machine = {**results["machine"], "gpu": "NVIDIA X1", "at_end": {"driver": "1"}}
    results = {**results, "dry_run": False, "machine": machine}
    path, first, second = tmp_path / "x1.json", tmp_path / "1", tmp_path / "2"
    schema.save(results, path)
    text = report.section(schema.load(path), path, first)
    assert text == report.section(results, path, second)
    headings = [part.split("\n")[0] for part in text.split("\n### ")[1:]]
    assert "Goals" in headings and "How long do others take?" in headings
    for part in text.split("\n### ")[1:-1]:
        assert "`benchmarks/results/x1.json`" in part or part.startswith("How to reproduce")
    assert "**missed**" in text and "MiB" in text
    pictures = sorted(file.name for file in first.iterdir())
    assert pictures == [f"benchmarks_x1_{name}.png" for name in ("floor", "memory", "peers")]
    for name in pictures:
        assert (first / name).read_bytes() == (second / name).read_bytes()
        assert f"]({name})" in text


# -- parts, budgets, kills -----------------------------------------------------------------------


def wait_for_rows(process: subprocess.Popen, path: Path, part: str) -> None:
    """Until the part has two rows on disk."""
    limit = time.monotonic() + 120
    while time.monotonic() < limit:
        assert process.poll() is None, process.communicate()[0]
        if path.exists():
            parts = schema.load(path)["parts"]
            if len(parts.get(part, {}).get("rows", ())) >= 2:
                return
        time.sleep(0.02)
    raise AssertionError(f"{part} had no rows after two minutes")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, "running"), (signal.SIGTERM, "stopped")]
)
def test_a_run_that_is_killed_keeps_what_it_has(tmp_path, number, status):
    process = start("--out", str(tmp_path), "ours", "ceilings")
    path = tmp_path / "dry_run.json"
    try:
        wait_for_rows(process, path, "ceilings")
    finally:
        process.send_signal(number)
    process.communicate(timeout=60)
    results = schema.load(path)
    part = results["parts"]["ceilings"]
    # the parts go in their own order, whatever the order of the words
    assert list(results["parts"]) == ["ceilings"]
    assert part["status"] == status and len(part["rows"]) >= 2
    assert process.returncode == (-9 if number == signal.SIGKILL else 143)
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize(
    ("said", "capability"),
    [("NVIDIA X1, 9.0, 143771", "90a-real"), ("NVIDIA X1, 8.6, 24576", "86-real")],
)
def test_a_gpu_is_known_without_torch(said, capability, monkeypatch):
    monkeypatch.setattr(driver.machine, "output_of", lambda command: said)
    found = driver.machine.describe(dry_run=False)
    assert found["gpu"] == "NVIDIA X1"
    assert found["memory_bytes"] == int(said.split()[-1]) << 20
    assert part_build.architecture(dry_run=False) == capability
    assert driver.machine.has_gpu()


def test_a_part_out_of_time_is_ended_and_the_next_one_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(driver, "SHARES", {**driver.SHARES, "tests": 6, "build": 1, "ncu": 60})
    words = ["--dry-run", "--out", str(tmp_path), "--budget", "36", "build", "tests", "ncu"]
    monkeypatch.setattr(driver, "LEAST_S", 2.0)
    assert driver.main(words) == 1
    parts = schema.load(tmp_path / "dry_run.json")["parts"]
    assert parts["build"]["status"] == "skipped"
    assert parts["build"]["reason"] == "no time was left in the budget"
    assert parts["tests"]["status"] == "timed out"
    assert parts["tests"]["seconds"] < 12
    assert parts["ncu"]["status"] == "passed"


def test_a_part_that_fails_says_why_without_this_machines_directories(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    run = driver.Run(driver.parse(["--dry-run", "--out", str(tmp_path), "ncu"]))
    monkeypatch.setattr(driver.sys, "executable", "/bin/false")
    run.part("ncu", 30.0)
    part = schema.load(run.path)["parts"]["ncu"]
    assert part["status"] == "failed" and part["reason"].startswith("exit code 1")
    assert public(f"{ROOT}/a/b.py: /usr/lib/x/y.so broke at 1/2") == "a/b.py: y.so broke at 1/2"


def test_what_one_part_leaves_goes_to_the_next():
    total = sum(driver.SHARES.values())
    waiting = list(schema.PARTS[1:])
    # without the build nothing of ours runs
    given = driver.budget_of("build", waiting, total)
    assert given == pytest.approx(2 * driver.SHARES["build"])
    left_s = total - driver.SHARES["build"]
    given = driver.budget_of("smoke", waiting[1:], left_s)
    assert given == pytest.approx(driver.SHARES["smoke"])
    assert driver.budget_of("build", [], 300.0) == 300.0
    assert total <= 540
    left, spent = 540.0, 0.0
    for index, name in enumerate(schema.PARTS):
        given = driver.budget_of(name, schema.PARTS[index + 1 :], left)
        spent += given
        left -= given
    assert spent == pytest.approx(540.0)


def test_a_program_that_takes_too_long_ends_with_its_children(tmp_path):
    context = Context(True, [].append, time.monotonic() + 60)
    context.deadline = time.monotonic() + 1.0
    begin, alive = time.monotonic(), tmp_path / "alive"
    # the grandchild has the output open, and would go on by itself
    script = f"(for i in $(seq 300); do touch {alive}; sleep 0.1; done) & sleep 30"
    with pytest.raises(subprocess.TimeoutExpired):
        context.command(["bash", "-c", script])
    assert time.monotonic() - begin < 10 and not context.groups
    alive.unlink()
    time.sleep(0.5)
    assert not alive.exists()


def test_a_part_that_is_ended_ends_its_programs(tmp_path, monkeypatch):
    alive = tmp_path / "alive"
    package = tmp_path / "late"
    package.mkdir()
    script = f"for i in $(seq 300); do touch {alive}; sleep 0.1; done"
    (package / "sitecustomize.py").write_text(
        "import benchmarks.gpu.part_ncu as part\n"
        f"part.run = lambda context: context.command(['bash', '-c', {script!r}])\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{package}:{ROOT}:{ROOT / 'python'}")
    run = driver.Run(driver.parse(["--dry-run", "--out", str(tmp_path), "ncu"]))
    run.part("ncu", 12.0)
    assert schema.load(run.path)["parts"]["ncu"]["status"] in ("failed", "timed out")
    assert alive.exists()
    alive.unlink()
    time.sleep(0.5)
    assert not alive.exists()


def test_a_number_that_json_lacks_is_an_error_that_shows_it():
    rows: list[dict] = []
    context = Context(True, rows.append, time.monotonic() + 60)
    context.row(Precision("ours", "jsd", "far", float("nan"), 0.5, 1.0))
    context.row(Check("next", "passed"))
    assert [(row["kind"], row["name"], row["outcome"]) for row in rows] == [
        ("Check", "ours jsd far", "error"),
        ("Check", "next", "passed"),
    ]
    assert "nan, 0.5, 1.0" in rows[0]["detail"]
    json.dumps(rows, allow_nan=False)


def test_a_case_that_raises_leaves_the_others_and_a_lost_device_does_not():
    rows: list[dict] = []
    context = Context(True, rows.append, time.monotonic() + 60)
    with context.attempt("large"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
    assert rows[0]["name"] == "large" and rows[0]["outcome"] == "error"
    with pytest.raises(RuntimeError, match="illegal"), context.attempt("broken"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_row_kernels_that_fail_do_not_take_the_losses_with_them(monkeypatch):
    rows: list[dict] = []
    context = Context(True, rows.append, time.monotonic() + 60)

    def fails(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(part_ours, "row_kernels", fails)
    monkeypatch.setattr(part_ours, "fused", lambda *_: rows.append("fused"))
    for name in ("tolerant", "token_logprobs"):
        monkeypatch.setattr(part_ours, name, lambda *_: None)
    part_ours.run(context)
    assert rows[0]["name"] == "row kernels" and rows.count("fused") >= 2


def test_a_full_disk_costs_no_rows(tmp_path, monkeypatch, capsys):
    run = driver.Run(driver.parse(["--dry-run", "--out", str(tmp_path), "ncu"]))
    read_fd, write_fd = os.pipe()
    with os.fdopen(write_fd, "w") as stream:
        for name in ("one", "two"):
            stream.write(json.dumps(schema.row_of(Check(name, "passed"))) + "\n")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(driver.results, "save", full)
    rows: list[dict] = []
    run._read(read_fd, rows, Progress())
    assert [row["name"] for row in rows] == ["one", "two"]
    assert "could not be saved: No space left" in capsys.readouterr().err


@pytest.mark.parametrize("folder", context_module.TOOL_FOLDERS)
def test_tools_are_found_beside_path(tmp_path, monkeypatch, folder):
    program = tmp_path / folder / "compute-sanitizer"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/bash\n")
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    assert context_module.find_tool("compute-sanitizer") == str(program)
    assert context_module.find_tool("no-such-tool") is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["everything"], "no part is called 'everything'; there are build, smoke"),
        (["--budget", "0"], "--budget must be positive, got 0"),
    ],
)
def test_bad_words_are_one_sentence(words, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        driver.parse(words)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(driver.machine, "has_gpu", lambda: False)
    assert driver.main(["ncu"]) == 2
    assert "expected a CUDA device, torch sees none. --dry-run" in capsys.readouterr().err


# -- tools ---------------------------------------------------------------------------------------


def context_with(tmp_path: Path, name: str, script: str) -> tuple[Context, list[dict]]:
    """A dry run that finds a program of this name; and the rows it keeps."""
    program = tmp_path / name
    program.write_text(f"#!/bin/bash\n{script}")
    program.chmod(0o755)
    rows: list[dict] = []
    which = {name: str(program)}.get
    return Context(True, rows.append, time.monotonic() + 120, which=which), rows


def test_the_sanitizer_runs_every_op_alone_under_each_tool(tmp_path, monkeypatch):
    monkeypatch.setattr(part_sanitizer, "TOOLS", ("memcheck", "racecheck"))
    monkeypatch.setattr(every_op, "OPS", ("divergence", "fused"))
    context, rows = context_with(
        tmp_path,
        "compute-sanitizer",
        'if [ "$1" = --help ]; then echo "--kernel-name arg"; exit; fi\n'
        f'echo "own memory ${{PYTORCH_NO_CUDA_MEMORY_CACHING:-0}} $@" >>{tmp_path}/lines; tool=$2\n'
        'if [ $tool = memcheck ]; then echo "========= ERROR SUMMARY: 0 errors"; exit; fi\n'
        'echo "========= Error: race"; echo "========= RACECHECK SUMMARY: 2 hazards displayed"\n'
        "exit 86\n",
    )
    monkeypatch.setattr(part_sanitizer, "AT_ONCE", 1)
    part_sanitizer.run(context)
    found = {row["name"]: row["outcome"] for row in rows if row["outcome"] != "left out"}
    assert found == {
        "memcheck divergence": "passed",
        "memcheck fused": "passed",
        "racecheck divergence": "failed",
        "racecheck fused": "failed",
    }
    assert "2 findings" in rows[-1]["detail"]
    line, race, *_ = (tmp_path / "lines").read_text().splitlines()
    assert "--kernel-name kernel_substring=opd --error-exitcode 86" in line
    assert line.endswith("-m benchmarks.gpu.every_op --backend cpu --dry-run divergence")
    assert line.startswith("own memory 1 --tool memcheck")
    assert race.startswith("own memory 0 --tool racecheck")


RACE = """========= Error: Race reported between Write access at void {0}
=========     and Read access at void {0} [8 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"""
OURS = "opd::cuda::(anonymous namespace)::"
CLUSTER_KERNEL = f"{OURS}forward_grad_cluster_kernel<opd::cuda::Jsd<float>, (bool)0>(int)+0x20"
NO_ERRORS = "========= ERROR SUMMARY: 0 errors"
NO_REGISTERS = "FAILED fused: too many resources requested for launch"


@pytest.mark.parametrize(
    ("tool", "output", "code", "outcome", "words"),
    [
        ("memcheck", NO_ERRORS, 0, "passed", "0 findings"),
        ("memcheck", "========= ERROR SUMMARY: 3 errors", 86, "failed", "3 findings"),
        (
            "memcheck",
            f"FAILED fused: no\n{NO_ERRORS}",
            1,
            "error",
            "fused: no",
        ),
        (
            "memcheck",
            f"{NO_REGISTERS}\n{NO_ERRORS}",
            1,
            "left out",
            "too many resources",
        ),
        ("memcheck", "no word of a sum", 1, "error", "no summary; no word of a sum"),
        ("memcheck", "Device not supported", 1, "left out", "not supported"),
        (
            "racecheck",
            RACE.format(CLUSTER_KERNEL),
            86,
            schema.TO_JUDGE,
            "forward_grad_cluster_kernel 2x",
        ),
        (
            "racecheck",
            RACE.format(f"{OURS}divergence_rows<float>(int)"),
            86,
            "failed",
            "divergence_rows 2x",
        ),
        ("memcheck", RACE.format(CLUSTER_KERNEL), 86, "failed", "forward_grad_cluster_kernel"),
    ],
)
def test_verdicts_of_the_sanitizer(tool, output, code, outcome, words):
    found, detail = part_sanitizer.verdict(tool, output, code)
    assert found == outcome and words in detail


def test_a_sanitizer_that_is_ended_says_what_ran_and_what_it_found():
    banner = "========= COMPUTE-SANITIZER\nran divergence\n"
    outcome, detail = part_sanitizer.unfinished("memcheck", banner, 9.4)
    assert (outcome, detail) == ("left out", "not done after 9 s; ran divergence")
    read = f"========= Invalid __global__ read of size 4\n=========     at {OURS}rows<int>(int)\n"
    outcome, detail = part_sanitizer.unfinished("memcheck", banner + read, 9.4)
    assert outcome == "failed" and "rows 1x" in detail and "Invalid __global__ read" in detail
    race = RACE.format(CLUSTER_KERNEL).rpartition("\n")[0]
    assert part_sanitizer.unfinished("racecheck", race, 9.4)[0] == schema.TO_JUDGE


def test_counters_are_read_from_ncu(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'python'}")
    context, rows = context_with(tmp_path, "ncu", f"cat <<'E'\n{NCU}E\n")
    part_ncu.run(context)
    (time_row, dram) = (schema.Counter(**{k: row[k] for k in row if k != "kind"}) for row in rows)
    assert time_row == Counter(
        "void opd::rows<float>(args)", 0, "gpu__time_duration.sum", "ns", 412345.0
    )
    assert (dram.launch, dram.value) == (1, 91.5)
    context, _ = context_with(tmp_path, "ncu", "exit 9\n")
    with pytest.raises(RuntimeError, match="no counter; exit code 9"):
        part_ncu.run(context)
    asked = f'echo "$@" >>{tmp_path}/asked; '
    unknown = 'case "$*" in *launch__*) echo "==ERROR== Failed to find metric x"; exit 1;; esac\n'
    context, rows = context_with(tmp_path, "ncu", f"{asked}{unknown}cat <<'E'\n{NCU}E\n")
    part_ncu.run(context)
    assert len(rows) == 2
    assert "--launch-count 3 --kill yes" in (tmp_path / "asked").read_text()
    # what it prints when it is told to end
    (tmp_path / "counted").write_text(NCU)
    late = f"trap 'cat {tmp_path}/counted; exit' INT\nsleep 60 & wait\n"
    context, rows = context_with(tmp_path, "ncu", late)
    context.deadline = time.monotonic() + 1.0
    part_ncu.run(context)
    assert len(rows) == 2
    refused = "echo '==ERROR== ERR_NVGPUCTRPERM - The user does not have permission'; exit 1\n"
    context, rows = context_with(tmp_path, "ncu", refused)
    part_ncu.run(context)
    assert [(row["name"], row["outcome"]) for row in rows] == [("ncu", "left out")]


def test_the_compilers_report():
    first, second = part_build.kernels_of(part_build.RECORDED)
    assert (first.arch, first.registers, first.shared_bytes, first.spill_bytes) == (
        "sm_90a",
        40,
        4096,
        0,
    )
    assert (second.registers, second.spill_bytes, second.stack_bytes) == (255, 20, 16)


# -- pieces --------------------------------------------------------------------------------------


def test_bare_gemms_are_the_gemms():
    inputs = cases.inputs_of(CPU, cases.Shape(7, 64, 8, 12), torch.float32)
    gemms = cases.Gemms(CPU, inputs, cases.Cut(3, 2))
    gemms.student(slice(3, 6))
    torch.testing.assert_close(gemms.logits, inputs[0][3:6] @ inputs[1].t())
    gemms.teacher(slice(6, 7))
    torch.testing.assert_close(gemms.logits[:1], inputs[2][6:] @ inputs[3].t())
    expected = gemms.grad_logits @ inputs[1]
    for split in gemms.splits():
        gemms.grad_hidden.zero_()
        gemms.grad_of_hidden(slice(0, 3), split)
        torch.testing.assert_close(gemms.grad_hidden, expected)
    for rows in gemms.chunks():
        gemms.grad_of_weight(rows)
    padded = torch.cat([gemms.grad_logits, gemms.grad_logits, gemms.grad_logits[:1]])
    torch.testing.assert_close(gemms.grad_weight, padded.t() @ inputs[0])
    assert gemms.splits() == [1, 2, 4, 8] and gemms.best_split() in gemms.splits()


def test_gemms_of_a_gradient_in_place_are_the_same_ones():
    inputs = cases.inputs_of(CPU, cases.Shape(5, 64, 8, 12), torch.bfloat16)
    gemms = cases.Gemms(CPU, inputs, cases.Cut(5, 5))
    in_place = gemms.in_place()
    # 16 bits in rows of float32
    assert in_place.grad_logits.stride() == (2 * 64, 1)
    found = []
    for variant in (gemms, in_place):
        variant.grad_of_hidden(slice(0, 5))
        variant.grad_of_weight(slice(0, 5))
        found.append((variant.grad_hidden.clone(), variant.grad_weight.clone()))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) and one.any()


def test_the_cut_is_what_explain_says(monkeypatch):
    inputs = cases.inputs_of(CPU, cases.Shape(40, 64, 8, 12), torch.float32)
    cut = cases.cut_of(inputs, 1 << 14, "cpu")
    assert 1 < cut.chunk < 40 and cut.teacher == cut.chunk and str(cut) == f"M = {cut.chunk}"
    said = "path A: 8 chunk(s) of up to 1024 of 8192 tokens, the teacher's logits 512 tokens at a"
    monkeypatch.setattr("opd_kernels.explain", lambda *args, **options: f"{said} time, 1 MiB")
    assert str(cases.cut_of(inputs, 1 << 30, "cuda")) == "M = 1024, teacher 512"
    monkeypatch.setattr("opd_kernels.explain", lambda *args, **options: "path B")
    with pytest.raises(RuntimeError, match="expected 'path A"):
        cases.cut_of(inputs, 1 << 30, "cuda")


def test_a_close_teacher_differs_by_the_gap():
    shape = cases.Shape(64, 500, 32, 96)
    inputs = cases.close_inputs_of(CPU, shape, torch.float32, gap=0.1)
    gap = inputs.teacher_hidden @ inputs.teacher_lm_head_weight.t()
    gap -= inputs.student_hidden @ inputs.student_lm_head_weight.t()
    assert gap.std() == pytest.approx(0.1, rel=0.1)


def test_laws_on_a_device_are_those_of_the_cpu_by_default():
    shape = cases.Shape(8, 211, 16, 24)
    for here, there in zip(laws.peaked(shape), laws.peaked(shape, device="cpu"), strict=True):
        assert torch.equal(here, there)


def test_slow_contestants_sit_rounds_out():
    calls = {"quick": 0, "slow": 0}

    def run(name: str, seconds: float):
        def call():
            calls[name] += 1
            time.sleep(seconds)

        return call

    variants = {"quick": run("quick", 0.0), "slow": run("slow", 0.05)}
    times = CPU.turns(variants, rounds=6, slow=3.0)
    assert (times["quick"].rounds, times["slow"].rounds) == (6, 2)
    assert calls == {"quick": 7, "slow": 3}
    assert CPU.turns(variants, rounds=6, budget_s=0.0)["quick"].rounds == 2


def test_a_peer_that_raises_is_left_out_with_its_reason():
    rows: list[dict] = []
    context = Context(True, rows.append, time.monotonic() + 60)

    def broken() -> None:
        raise torch.OutOfMemoryError("tried to allocate much")

    assert not part_peers.starts(CPU, context, "trl: case", broken)
    assert rows == [
        {
            "kind": "Check",
            "name": "trl: case",
            "outcome": "left out",
            "detail": "out of memory: tried to allocate much",
        }
    ]
    with pytest.raises(RuntimeError, match="CUDA error"):
        part_peers.starts(CPU, context, "trl", lambda: exec('raise RuntimeError("CUDA error: x")'))


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"schema_version": 0}, "schema_version: expected 1, got 0"),
        ({"dirty": "yes"}, "results.dirty: expected bool"),
        ({"extra": 1}, "results.extra: unknown"),
        ({"parts": {"lunch": None}}, "results.parts.lunch: expected dict"),
        ({"goals": [{"goal": "x"}]}, "results.goals\\[0\\]"),
    ],
)
def test_the_schema_is_held(whole, change, where):
    results, _, _ = whole
    schema.check(results)
    with pytest.raises(schema.SchemaError, match=where):
        schema.check({**results, **change})


def test_rows_of_another_shape_are_refused():
    row = schema.row_of(Check("a", "passed"))
    schema.check_row(row)
    for bad in ({**row, "kind": "Chuck"}, {**row, "outcome": 1}, {"kind": "Check", "name": "a"}):
        with pytest.raises(schema.SchemaError):
            schema.check_row(bad)
