# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from opd.batch import Head, Law, Trajectory, Translation, collate
from opd.objectives import Dskd, FullVocab, Parts
from opd.schema import ConfigError
from tests.memory import peak_bytes

# the same texts in two vocabularies; "q" is the teacher's alone, "ab" the student's
STUDENT_TOKENS = [b"", b"a", b"b", b"ab", b"c", b"bc", b"d", b"e"]
TEACHER_TOKENS = [b"", b"e", b"d", b"q", b"c", b"b", b"a", b"cd", b"de", b"bb"]
STUDENT_TEXTS = ([3, 4, 6, 2, 5, 7], [1], [], [4, 6])
TEACHER_TEXTS = ([6, 5, 7, 5, 5, 4, 1], [6], [], [4, 2])
# (student's, teacher's) id of the same bytes
SHARED = torch.tensor([(1, 6), (2, 5), (4, 4), (6, 2), (7, 1)])
SIZES = {"student": (len(STUDENT_TOKENS), 4), "teacher": (len(TEACHER_TOKENS), 6)}


def _rand(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _batch(texts):
    trajectories = [
        Trajectory(
            ids=torch.tensor([1, *text]),
            prompt_length=1,
            loss_mask=torch.tensor([False] + [True] * len(text)),
        )
        for text in texts
    ]
    return collate(trajectories, pad_id=0)


def _ends(ids, tokens):
    ends, total = [], 0
    for i in ids:
        total += len(tokens[i])
        ends.append(total)
    return ends


def _translated(student_texts, teacher_texts, tokens, their_tokens):
    """The finest cuts that both have, by the ends of their tokens."""
    batch, other = _batch(student_texts), _batch(teacher_texts)
    ours, theirs, chunk_ends = [0], [0], []
    for text, their_text in zip(student_texts, teacher_texts, strict=True):
        ends, their_ends = _ends(text, tokens), _ends(their_text, their_tokens)
        begin, their_begin = ours[-1], theirs[-1]
        for end in sorted({*ends} & {*their_ends}):
            ours.append(begin + ends.index(end) + 1)
            theirs.append(their_begin + their_ends.index(end) + 1)
        chunk_ends.append(len(ours) - 1)
    num_chunks = len(ours) - 1
    translation = Translation(
        batch=other,
        student_offsets=torch.tensor(ours),
        teacher_offsets=torch.tensor(theirs),
        is_aligned=torch.ones(num_chunks, dtype=torch.bool),
        num_bytes=torch.ones(num_chunks, dtype=torch.int64),
        chunk_ends=torch.tensor(chunk_ends),
        num_step_chunks=max(1, num_chunks),
    )
    return replace(batch, translation=translation)


def _side(name, num_rows, seed, *, dtype=torch.float64, size=None):
    """A model of a head, embeddings and hidden states."""
    vocab, width = size or SIZES[name]
    head = Head(_rand(vocab, width, seed=seed).to(dtype).requires_grad_(name == "student"))
    table = nn.Embedding.from_pretrained(_rand(vocab, width, seed=seed + 1).to(dtype))
    hidden = _rand(num_rows, width, seed=seed + 2).to(dtype).requires_grad_(name == "student")
    return SimpleNamespace(
        head=head,
        vocab_size=None,
        workspace_bytes=1 << 20,
        model=SimpleNamespace(get_input_embeddings=lambda: table),
        table=table,
        hidden=hidden,
        law=Law(lambda: hidden, head, workspace_bytes=1 << 20),
    )


def _crossing(objective, *, texts=STUDENT_TEXTS, their_texts=TEACHER_TEXTS, sizes=(None, None)):
    batch = _translated(texts, their_texts, STUDENT_TOKENS, TEACHER_TOKENS)
    student = _side("student", batch.num_tokens, 1)
    teacher = _side("teacher", batch.translation.batch.num_tokens, 11)
    for side, size in zip((student, teacher), sizes, strict=True):
        side.vocab_size = side.law.vocab_size = size
    parts = Parts(
        student=student,
        teacher=teacher,
        student_bytes=STUDENT_TOKENS,
        teacher_bytes=TEACHER_TOKENS,
    )
    return student, teacher, batch, _float64(objective.bind(parts))


def _same(objective, *, texts=STUDENT_TEXTS, size=(8, 4), their_size=(8, 6)):
    batch = _batch(texts)
    student = _side("student", batch.num_tokens, 1, size=size)
    teacher = _side("teacher", batch.num_tokens, 11, size=their_size)
    parts = Parts(student=student, teacher=teacher)
    return student, teacher, batch, _float64(objective.bind(parts))


def _float64(bound):
    bound.module.double()
    return bound


def _gradients(loss, student, bound):
    leaves = [student.hidden, student.head.weight, *bound.module.parameters()]
    return torch.autograd.grad(loss, leaves, allow_unused=True)


def _check(student, teacher, batch, bound, expected, num_tokens=None):
    signal = bound(student.law, teacher.law, batch, num_tokens or max(1, batch.num_tokens))
    torch.testing.assert_close(signal.loss, expected, rtol=1e-9, atol=1e-12)
    found = _gradients(signal.loss, student, bound)
    for ours, theirs in zip(found, _gradients(expected, student, bound), strict=True):
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)
    return signal


