# SPDX-License-Identifier: Apache-2.0
"""speculative_verify on a GPU backend: raw ops against float64, and decisions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import opd_kernels as opk
from opd_kernels import _laws
from opd_kernels.token_logprobs import pack_law
from tests.cases import BF16, F16, F32, F64, INF, NAN, FusedCase, fused_of
from tests.checks import dtype_id
from tests.options import LAW_OPTIONS, law_options_of
from tests.verification import MODES, drafts_of, same

# what a tile, a row of several, the end of one and an odd stride are made of
WIDTHS = (1, 17, 2051)
CUTS = ((0, 1.0), (1, 1.0), (0, 0.8), (300, 0.9), (0, 1e-6))


def logits_of(num_rows: int, width: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    """Peaked and flat rows, one masked but for three columns, one of few values."""
    generator = torch.Generator().manual_seed(1000 * num_rows + width + seed)
    logits = torch.randn(num_rows, width, generator=generator) * 3
    if num_rows > 2:
        logits[1] *= 0.1
        logits[2, 1 + torch.randperm(width - 1, generator=generator)[2:]] = -INF
    if num_rows > 3:
        logits[3] = logits[3].round()
    return logits.to(dtype)


def law_of(logits: Tensor, vocab_size: int, **options) -> tuple:
    """bias, temperatures, numbers and vocab_size of a side."""
    defaults = {"temperature": 1.0, "softcap": None, "logit_scale": 1.0}
    return pack_law(_laws.rows_of("test", logits), vocab_size, **{**defaults, **options})


def rows_of(ops, logits: Tensor, ids: Tensor, vocab_size: int, cut, **options):
    law = law_of(logits, vocab_size, **options)
    return ops.speculative_verify_rows_fwd(logits, ids, *law, *cut)


def z_of(
    logits: Tensor, vocab_size: int, bias=None, temperature=1.0, softcap=None, logit_scale=1.0
) -> Tensor:
    """What a law is the softmax of, in float64."""
    z = logits[:, :vocab_size].double()
    z = logit_scale * (z if bias is None else z + bias.double())
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z / (temperature if isinstance(temperature, float) else temperature.double()[:, None])


def cut_of(z: Tensor, cut) -> tuple[Tensor, Tensor]:
    """(floor, lse of what is kept) of each row, from its sorted entries."""
    top_k, top_p = cut
    best = z.sort(1, descending=True).values
    floor = z.new_full((len(z),), -INF)
    if 0 < top_k < z.shape[1]:
        floor = best[:, top_k - 1]
    if top_p < 1.0:
        p = torch.where(best >= floor[:, None], best, -INF).softmax(1)
        count = (p.cumsum(1) - p < top_p).sum(1, keepdim=True).clamp(min=1)
        floor = best.gather(1, count - 1).squeeze(1)
    return floor, torch.where(z >= floor[:, None], z, -INF).logsumexp(1)


def truth_of(z: Tensor, ids: Tensor, cut) -> list[Tensor]:
    """The outputs of rows_fwd for rows that have a law."""
    floor, lse = cut_of(z, cut)
    own = z.gather(1, ids.clamp(min=0)[:, None])
    columns = torch.arange(z.shape[1], device=z.device)
    before = ((z > own) | ((z == own) & (columns < ids[:, None]))).sum(1)
    logprobs = torch.where(own.squeeze(1) >= floor, own.squeeze(1) - lse, -INF)
    logprobs, ranks = torch.where(ids < 0, NAN, logprobs), torch.where(ids < 0, -1, before)
    return [lse, floor, logprobs, ranks, z.argmax(1), z.amax(1)]


def check_rows(gpu, logits: Tensor, ids: Tensor, vocab_size: int, cut, **options) -> None:
    """1e-5 nats, and the same ids and floors where no option rounds z."""
    got = rows_of(gpu.ops, logits, ids, vocab_size, cut, **options)
    truth = truth_of(z_of(logits, vocab_size, **options), ids, cut)
    for name, mine, exact in zip(
        ("lse", "floor", "logprobs", "ranks", "argmax", "largest"), got, truth, strict=True
    ):
        exactly = not options and name not in ("lse", "logprobs")
        tolerance = 0.0 if exactly or mine.dtype == torch.int32 else 1e-5
        torch.testing.assert_close(
            mine.double(), exact.double(), rtol=tolerance, atol=tolerance, equal_nan=True, msg=name
        )


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_speculative_verify_rows_are_those_of_float64(gpu, width, cut):
    logits = logits_of(4, width + 3)[:, :width]
    ids = torch.tensor([0, width - 1, width // 2, -1])
    check_rows(gpu, logits, ids, width, cut)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=dtype_id)
@pytest.mark.parametrize("cut", [(0, 1.0), (30, 0.7)], ids=str)
def test_speculative_verify_rows_of_16_bits_are_those_of_float64(gpu, cut, dtype):
    ids = torch.tensor([7, -1, 2999])
    check_rows(gpu, logits_of(3, 3000, dtype), ids, 3000, cut)


@pytest.mark.parametrize("cut", [(0, 1.0), (50, 0.9)], ids=str)
@pytest.mark.parametrize("option", LAW_OPTIONS)
def test_speculative_verify_rows_with_options_are_those_of_float64(gpu, option, cut):
    options = law_options_of(option, 3)
    logits = logits_of(3, 1500, seed=1)
    logits[1] *= 10
    ids = torch.full((3,), -1)
    bias = torch.randn(1490)
    check_rows(gpu, logits, ids, 1490, cut, bias=bias, **options)


def test_speculative_verify_rows_are_cut_where_float32_has_gaps(gpu):
    # 8 is one step of float32 at 1e8
    logits = torch.full((1, 3000), 1e8 - 8)
    logits[0, 7] = 1e8
    for cut in ((0, 0.9), (2999, 0.9), (0, 0.4)):
        check_rows(gpu, logits, torch.tensor([9]), 3000, cut)


def test_speculative_verify_rows_of_hostile_rows(gpu):
    logits = logits_of(8, 2100)
    logits[0, 5], logits[1, 2099], logits[2] = NAN, INF, -INF
    # row 5 is all equal, row 6 cut inside a tie; ids out of range are not read
    logits[5], logits[6, ::2] = 1.5, 9.0
    ids = torch.tensor([3, 3, 3, 2100, -2, 1000, 1001, -1])
    for cut in ((0, 1.0), (3, 1.0), (0, 0.5), (1500, 0.99)):
        out = rows_of(gpu.ops, logits, ids, 2100, cut)
        lse, floor, logprobs, ranks, argmax, largest = out
        assert lse.isnan().tolist() == [True, True, False, True, True, False, False, False]
        assert lse[2] == largest[2] == -INF and argmax[:5].tolist() == [-1] * 5
        assert ranks[:5].tolist() == [-1] * 5
        assert bool(floor[:5].isnan().all()) and bool(logprobs[:5].isnan().all())
        for mine, exact in zip(out, truth_of(logits[5:].double(), ids[5:], cut), strict=True):
            torch.testing.assert_close(
                mine[5:].double(), exact.double(), rtol=1e-5, atol=1e-5, equal_nan=True
            )


def test_speculative_verify_reads_no_column_beyond_the_vocabulary(gpu):
    logits, ids = logits_of(3, 1300), torch.tensor([5, -1, 1200])
    padded = torch.full((3, 1333), NAN)
    padded[:, :1300] = logits
    for cut in ((0, 1.0), (20, 0.9)):
        expected = rows_of(gpu.ops, logits, ids, 1300, cut)
        for one, two in zip(rows_of(gpu.ops, padded, ids, 1300, cut), expected, strict=True):
            assert torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0))


# -- the residual law ----------------------------------------------------------------------------


def residual_of(ops, teacher: Tensor, student: Tensor | None, uniforms: Tensor, **changes):
    """Every row of the teacher against that of the student, both cut a little."""
    vocab_size = teacher.shape[1]
    none = torch.full((len(teacher),), -1)
    cut = changes.get("cut", (0, 1.0))
    of_teacher = rows_of(ops, teacher, none, vocab_size, cut)
    of_student = (None, None)
    if student is not None:
        of_student = rows_of(ops, student, none[: len(student)], vocab_size, cut)
    rows = torch.arange(len(teacher))
    ones = torch.ones(len(uniforms), dtype=F64)
    return ops.speculative_verify_residual_fwd(
        teacher,
        student,
        changes.get("teacher_rows", rows),
        changes.get("student_rows", rows if student is not None else none),
        of_teacher[0],
        of_teacher[1],
        of_student[0],
        of_student[1],
        changes.get("teacher_scale", ones),
        changes.get("student_scale", ones),
        uniforms,
        None,
        None,
        None,
        None,
        [1.0, 0.0, 1.0] * 2,
        vocab_size,
        changes.get("draws", True),
    )


def residual_truth(teacher, student, uniforms, cut=(0, 1.0), **changes) -> list[Tensor]:
    """The outputs of residual_fwd for rows that have a law; a student may be None."""
    everyone = torch.arange(len(teacher))
    ones = torch.ones(len(uniforms), dtype=F64)

    def law(logits: Tensor, rows: Tensor) -> Tensor:
        z = logits.double()
        floor, lse = cut_of(z, cut)
        p = torch.where(z >= floor[:, None], (z - lse[:, None]).exp(), 0.0)
        return torch.where(rows[:, None] < 0, NAN, p[rows.clamp(min=0)])

    p = law(teacher, changes.get("teacher_rows", everyone))
    q = torch.full_like(p, NAN)
    if student is not None:
        q = law(student, changes.get("student_rows", everyone))
    factor, less = (changes.get(f"{side}_scale", ones) for side in ("teacher", "student"))
    has_student = ~q[:, 0].isnan() & (less != 0)
    has_student = has_student & ~p[:, 0].isnan()
    minus = torch.where(has_student[:, None], less[:, None] * q, 0.0)
    r = (factor[:, None] * p - minus).clamp(min=0.0)
    mass = r.sum(1)
    r = torch.where(mass[:, None] == 0, p, r)
    upto = r.cumsum(1)
    place = uniforms[:, None] * upto[:, -1:]
    token = ((upto > place) & (r > 0)).to(torch.int8).argmax(1)
    at = token[:, None]
    token = torch.where(mass.isnan(), -1, token)
    overlap = torch.where(has_student, torch.minimum(p, q).sum(1), NAN)
    of_student = torch.where(mass.isnan(), NAN, q.gather(1, at).squeeze(1).log())
    return [mass, overlap, token, of_student, p.gather(1, at).squeeze(1).log()]


def inner_uniforms(teacher: Tensor, student: Tensor | None, cut=(0, 1.0), **changes) -> Tensor:
    """For each row one whose token is the same a little to its left and to its right."""
    num_rows = len(changes.get("teacher_rows", teacher))
    generator = torch.Generator().manual_seed(5)
    chosen, settled = torch.zeros(num_rows, dtype=F64), torch.zeros(num_rows, dtype=torch.bool)
    for _ in range(40):
        tried = 1e-5 + 0.9999 * torch.rand(num_rows, generator=generator, dtype=F64)
        left, right = (
            residual_truth(teacher, student, tried + shift, cut, **changes)[2]
            for shift in (-1e-5, 1e-5)
        )
        chosen = torch.where(settled, chosen, tried)
        settled |= left == right
    assert bool(settled.all())
    return chosen


def check_residual(gpu, teacher, student, cut=(0, 1.0), **changes) -> None:
    """Tokens to the id; the rest to 1e-5, a mass of near laws to 1e-6."""
    uniforms = inner_uniforms(teacher, student, cut, **changes)
    truth = residual_truth(teacher, student, uniforms, cut, **changes)
    # an index beyond the rows is none on a GPU
    got = residual_of(gpu.ops, teacher, student, uniforms, cut=cut, **changes)
    for name, mine, exact in zip(
        ("mass", "overlap", "tokens", "student_logprobs", "teacher_logprobs"),
        got,
        truth,
        strict=True,
    ):
        tolerance = (0.0, 0.0) if name == "tokens" else (1e-5, 1e-6)
        torch.testing.assert_close(
            mine.double(),
            exact.double(),
            rtol=tolerance[0],
            atol=tolerance[1],
            equal_nan=True,
            msg=name,
        )


@pytest.mark.parametrize("cut", [(0, 1.0), (60, 0.95)], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_speculative_verify_residual_is_that_of_float64(gpu, width, cut):
    teacher, student = logits_of(4, width), logits_of(4, width, seed=9)
    for other in (student, None):
        check_residual(gpu, teacher, other, cut)


def test_speculative_verify_residual_takes_rows_by_index_and_factors(gpu):
    teacher, student = logits_of(5, 2300), logits_of(4, 2300, seed=3)
    changes = {
        "teacher_rows": torch.tensor([4, 0, 0, -1, 3]),
        "student_rows": torch.tensor([0, 3, -1, 2, 1]),
        "teacher_scale": torch.tensor([0.3, 1.0, 1.0, 1.0, 0.7]).double(),
        "student_scale": torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]).double(),
    }
    check_residual(gpu, teacher, student, **changes)
    uniforms = torch.rand(5, dtype=F64)
    drawn, undrawn = (
        residual_of(gpu.ops, teacher, student, uniforms, draws=draws, **changes)
        for draws in (True, False)
    )
    assert undrawn[2].tolist() == [-1] * 5 and bool(torch.stack(undrawn[3:]).isnan().all())
    for one, two in zip(drawn[:2], undrawn[:2], strict=True):
        assert torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0))
    # a GPU kernel can't raise without a sync, and must not read beyond the rows
    changes["teacher_rows"] = torch.tensor([4, 0, 0, 99, 3])
    changes["student_rows"] = torch.tensor([0, 3, 99, 2, 1])
    for one, two in zip(
        residual_of(gpu.ops, teacher, student, uniforms, **changes), drawn, strict=True
    ):
        assert torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0))


def test_speculative_verify_residual_of_equal_laws_draws_from_the_teacher(gpu):
    teacher = logits_of(4, 1100)
    uniforms = inner_uniforms(teacher, None)
    got = residual_of(gpu.ops, teacher, teacher.clone(), uniforms)
    assert bool((got[0] == 0).all())
    torch.testing.assert_close(got[1], torch.ones(4, dtype=F64))
    assert torch.equal(got[2].long(), residual_truth(teacher, None, uniforms)[2])


def test_speculative_verify_draws_no_token_without_mass(gpu):
    # also at the ends of the uniforms, and where whole tiles have no mass
    teacher = torch.full((3, 6000), -INF)
    teacher[:, [1500, 4100, 4101]] = 0.0
    student = teacher.clone()
    student[1, 1500] = -1.0
    below_one = 1.0 - 2.0**-53
    for uniform, tokens in ((0.0, [1500, 1500, 1500]), (below_one, [4101, 1500, 4101])):
        uniforms = torch.full((3,), uniform, dtype=F64)
        out = residual_of(gpu.ops, teacher, student, uniforms)
        assert out[2].tolist() == tokens
    for uniform in (-1.0, 2.0, NAN):
        out = residual_of(gpu.ops, teacher, student, torch.full((3,), uniform, dtype=F64))
        assert set(out[2].tolist()) <= {1500, 4100, 4101}


def test_speculative_verify_residual_of_a_broken_law_is_none(gpu):
    teacher, student = logits_of(4, 1100), logits_of(4, 1100, seed=2)
    teacher[0, 7], teacher[1], student[2, 1000] = NAN, -INF, INF
    out = residual_of(gpu.ops, teacher, student, torch.full((4,), 0.5, dtype=F64))
    assert (out[2] == -1).tolist() == [True, True, True, False]
    for values in (out[0], out[1], out[3], out[4]):
        assert values.isnan().tolist() == [True, True, True, False]


def test_speculative_verify_opcheck(gpu):
    # without NaN, of which opcheck makes a difference
    logits, ids = torch.randn(3, 20), torch.tensor([3, 0, 17])
    law = (torch.randn(18), torch.tensor([1.5, 0.7, 1.0]), [0.5, 9.0, 1.0], 18)
    torch.library.opcheck(gpu.ops.speculative_verify_rows_fwd, (logits, ids, *law, 17, 0.999))
    lse, floor, *_ = gpu.ops.speculative_verify_rows_fwd(logits, ids, *law, 17, 0.999)
    rows, ones = torch.arange(3), torch.ones(3, dtype=F64)
    arguments = (
        logits, logits.flip(0), rows, rows, lse, floor, lse.flip(0), floor.flip(0), ones, ones,
        torch.rand(3).double(), law[0], law[0], law[1], law[1].flip(0), law[2] * 2, 18, True,
    )  # fmt: skip
    torch.library.opcheck(gpu.ops.speculative_verify_residual_fwd, arguments)


# -- the op --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_speculative_verify_decides_as_the_reference_does(gpu, mode):
    drafts = drafts_of(6, 3, 150, F32, seed=4)
    options = drafts.options(mode, num_topk=4, num_draft=torch.tensor([3, 2, 0, 1, 3, 3]))
    if mode in ("rejection", "block"):
        options |= {"with_acceptance": True}
    if mode != "greedy":
        options |= {"temperature": 0.8, "top_k": 90, "top_p": 0.97}
    got, truth = (
        opk.speculative_verify(*drafts[:3], backend=backend, **options)
        for backend in (gpu.name, "reference")
    )
    same(got, truth, rtol=1e-5, atol=1e-5)


def test_speculative_verify_by_thresholds_of_many_is_that_of_each(gpu):
    # one by one the laws of a sequence are a launch, together those of a place
    drafts = drafts_of(4, 3, 150, F32, seed=5)
    options = drafts.options("threshold", threshold=0.25, backend=gpu.name)
    got = opk.speculative_verify(*drafts[:3], **options)
    assert got.num_accepted.unique().numel() > 1
    for i in range(4):
        one = slice(i, i + 1)
        few = {"uniforms": drafts.uniforms[one], "history": options["history"][one]}
        alone = opk.speculative_verify(*(t[one] for t in drafts[:3]), **(options | few))
        same(alone, type(got)(*(None if value is None else value[one] for value in got)))


def test_speculative_verify_of_no_drafts_draws_from_the_teacher(gpu):
    drafts = drafts_of(4, 0, 150, F32)
    got, truth = (
        opk.speculative_verify(*drafts[:3], uniforms=drafts.uniforms, backend=backend)
        for backend in (gpu.name, "reference")
    )
    same(got, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["rejection", "block"])
def test_fused_linear_speculative_verify_decides_as_the_reference_does(gpu, mode):
    inputs = fused_of(FusedCase(gpu.name, 8, 301, 16, 8), F32)
    student = inputs.student_hidden[:6].view(2, 3, -1)
    teacher = inputs.teacher_hidden.view(2, 4, -1)
    heads = inputs.student_lm_head_weight, inputs.teacher_lm_head_weight
    generator = torch.Generator().manual_seed(3)
    drafts = (student @ heads[0].t()).flatten(0, 1).softmax(-1).multinomial(1, generator=generator)
    uniforms = torch.rand(2, 4, generator=generator, dtype=F64)
    arguments = drafts.view(2, 3), student, heads[0], teacher, heads[1]
    normal = torch.randn(2, 301, generator=generator)
    pair = 0.3 * normal[:, : student.shape[2]], normal.t(), 0.5
    for options in ({"top_p": 0.9}, {"student_lora": pair}):
        got, truth = (
            opk.fused_linear_speculative_verify(
                *arguments, uniforms=uniforms, mode=mode, backend=backend, **options
            )
            for backend in (gpu.name, "reference")
        )
        same(got, truth, rtol=1e-5, atol=1e-5)


def test_speculative_verify_of_equal_models_keeps_every_draft(gpu):
    generator = torch.Generator().manual_seed(0)
    teacher = 1.5 * torch.randn(4, 40, generator=generator)
    student = teacher[:-1]
    drafts = torch.stack(
        [x.softmax(-1).multinomial(64, True, generator=generator) for x in student], 1
    )
    uniforms = torch.rand(64, 4, generator=generator, dtype=F64)
    uniforms[:8] = 1.0 - 2.0**-53
    for mode in ("rejection", "block"):
        v = opk.speculative_verify(
            drafts,
            student.expand(64, -1, -1),
            teacher.expand(64, -1, -1),
            uniforms=uniforms,
            mode=mode,
            backend=gpu.name,
        )
        assert bool((v.num_accepted == 3).all()), mode
