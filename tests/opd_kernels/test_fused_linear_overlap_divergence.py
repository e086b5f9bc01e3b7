# SPDX-License-Identifier: Apache-2.0
"""opk.fused_linear_overlap_divergence on CPU: truth, tails, chunks, memory, errors."""

from __future__ import annotations

import pytest
import torch

import opd_kernels as opk
from opd_kernels import _buffers, reference
from opd_kernels import divergences as D
from opd_kernels._overlap_cells import STATISTICS, TAILS
from tests import eager
from tests.cases import BF16, F16, F32, F64, SPECS
from tests.checks import dtype_id, leaf, upstream
from tests.memory import peak_bytes
from tests.sparse import is_refused
from tests.tolerance import assert_within_eager

INF = float("inf")
every_reduction = pytest.mark.parametrize("reduction", ["sum", "none"])
TENSORS = ("hidden", "head", "bias", "extra")


class Pair:
    """Two models of different vocabularies that share `num_shared` tokens in any order."""

    def __init__(
        self,
        dtype=F64,
        num_tokens=13,
        sizes=(41, 53),
        num_shared=29,
        widths=(8, 6),
        *,
        bent=False,
        masked=True,
        extra=False,
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)

        def gaussian(*shape):
            return torch.randn(*shape, generator=generator, dtype=F64)

        self.tensors = [
            gaussian(num_tokens, widths[0]).to(dtype),
            (gaussian(sizes[0], widths[0]) * 2 / widths[0] ** 0.5).to(dtype),
            gaussian(sizes[0]).to(dtype) * 0.5 if bent else None,
            None,
        ]
        self.teacher = [
            gaussian(num_tokens, widths[1]).to(dtype),
            (gaussian(sizes[1], widths[1]) * 2 / widths[1] ** 0.5).to(dtype),
        ]
        self.ids = [torch.randperm(n, generator=generator)[:num_shared] for n in sizes]
        self.options = {}
        if bent:
            self.options |= {
                "teacher_bias": gaussian(sizes[1]).to(dtype) * 0.5,
                "student_softcap": 5.0,
                "teacher_softcap": 7.0,
                "student_logit_scale": 0.8,
                "temperature": (
                    torch.rand(num_tokens, generator=generator) + 0.5,
                    torch.rand(num_tokens, generator=generator) + 0.5,
                ),
            }
        if masked and num_tokens > 2:
            weights = torch.rand(num_tokens, generator=generator) - 0.2
            weights[1::4] = 0.0
            self.tensors[0][1::4] = self.teacher[0][1::4] = float("nan")
            self.options["token_weights"] = weights
            for i, values in enumerate(self.options.get("temperature", ())):
                values[1::4] = (float("nan"), 0.0)[i]
        if extra:
            self.tensors[3] = gaussian(num_tokens).to(torch.promote_types(dtype, F32))
            self.tensors[3][2::5] = -INF
            given = gaussian(num_tokens).to(self.tensors[3].dtype)
            given[2::5] = -INF
            self.options["teacher_extra_logits"] = given

    def call(self, function, leaves, **more):
        hidden, head, bias, extra = leaves
        return function(
            hidden,
            head,
            *self.teacher,
            *self.ids,
            student_bias=bias,
            student_extra_logits=extra,
            **(self.options | more),
        )

    def gradients(self, function, dtype=None, upstream=None, **more):
        """(loss, gradients of what is there, statistics)."""
        leaves = [None if x is None else leaf(x, dtype) for x in self.tensors]
        out = self.call(function, leaves, **more)
        out.loss.backward(None if upstream is None else upstream.to(out.loss.dtype))
        grads = [x.grad for x in leaves if x is not None]
        return [out.loss.detach(), *grads, *out.statistics.values()]


def budget(pair, num_tokens):
    """Bytes for chunks of about so many tokens in float64."""
    sizes = pair.tensors[1].shape[0] + pair.teacher[1].shape[0]
    widths = 2 * (pair.tensors[1].shape[1] + pair.teacher[1].shape[1])
    return num_tokens * (8 * (4 * sizes + widths) + 128) + 32 * sizes