def _nll(logits, labels):
    return -logits.log_softmax(1)[torch.arange(len(labels)), labels]


def _forward_kl(teacher_logits, student_logits):
    p, q = teacher_logits.log_softmax(1), student_logits.log_softmax(1)
    return (p.exp() * (p - q)).sum(1)


def _reverse_kl(teacher_logits, student_logits):
    return _forward_kl(student_logits, teacher_logits)


def _textbook(views, rate, num_kd, divergences, *, nll, num_tokens, masked):
    """The docstring, line by line; `views`: own, taught, theirs, shown, labels and both heads."""
    own, taught, theirs, shown, labels, head, their_head = views
    logits = taught @ head.detach().T
    mask = (logits.argmax(1) == labels).double() if masked else torch.ones(len(labels)).double()
    total = _nll(logits, labels).sum()
    total = total + (mask * divergences[0](logits.detach(), own @ head.T)).sum()
    total = total + divergences[1](theirs @ their_head.T, shown @ their_head.T).sum()
    return (1 - rate) / num_tokens * nll.sum() + rate / num_kd * total


@pytest.mark.parametrize("mask", ["auto", "agreed"])
def test_v1_with_one_tokenizer_is_the_textbook(mask):
    objective = Dskd(version="v1", divergence="reverse_kl", kd_rate=0.3, mask=mask)
    student, teacher, batch, bound = _same(objective)
    labels, layers = batch.token_ids, bound.module
    views = (
        student.hidden,
        layers["t2s"](teacher.hidden),
        teacher.hidden,
        layers["s2t"](student.hidden),
        labels,
        student.head.weight,
        teacher.head.weight,
    )
    expected = _textbook(
        views,
        0.3,
        batch.num_tokens,
        (_reverse_kl, _forward_kl),
        nll=_nll(student.hidden @ student.head.weight.T, labels),
        num_tokens=batch.num_tokens,
        masked=mask == "agreed",
    )
    _check(student, teacher, batch, bound, expected)


def test_v2_with_one_tokenizer_is_the_textbook():
    objective = Dskd(version="v2", divergence="reverse_kl")
    student, teacher, batch, bound = _same(objective)
    weight, their_weight = student.head.weight.detach(), teacher.head.weight
    t2s = torch.linalg.pinv(weight) @ their_weight
    torch.testing.assert_close(bound.module["t2s"].weight.detach().float(), t2s.float())
    s2t = torch.linalg.pinv(their_weight) @ weight
    labels = (teacher.hidden @ their_weight.T).argmax(1)
    views = (
        student.hidden,
        bound.module["t2s"](teacher.hidden),
        teacher.hidden,
        student.hidden @ s2t.T,
        labels,
        student.head.weight,
        their_weight,
    )
    expected = _textbook(
        views,
        0.5,
        batch.num_tokens,
        (_reverse_kl, _reverse_kl),
        nll=_nll(student.hidden @ student.head.weight.T, batch.token_ids),
        num_tokens=batch.num_tokens,
        masked=True,
    )
    signal = _check(student, teacher, batch, bound, expected)
    # the head's gradient is of Q alone: none through its pseudo-inverse, none through t2s
    assert 0 < signal.statistics["t2s_agreement"].mean() <= 1


def test_v1_with_two_tokenizers_is_cross_model_attention():
    student, teacher, batch, bound = _crossing(Dskd(version="v1"))
    other, layers = batch.translation.batch, bound.module
    taught, shown = [], []
    bounds, their_bounds = ([0, *b.segment_ends.tolist()] for b in (batch, other))
    for row, (text, their_text) in enumerate(zip(STUDENT_TEXTS, TEACHER_TEXTS, strict=True)):
        if not text:
            continue
        here, there = (
            slice(bounds[row], bounds[row + 1]),
            slice(their_bounds[row], their_bounds[row + 1]),
        )
        pair = torch.cat(
            [student.table(torch.tensor([1, *text][:-1])), student.table(torch.tensor(text))], 1
        )
        target = teacher.table(torch.tensor(their_text))
        keys = torch.cat([teacher.table(torch.tensor([1, *their_text][:-1])), target], 1)
        theirs = teacher.hidden[there]
        scores = layers["query"](pair) @ (keys / keys.std()).T / math.sqrt(2 * 6)
        values = layers["t2s"](theirs / theirs.std() + target / target.std())
        taught.append(scores.softmax(1) @ values)
        shown.append(scores.softmax(0).T @ layers["s2t"](student.hidden[here]))
    views = (
        student.hidden,
        torch.cat(taught),
        teacher.hidden,
        torch.cat(shown),
        batch.token_ids,
        student.head.weight,
        teacher.head.weight,
    )
    expected = _textbook(
        views,
        0.5,
        batch.num_tokens,
        (_forward_kl, _forward_kl),
        nll=_nll(student.hidden @ student.head.weight.T, batch.token_ids),
        num_tokens=batch.num_tokens,
        masked=True,
    )
    _check(student, teacher, batch, bound, expected)


def test_v2_with_two_tokenizers_is_over_chunks_of_one_token_on_each_side():
    student, teacher, batch, bound = _crossing(Dskd(version="v2"))
    # "b" and "e" of "ab c d b bc e" and "a b cd b b c e", and all of "a" and of "c d"
    pairs = [(3, 3), (5, 6), (6, 7), (7, 8), (8, 9)]
    translation = batch.translation
    sizes = translation.student_offsets.diff(), translation.teacher_offsets.diff()
    assert int(((sizes[0] == 1) & (sizes[1] == 1)).sum()) == len(pairs)
    rows, their_rows = torch.tensor(pairs).T
    ids, their_ids = SHARED.T
    weight, their_weight = student.head.weight.detach(), teacher.head.weight
    s2t = torch.linalg.pinv(their_weight[their_ids]) @ weight[ids]
    best = (teacher.hidden[their_rows] @ their_weight.T).argmax(1)
    student_id = {theirs: own for own, theirs in SHARED.tolist()}
    labels = torch.tensor([student_id.get(i, -1) for i in best.tolist()])
    kept = labels >= 0
    assert kept.any() and not kept.all()
    rows, their_rows, labels = rows[kept], their_rows[kept], labels[kept]
    own, theirs = student.hidden[rows], teacher.hidden[their_rows]
    views = (
        own,
        bound.module["t2s"](theirs),
        theirs,
        own @ s2t.T,
        labels,
        student.head.weight,
        their_weight,
    )
    expected = _textbook(
        views,
        0.5,
        translation.num_step_chunks,
        (_forward_kl, _forward_kl),
        nll=_nll(student.hidden @ student.head.weight.T, batch.token_ids),
        num_tokens=batch.num_tokens,
        masked=True,
    )
    _check(student, teacher, batch, bound, expected)


def test_other_tokens_count_nothing_in_v2():
    """What lies in chunks of more tokens, or in none that is aligned, moves no term but the CE."""
    student, teacher, batch, bound = _crossing(Dskd(version="v2", kd_rate=1.0))
    signal = bound(student.law, teacher.law, batch, batch.num_tokens)
    hidden, *_ = torch.autograd.grad(signal.loss, [student.hidden])
    assert not hidden[[0, 1, 2, 4]].any() and hidden[[3, 5, 6, 7, 8]].any()
    translation = replace(
        batch.translation, is_aligned=torch.zeros(batch.translation.num_chunks, dtype=torch.bool)
    )
    nothing = replace(batch, translation=translation)
    loss = bound(student.law, teacher.law, nothing, batch.num_tokens).loss
    assert loss == 0.0
    assert not any(g.any() for g in _gradients(loss, student, bound) if g is not None)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("crosses", [True, False])
@pytest.mark.parametrize(
    "texts",
    [([], []), ([1], []), ([], [6]), ([1], [6])],
    ids=["nothing", "no_teacher_token", "no_student_token", "one_token"],
)
def test_hostile_batches_are_finite(version, crosses, texts):
    objective = Dskd(version=version, kd_rate=1.0)
    if crosses:
        student, teacher, batch, bound = _crossing(
            objective, texts=[texts[0]], their_texts=[texts[1]]
        )
    else:
        student, teacher, batch, bound = _same(objective, texts=[texts[0]])
    signal = bound(student.law, teacher.law, batch, max(1, batch.num_tokens))
    gradients = _gradients(signal.loss, student, bound)
    assert gradients[0] is not None and gradients[1] is not None
    assert all(g.isfinite().all() for g in (signal.loss, *gradients) if g is not None)
    is_taught = texts[0] and (texts[1] or not crosses)
    if not is_taught:
        assert signal.loss == 0.0
        assert not any(g.any() for g in gradients if g is not None)