@every_reduction
@pytest.mark.parametrize("compact", [None, False])
@pytest.mark.parametrize("extra", [False, True], ids=["", "extra"])
@pytest.mark.parametrize("tail", TAILS)
def test_overlap_divergence_of_bent_heads_is_the_reference(tail, extra, compact, reduction):
    pair = Pair(bent=True, extra=extra)
    names = [n for n in STATISTICS if tail != "renormalize_both" or not n.endswith("mass")]
    more = {
        "tail": tail,
        "divergence": [(0.3, "forward_kl"), (0.7, D.jsd(beta=0.3))],
        "reduction": reduction,
        "statistics": names,
        "upstream": upstream(13) if reduction == "none" else torch.tensor(1.7),
    }
    got = pair.gradients(
        opk.fused_linear_overlap_divergence,
        workspace_bytes=budget(pair, 4),
        compact_tokens=compact,
        **more,
    )
    expected = pair.gradients(reference.fused_linear_overlap_divergence, **more)
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("tail", TAILS)
def test_every_divergence_is_the_reference_and_what_is_infinite_is_refused(tail):
    pair = Pair(seed=1)
    for spec in SPECS:
        if is_refused(spec, tail):
            with pytest.raises(ValueError, match="finite where the teacher has no mass"):
                pair.gradients(
                    opk.fused_linear_overlap_divergence, divergence=spec.public(), tail=tail
                )
            continue
        got = pair.gradients(
            opk.fused_linear_overlap_divergence, divergence=spec.public(), tail=tail
        )
        expected = pair.gradients(
            reference.fused_linear_overlap_divergence, divergence=spec, tail=tail
        )
        for one, two in zip(got, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10, msg=f"{spec} {tail}")


@every_reduction
@pytest.mark.parametrize("tail", TAILS)
def test_overlap_divergence_gradcheck_float64(tail, reduction):
    pair = Pair(
        num_tokens=3, sizes=(7, 9), num_shared=5, widths=(3, 2), bent=True, masked=False, extra=True
    )
    pair.tensors[3].nan_to_num_(neginf=0.3)
    pair.options["teacher_extra_logits"].nan_to_num_(neginf=-0.4)

    def loss(*leaves):
        return pair.call(
            opk.fused_linear_overlap_divergence,
            leaves,
            divergence="forward_kl",
            tail=tail,
            reduction=reduction,
        ).loss

    assert torch.autograd.gradcheck(loss, [leaf(x) for x in pair.tensors], eps=1e-6, atol=1e-7)


def _eager(hidden, head, teacher_hidden, teacher_head, student_ids, teacher_ids, tail, **keywords):
    """What a careful user writes: whole float32 logits, the cells, autograd."""
    tables = []
    for states, weight, ids in (
        (hidden, head, student_ids),
        (teacher_hidden, teacher_head, teacher_ids),
    ):
        logits = states.nan_to_num().float() @ weight.float().T
        shared = logits[:, ids]
        is_other = torch.ones(len(weight), dtype=torch.bool)
        is_other[ids] = False
        rest = logits[:, is_other].logsumexp(1, keepdim=True)
        tables.append(torch.cat([shared, rest], 1) if tail == "bucket" else shared)
    return eager.divergence(*tables, **keywords)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=dtype_id)
@pytest.mark.parametrize("tail", ["bucket", "renormalize_both"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_overlap_divergence_is_within_twice_eager(name, tail, dtype):
    spec = next(s for s in SPECS if s.name == name)
    pair = Pair(dtype, num_tokens=33, sizes=(1423, 1201), num_shared=900, widths=(83, 40))
    grad = upstream(33)
    more = {"upstream": grad, "tail": tail}
    truth = pair.gradients(
        reference.fused_linear_overlap_divergence, F64, divergence=spec, reduction="none", **more
    )
    got = pair.gradients(
        opk.fused_linear_overlap_divergence,
        divergence=spec.public(),
        reduction="none",
        workspace_bytes=400_000,
        **more,
    )
    leaves = [leaf(x) for x in pair.tensors[:2]]
    loss = _eager(*leaves, *pair.teacher, *pair.ids, tail, divergence=spec, **pair.options)
    loss.backward(grad)
    plain = [loss.detach(), *(x.grad for x in leaves)]
    for part, one, two, three in zip(("loss", *TENSORS), got, plain, truth, strict=False):
        assert_within_eager(one, two, three, f"{name} {tail} {dtype_id(dtype)} {part}")


# -- what it is ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [None, torch.arange(37)], ids=["none", "all"])
@pytest.mark.parametrize("tail", TAILS)
def test_one_vocabulary_is_the_fused_divergence(tail, ids):
    pair = Pair(sizes=(37, 37), num_shared=37, seed=2)
    pair.ids = [ids] * 2
    more = {"divergence": "forward_kl", "tail": tail}
    if tail != "renormalize_both":
        more["statistics"] = ("student_mass",)
    got = pair.gradients(opk.fused_linear_overlap_divergence, **more)
    if tail != "renormalize_both":
        counts = (pair.options["token_weights"] != 0).double()
        torch.testing.assert_close(got.pop(), counts)
    leaves = [leaf(x) for x in pair.tensors[:2]]
    out = opk.fused_linear_divergence(
        *leaves, *pair.teacher, divergence="forward_kl", **pair.options
    )
    out.loss.backward()
    for one, two in zip(got, [out.loss.detach(), *(x.grad for x in leaves)], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)


def test_the_bucket_pulls_mass_off_the_tokens_that_only_the_student_has():
    """The gradient of tokens that are not shared: one number a row, in the law's proportions."""
    pair = Pair(num_tokens=1, masked=False, seed=3)
    hidden, head = pair.tensors[:2]
    bias = leaf(torch.zeros(len(head), dtype=F64))
    pair.call(
        opk.fused_linear_overlap_divergence, (hidden, head, bias, None), divergence="forward_kl"
    ).loss.backward()
    law = (hidden @ head.T).softmax(1)[0]
    is_other = torch.ones(len(head), dtype=torch.bool)
    is_other[pair.ids[0]] = False
    taught = (pair.teacher[0] @ pair.teacher[1].T).softmax(1)[0]
    wanted = 1 - taught[pair.ids[1]].sum()
    expected = law[is_other] * (1 - wanted / law[is_other].sum())
    torch.testing.assert_close(bias.grad[is_other], expected, rtol=1e-10, atol=1e-13)


def test_an_extra_cell_is_one_more_token_of_both():
    pair = Pair(num_shared=29, extra=True, seed=4)
    got = pair.gradients(opk.fused_linear_overlap_divergence, tail="renormalize_both")
    hidden, head, _, extra = (None if x is None else leaf(x) for x in pair.tensors)
    sides = [
        torch.cat([states.nan_to_num() @ weight[ids].T, given[:, None]], 1)
        for states, weight, ids, given in (
            (hidden, head, pair.ids[0], extra),
            (*pair.teacher, pair.ids[1], pair.options["teacher_extra_logits"]),
        )
    ]
    loss = opk.divergence(*sides, token_weights=pair.options["token_weights"]).sum()
    loss.backward()
    for one, two in zip(got, (loss.detach(), hidden.grad, head.grad, extra.grad), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-13)


# -- memory, graphs, frozen sides ----------------------------------------------------------------


def test_overlap_divergence_of_few_shared_tokens_with_softcaps_stays_within_its_workspace():
    pair = Pair(F32, num_tokens=512, sizes=(1000, 6000), num_shared=300, masked=False)
    pair.options |= {"student_softcap": 5.0, "teacher_softcap": 7.0}
    hidden, head = (leaf(x) for x in pair.tensors[:2])
    workspace = 2 << 20

    def step():
        pair.call(
            opk.fused_linear_overlap_divergence,
            (hidden, head, None, None),
            workspace_bytes=workspace,
        ).loss.backward()

    step()
    hidden.grad = head.grad = None
    _buffers.release_workspace()
    peak = peak_bytes(step)
    assert peak <= workspace + 1.05 * (hidden.nbytes + head.nbytes) + (64 << 10), f"{peak} bytes"


@every_reduction
@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_id)
def test_overlap_divergence_stays_within_its_workspace(dtype, reduction):
    pair = Pair(
        dtype, num_tokens=512, sizes=(3000, 4000), num_shared=2200, widths=(64, 96), masked=False
    )
    hidden, head = (leaf(x) for x in pair.tensors[:2])
    workspace = 4 << 20

    def step():
        pair.call(
            opk.fused_linear_overlap_divergence,
            (hidden, head, None, None),
            reduction=reduction,
            workspace_bytes=workspace,
        ).loss.sum().backward()

    step()
    hidden.grad = head.grad = None
    gradients = hidden.nbytes + head.nbytes + (dtype != F32) * 4 * head.numel()
    peak = peak_bytes(step)
    assert peak <= workspace + 1.05 * gradients + (64 << 10), f"{peak} bytes"
    assert peak < 4 * 512 * 4000


@every_reduction
def test_overlap_divergence_trains_one_tensor_alone_and_does_not_depend_on_the_budget(reduction):
    pair = Pair(F32, bent=True, extra=True)

    def run(*which, workspace_bytes=1 << 30):
        leaves = [leaf(x) if i in which else x for i, x in enumerate(pair.tensors)]
        pair.call(
            opk.fused_linear_overlap_divergence,
            leaves,
            reduction=reduction,
            workspace_bytes=workspace_bytes,
        ).loss.sum().backward()
        return [leaves[i].grad for i in which]

    whole = run(*range(4))
    for i in range(4):
        assert torch.equal(run(i)[0], whole[i])
    assert all(map(torch.equal, run(*range(4)), whole))
    for one, two in zip(run(*range(4), workspace_bytes=budget(pair, 2)), whole, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@every_reduction
@pytest.mark.parametrize("tail", TAILS)
def test_overlap_divergence_of_no_tokens(tail, reduction):
    pair = Pair(F32, num_tokens=0)
    got = pair.gradients(
        opk.fused_linear_overlap_divergence,
        divergence="forward_kl",
        tail=tail,
        reduction=reduction,
        upstream=None if reduction == "sum" else torch.zeros(0),
    )
    assert got[0].sum() == 0 and got[1].shape == (0, 8) and bool((got[2] == 0).all())


@pytest.mark.parametrize("tail", ["bucket", "renormalize_both"])
def test_overlap_divergence_compiles_without_a_graph_break(tail):
    pair = Pair(F32, extra=True)

    def loss(hidden, head, extra):
        return pair.call(
            opk.fused_linear_overlap_divergence,
            (hidden * 1.5, head, None, extra),
            tail=tail,
            statistics=("forward_kl",),
        ).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    tensors = [pair.tensors[i] for i in (0, 1, 3)]
    expected, actual = ([leaf(x) for x in tensors] for _ in range(2))
    (3.0 * loss(*expected)).backward()
    (3.0 * compiled(*actual)).backward()
    for one, two in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.grad, two.grad)


@every_reduction
def test_overlap_divergence_opcheck(reduction, monkeypatch):
    pair, calls = Pair(F32, extra=True, bent=True), []
    name = "fused_linear_overlap_divergence_" + ("sum" if reduction == "sum" else "fwd")
    op = getattr(torch.ops.opd, name)

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is op.default:
                calls.append(args)
            return function(*args, **(kwargs or {}))

    with Spy():
        pair.call(
            opk.fused_linear_overlap_divergence,
            pair.tensors,
            reduction=reduction,
            statistics=("student_mass",),
        )
    (arguments,) = calls
    arguments = list(arguments)
    for place in (0, 1):
        arguments[place] = leaf(arguments[place])
    if reduction == "sum":
        arguments[-4] = [True, True, False, False]
    torch.library.opcheck(op.default, tuple(arguments))


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"tail": "drop"},
            "tail must be one of 'bucket', 'renormalize_both', 'renormalize_teacher'",
        ),
        ({"reduction": "mean"}, "reduction must be one of"),
        ({"divergence": "cross_entropy"}, "divergence must compare two laws"),
        ({"statistics": ("student_lse",)}, "statistics must be one of 'student_entropy'"),
        (
            {"statistics": ("student_mass",), "tail": "renormalize_both"},
            "statistics must be one of 'student_entropy'",
        ),
        # 24 bytes of ids for each of 94 tokens
        (
            {"workspace_bytes": 1000},
            r"workspace_bytes must be at least 3\d{3} \(one token .*, got 1000\.$",
        ),
        ({"teacher_extra_logits": torch.zeros(13)}, "must be given together, got only teacher"),
    ],
)
def test_overlap_divergence_says_what_is_wrong(changes, words):
    pair = Pair(F32)
    with pytest.raises(ValueError, match=words):
        pair.call(opk.fused_linear_overlap_divergence, pair.tensors, **changes)