def test_the_same_head_and_no_projection_is_full_vocab_twice():
    objective = Dskd(version="v1", kd_rate=1.0)
    student, teacher, batch, bound = _same(objective, their_size=(8, 4))
    teacher.head = Head(student.head.weight.detach())
    teacher.law = Law(lambda: teacher.hidden, teacher.head)
    for layer in bound.module.values():
        layer.weight.data = torch.eye(4, dtype=torch.float64)
        layer.bias.data.zero_()
    signal = bound(student.law, teacher.law, batch, batch.num_tokens)
    plain = FullVocab(divergence="forward_kl")(student.law, teacher.law, batch, batch.num_tokens)
    label_nll = _nll(teacher.hidden @ teacher.head.weight.T, batch.token_ids).mean()
    # the token weights of full_vocab are float32
    torch.testing.assert_close(signal.loss, 2 * plain.loss + label_nll, rtol=1e-7, atol=1e-12)
    in_student_space, through_s2t = (
        torch.autograd.grad(out.loss, student.hidden, retain_graph=True)[0]
        for out in (plain, signal)
    )
    torch.testing.assert_close(through_s2t, 2 * in_student_space, rtol=1e-7, atol=1e-10)
    for name in ("t2s_forward_kl", "s2t_forward_kl"):
        assert float(signal.statistics[name].mean()) == pytest.approx(plain.loss.item(), rel=1e-7)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_one_tokenizer_seen_through_a_translation_is_the_same_loss(version):
    """Chunks of one token each, of one vocabulary: what a crossing loop makes of equal tokens."""
    student, teacher, batch, bound = _same(Dskd(version=version))
    plain = bound(student.law, teacher.law, batch, batch.num_tokens).loss
    translated = _translated(STUDENT_TEXTS, STUDENT_TEXTS, STUDENT_TOKENS, STUDENT_TOKENS)
    assert translated.translation.num_chunks == batch.num_tokens
    crossed = bound(student.law, teacher.law, translated, batch.num_tokens).loss
    torch.testing.assert_close(crossed, plain, rtol=1e-12, atol=1e-12)


def test_v2_of_a_teacher_that_is_the_student_is_at_its_own_labels():
    """The pseudo-inverse of a head on itself is the identity, and both divergences are 0."""
    student, _, batch, _ = _same(Dskd())
    twin = SimpleNamespace(**vars(student))
    twin.head = Head(student.head.weight.detach())
    twin.law = Law(lambda: student.hidden.detach(), twin.head)
    bound = _float64(Dskd(kd_rate=1.0).bind(Parts(student=student, teacher=twin)))
    signal = bound(student.law, twin.law, batch, batch.num_tokens)
    logits = student.hidden.detach() @ twin.head.weight.T
    torch.testing.assert_close(
        signal.loss.detach(), _nll(logits, logits.argmax(1)).mean(), rtol=1e-6, atol=1e-6
    )
    for name in ("t2s_forward_kl", "s2t_forward_kl"):
        assert signal.statistics[name].abs().max() < 1e-6
    assert signal.statistics["t2s_agreement"].min() == 1.0


def test_the_map_to_the_teacher_follows_the_students_head():
    student, teacher, batch, bound = _same(Dskd(kd_rate=1.0))
    first = bound(student.law, teacher.law, batch, batch.num_tokens)
    with torch.no_grad():
        student.head.weight.mul_(1.5)
    moved = bound(student.law, teacher.law, batch, batch.num_tokens)
    fresh = _float64(Dskd(kd_rate=1.0).bind(Parts(student=student, teacher=teacher)))
    fresh.module.load_state_dict(bound.module.state_dict())
    again = fresh(student.law, teacher.law, batch, batch.num_tokens)
    assert not torch.equal(first.loss, moved.loss)
    assert torch.equal(moved.loss, again.loss)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_splitting_a_step_does_not_change_its_loss(version):
    student, teacher, batch, bound = _crossing(Dskd(version=version))
    whole = bound(student.law, teacher.law, batch, batch.num_tokens).loss
    total, row, their_row = 0.0, 0, 0
    for text, their_text in zip(STUDENT_TEXTS, TEACHER_TEXTS, strict=True):
        part = _translated([text], [their_text], STUDENT_TOKENS, TEACHER_TOKENS)
        translation = replace(part.translation, num_step_chunks=batch.translation.num_step_chunks)
        own = student.hidden[row : row + len(text)]
        theirs = teacher.hidden[their_row : their_row + len(their_text)]
        total = (
            total
            + bound(
                Law(lambda own=own: own, student.head),
                Law(lambda theirs=theirs: theirs, teacher.head),
                replace(part, translation=translation),
                batch.num_tokens,
            ).loss
        )
        row, their_row = row + len(text), their_row + len(their_text)
    torch.testing.assert_close(total, whole, rtol=1e-9, atol=1e-12)