@pytest.mark.parametrize(
    ("ids", "kind", "words"),
    [
        (([0, 1], [1]), ValueError, "teacher_ids must have"),
        (([], []), ValueError, "at least one shared token"),
        (([0, 0], [1, 2]), ValueError, "student_ids must hold every id once, got 0 more often"),
        (([1, 2], [3, 3]), ValueError, "teacher_ids must hold every id once, got 3 more often"),
        (
            ([0, 41], [1, 2]),
            ValueError,
            r"student_ids must be in \[0, 41\), got 41 at position 1.$",
        ),
        (
            ([0, 1], [-1, 2]),
            ValueError,
            r"teacher_ids must be in \[0, 53\), got -1 at position 0.$",
        ),
        (([0.5], [1.0]), TypeError, "student_ids must be int64 or int32"),
        (None, ValueError, "must be given for vocabularies of 41 and 53 tokens"),
    ],
)
@pytest.mark.parametrize("tail", TAILS)
def test_overlap_divergence_refuses_ids_that_pair_nothing(tail, ids, kind, words):
    pair = Pair(F32)
    pair.ids = [None if ids is None else torch.tensor(list(side)) for side in ids or (0, 0)]
    if ids == ([], []):
        pair.ids = [side.long() for side in pair.ids]
    with pytest.raises(kind, match=words):
        pair.call(
            opk.fused_linear_overlap_divergence, pair.tensors, tail=tail, divergence="forward_kl"
        )


def test_overlap_divergence_refuses_a_bucket_that_one_side_alone_has():
    pair = Pair(F32)
    pair.ids = [torch.arange(41)] * 2
    with pytest.raises(ValueError, match="every token of the student is shared"):
        pair.call(opk.fused_linear_overlap_divergence, pair.tensors)