def test_bfloat16_models_have_float32_projectors():
    objective = Dskd(version="v1")
    batch = _translated(STUDENT_TEXTS, TEACHER_TEXTS, STUDENT_TOKENS, TEACHER_TOKENS)
    student = _side("student", batch.num_tokens, 1, dtype=torch.bfloat16)
    teacher = _side("teacher", batch.translation.batch.num_tokens, 11, dtype=torch.bfloat16)
    tokens = {"student_bytes": STUDENT_TOKENS, "teacher_bytes": TEACHER_TOKENS}
    bound = objective.bind(Parts(student=student, teacher=teacher, **tokens))
    assert {p.dtype for p in bound.module.parameters()} == {torch.float32}
    signal = bound(student.law, teacher.law, batch, batch.num_tokens)
    signal.loss.backward()
    assert student.hidden.grad.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() for p in bound.module.parameters())


def test_tokens_beyond_a_law_are_no_labels_and_in_no_map():
    """With a vocab_size of 6 on both sides the laws have "b" and "c" in common, and no more."""
    student, teacher, batch, bound = _crossing(Dskd(kd_rate=1.0, mask="none"), sizes=(6, 6))
    weight, their_weight = student.head.weight.detach(), teacher.head.weight
    found = bound.module["t2s"].weight.detach()
    expected = torch.linalg.pinv(weight[[2, 4]]) @ their_weight[[5, 4]]
    torch.testing.assert_close(found.float(), expected.float())
    signal = bound(student.law, teacher.law, batch, batch.num_tokens)
    their_rows = [3, 6, 7, 8, 9]
    best = (teacher.hidden[their_rows] @ their_weight[:6].T).argmax(1)
    counts = torch.tensor([int(i) in (4, 5) for i in best])
    assert torch.equal(signal.statistics["t2s_nll"] > 0, counts)
    assert counts.any() and not counts.all()


def test_what_cannot_be_is_said():
    student, teacher, *_ = _crossing(Dskd(version="v1"))
    tokens = {"student_bytes": STUDENT_TOKENS, "teacher_bytes": TEACHER_TOKENS}
    far = SimpleNamespace(head=teacher.head, vocab_size=None)
    strange = {"student_bytes": STUDENT_TOKENS, "teacher_bytes": [b"x"] * len(TEACHER_TOKENS)}
    with pytest.raises(ConfigError, match="must be 'v1' with a teacher that has no token in comm"):
        Dskd(version="v2").bind(Parts(student=student, teacher=teacher, **strange))
    with pytest.raises(ConfigError, match="must be 'v2' with a teacher that is not in this"):
        Dskd(version="v1").bind(Parts(student=student, teacher=far, **tokens))
    table = nn.Embedding(10, 3)
    narrow = SimpleNamespace(
        head=teacher.head, model=SimpleNamespace(get_input_embeddings=lambda: table)
    )
    with pytest.raises(ConfigError, match="embeddings have 3 dimensions and whose hidden states 6"):
        Dskd(version="v1").bind(Parts(student=student, teacher=narrow, **tokens))
    with pytest.raises(ValueError, match="cross_entropy has no teacher"):
        Dskd(divergence="cross_entropy")


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_no_tensor_of_tokens_times_vocabulary_is_formed(version):
    num_tokens, vocab = 256, 4096
    text = [1 + number % 5 for number in range(num_tokens)]
    names = [number.to_bytes(2, "big") for number in range(vocab)]
    batch = _translated([text], [text], names, names)
    sides = [
        _side(name, num_tokens, seed, size=(vocab, 4), dtype=torch.float32)
        for name, seed in (("student", 1), ("teacher", 11))
    ]
    for side in sides:
        side.law.workspace_bytes = side.workspace_bytes = 1 << 18
    tokens = {"student_bytes": names, "teacher_bytes": [*names[::2], *names[::2]]}
    bound = Dskd(version=version).bind(Parts(student=sides[0], teacher=sides[1], **tokens))

    def step():
        bound(sides[0].law, sides[1].law, batch, num_tokens).loss.backward()

    assert peak_bytes(step) < 0.5 * 4 * num_tokens * vocab
