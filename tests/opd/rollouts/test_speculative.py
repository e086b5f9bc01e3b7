# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise, product

import pytest
import torch
from pydantic import ValidationError

from opd.batch import WRITERS, Prompt
from opd.config import load_config, parse_config
from opd.rollouts import Sampling, SpeculativeConfig, sample
from opd.rollouts.writing import STUDENT, TEACHER
from opd.schema import ConfigError
from tests.chi_squared import chi_squared_p

MODES = ("rejection", "block", "topk", "threshold", "greedy")


def _collect(pair, tokenizer, prompts, *, step=0, seed=0, **settings):
    config = SpeculativeConfig(**{"max_completion_length": 20, **settings})
    engine = config.build(*pair, tokenizer, seed=seed)
    return engine.collect(prompts, step), engine.metrics()


def _writers(trajectory):
    return trajectory.token_origin[trajectory.prompt_length :].tolist()


@pytest.mark.parametrize(
    ("family", "num_draft"),
    [
        ("llama", 1),
        ("llama", 4),
        ("qwen2", 3),
        ("qwen3", 8),
        ("gpt2", 5),
        ("mistral", 4),
        ("gemma2", 2),
    ],
)
def test_greedy_is_the_teachers_own_generation(pair, tokenizer, prompts, family, num_draft):
    student, teacher = pair(family)
    greedy = Sampling(temperature=0, max_completion_length=20)
    expected = sample(teacher, tokenizer, prompts, greedy)
    got, metrics = _collect(
        (student, teacher), tokenizer, prompts, mode="greedy", num_draft=num_draft
    )
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours.ids, theirs.ids)
        assert ours.is_terminated == theirs.is_terminated
        assert ours.behaviour_logprobs is None
    # or the rows would not have accepted different numbers
    assert 0.1 < metrics["speculative/acceptance_rate"] <= 1


def test_greedy_with_the_shipped_teacher(pair, tokenizer):
    from opd.data import tokenize_rows
    from opd.model import LanguageModel, ModelSource, load_model
    from opd.tasks import TASKS
    from opd.teachers import LocalTeacher

    source = ModelSource(model_name_or_path="builtin:chain_repair_teacher")
    student, teacher = (
        load_model(source, tokenizer, name=name, seed=0, device="cpu") for name in WRITERS[1:]
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.15 * parameter.std() * torch.randn_like(parameter))
    teacher = LocalTeacher(teacher, name="teacher")
    rows = TASKS["chain_repair"]().rows(12, seed=1, lengths=[1, 4, 9])
    prompts = tokenize_rows(rows, tokenizer, add_special_tokens=False)
    # longer ones for some: they have a part of the answer already
    first = sample(teacher, tokenizer, prompts[::2], Sampling(temperature=0))
    prompts[::2] = [Prompt(ids=t.ids[: t.prompt_length + 2]) for t in first]
    limit = {"max_completion_length": 30}
    expected = sample(teacher, tokenizer, prompts, Sampling(temperature=0, **limit))
    got, metrics = _collect(
        (LanguageModel(student), teacher), tokenizer, prompts, mode="greedy", **limit
    )
    assert [t.ids.tolist() for t in got] == [t.ids.tolist() for t in expected]
    assert len({t.completion_length for t in got}) > 2
    assert len({len(prompt.ids) for prompt in prompts}) > 1
    assert 0.3 < metrics["speculative/acceptance_rate"] < 1


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "rejection", "temperature": 0.7, "top_p": 0.8},
        {"mode": "block", "top_k": 9},
        {"mode": "topk", "num_topk": 45},
        {"mode": "threshold", "threshold": math.inf},
        {"mode": "greedy"},
    ],
    ids=lambda settings: settings["mode"],
)
def test_of_equal_models_every_draft_is_accepted(pair, tokenizer, prompts, settings):
    equal = pair(distance=0.0)
    trajectories, metrics = _collect(equal, tokenizer, prompts, num_generations=4, **settings)
    assert metrics["speculative/acceptance_rate"] == 1
    if settings["mode"] in ("topk", "threshold"):
        # no token after a whole draft, so the student wrote it all
        assert metrics["speculative/teacher_token_share"] == 0
    else:
        assert {STUDENT, TEACHER} == {w for t in trajectories for w in _writers(t)}


def _completion_law(logprobs_of, model, prompt, size, length, end=3):
    """Every completion of up to `length` tokens with its probability, by enumeration."""
    tails = list(product(range(size), repeat=length))
    sequences = torch.tensor([[*prompt.tolist(), *tail] for tail in tails])
    with torch.no_grad():
        logprobs = logprobs_of(model.model(input_ids=sequences).logits.double())
    chosen = logprobs[:, len(prompt) - 1 : -1].gather(2, sequences[:, len(prompt) :, None])
    law = {}
    for tail, own in zip(tails, chosen[..., 0].tolist(), strict=True):
        stop = tail.index(end) + 1 if end in tail else length
        law[tail[:stop]] = math.exp(sum(own[:stop]))
    return {tail: chance for tail, chance in law.items() if chance > 0}


@pytest.mark.parametrize(
    "laws",
    [
        ({}, {}),
        (
            {"temperature": 1.3, "top_k": 4, "top_p": 0.95},
            {"temperature": 0.8, "top_k": 3, "top_p": 0.9},
        ),
    ],
    ids=["whole", "cut"],
)
@pytest.mark.parametrize("mode", ["rejection", "block"])
def test_completions_follow_the_teachers_law(pair, tokenizer, cut_law, mode, laws):
    size, length = 5, 3
    student, teacher = pair(vocab_size=size, distance=0.3)
    ours, theirs = laws
    prompts = [
        Prompt(ids=torch.tensor(ids), group_id=number)
        for number, ids in enumerate(([4, 1], [2, 0, 4, 4, 1]))
    ]
    trajectories, metrics = _collect(
        (student, teacher),
        tokenizer,
        prompts,
        mode=mode,
        num_draft=2,
        max_completion_length=length,
        num_generations=2500,
        **ours,
        **{f"teacher_{key}": value for key, value in theirs.items()},
    )
    assert 0.3 < metrics["speculative/acceptance_rate"] < 0.95
    for prompt in prompts:
        law = _completion_law(
            lambda logits: cut_law(logits, **theirs), teacher, prompt.ids, size, length
        )
        assert sum(law.values()) == pytest.approx(1)
        assert len(law) > 8
        own = [t for t in trajectories if t.group_id == prompt.group_id]
        counts = Counter(tuple(t.completion_ids.tolist()) for t in own)
        assert chi_squared_p(counts, law) > 1e-3
        # which is no accident: neither the drafts alone nor the whole law would have it
        others = [_completion_law(lambda z: z.log_softmax(-1), student, prompt.ids, size, length)]
        if theirs:
            others.append(
                _completion_law(lambda z: z.log_softmax(-1), teacher, prompt.ids, size, length)
            )
        for other in others:
            assert chi_squared_p(counts, other) < 1e-9
        for t in own:
            logprob = math.log(law[tuple(t.completion_ids.tolist())])
            assert float(t.behaviour_logprobs.sum()) == pytest.approx(logprob, abs=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "rejection", "temperature": 0.8, "top_p": 0.9},
        {"mode": "block", "teacher_temperature": 0.6, "teacher_top_k": 12},
        {"mode": "topk", "num_topk": 3, "top_k": 20, "teacher_top_p": 0.7},
        {"mode": "threshold", "threshold": 1.5, "window": 2, "temperature": 0.7},
    ],
    ids=lambda settings: settings["mode"],
)
def test_both_models_logprobs_are_those_of_the_laws_drawn_from(
    pair, tokenizer, prompts, law_of, settings
):
    student, teacher = pair()
    trajectories, _ = _collect(
        (student, teacher),
        tokenizer,
        prompts,
        num_generations=3,
        student_logprobs=True,
        **settings,
    )
    ours = {
        key: settings.get(key, 0 if key == "top_k" else 1.0)
        for key in ("temperature", "top_k", "top_p")
    }
    theirs = {key: settings.get(f"teacher_{key}", value) for key, value in ours.items()}
    assert {w for t in trajectories for w in _writers(t)} == {STUDENT, TEACHER}
    for t in trajectories:
        place = slice(t.prompt_length, None)
        found = {}
        for name, model, law in (("student", student, ours), ("teacher", teacher, theirs)):
            expected = law_of(model, t, **law).gather(1, t.completion_ids[:, None])[:, 0].float()
            found[name] = getattr(t, f"{name}_logprobs")
            torch.testing.assert_close(found[name][place], expected, rtol=1e-3, atol=1e-4)
            assert not found[name][: t.prompt_length].any()
        if settings["mode"] == "topk":
            # whether a draft stays depends on it: its law is neither's
            assert t.behaviour_logprobs is None
            continue
        by_teacher = t.token_origin == TEACHER
        drawn = torch.where(by_teacher, found["teacher"], found["student"])
        if settings["mode"] in ("rejection", "block"):
            drawn = found["teacher"]
        assert torch.equal(t.behaviour_logprobs, drawn)
        assert torch.isfinite(t.behaviour_logprobs).all()


@pytest.mark.parametrize("mode", ["rejection", "block", "threshold"])
def test_the_student_reads_no_more_for_logprobs_that_nobody_asked_for(
    pair, tokenizer, prompts, mode
):
    both = pair()
    plain, _ = _collect(both, tokenizer, prompts, mode=mode)
    asked, _ = _collect(both, tokenizer, prompts, mode=mode, student_logprobs=True)
    assert any(
        a.tokens_read["student"] > b.tokens_read["student"]
        for a, b in zip(asked, plain, strict=True)
    )
    for a, b in zip(asked, plain, strict=True):
        assert b.student_logprobs is None
        assert torch.isfinite(a.student_logprobs).all()
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.behaviour_logprobs, b.behaviour_logprobs)
        assert torch.equal(a.teacher_logprobs, b.teacher_logprobs)
        assert a.tokens_read["teacher"] == b.tokens_read["teacher"]
        extra = a.tokens_read["student"] - b.tokens_read["student"]
        assert extra in (0, len(a.ids))


@pytest.mark.parametrize(("num_topk", "writer"), [(45, STUDENT), (0, TEACHER)])
def test_the_ends_of_topk_are_on_policy_and_the_teachers_sampling(
    pair, tokenizer, prompts, num_topk, writer
):
    trajectories, _ = _collect(pair(), tokenizer, prompts, mode="topk", num_topk=num_topk)
    assert {w for t in trajectories for w in _writers(t)} == {writer}


def test_topk_keeps_drafting_behind_the_teachers_token(pair, tokenizer, prompts, law_of):
    student, teacher = pair()
    trajectories, _ = _collect((student, teacher), tokenizer, prompts, mode="topk", num_topk=2)
    behind = 0
    for t in trajectories:
        ranks = law_of(teacher, t).argsort(-1, descending=True).argsort(-1)
        ranks = ranks.gather(1, t.completion_ids[:, None])[:, 0]
        writers = _writers(t)
        assert all(rank < 2 for rank, w in zip(ranks, writers, strict=True) if w == STUDENT)
        behind += sum(a == TEACHER and b == STUDENT for a, b in pairwise(writers))
    assert behind > 0


def test_threshold_switches_once_where_the_divergence_says(pair, tokenizer, prompts, law_of):
    student, teacher = pair()
    threshold, window = 1.5, 2
    trajectories, _ = _collect(
        (student, teacher),
        tokenizer,
        prompts,
        mode="threshold",
        threshold=threshold,
        window=window,
        num_generations=50,
    )
    switches = []
    for t in trajectories:
        p, q = law_of(teacher, t), law_of(student, t)
        divergence = (p.exp() * (p - q)).sum(-1).tolist()
        # nothing is refused before the whole window is known
        is_over = [
            place >= window and own > threshold * sum(divergence[place - window : place]) / window
            for place, own in enumerate(divergence)
        ]
        first = is_over.index(True) if True in is_over else t.completion_length
        writers = _writers(t)
        assert writers == [STUDENT] * first + [TEACHER] * (t.completion_length - first)
        switches.append(first)
    assert set(switches) >= {1, *range(window, 6)}


@pytest.mark.parametrize("window", [1, 3])
def test_threshold_zero_is_the_teachers_behind_the_first_window(pair, tokenizer, prompts, window):
    trajectories, _ = _collect(
        pair(), tokenizer, prompts, mode="threshold", threshold=0, window=window
    )
    for t in trajectories:
        first = min(window, t.completion_length)
        assert _writers(t) == [STUDENT] * first + [TEACHER] * (t.completion_length - first)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_one_writes_what_a_batch_of_many_does(pair, tokenizer, prompts, mode):
    both = pair(dtype=torch.float64)
    whole, parts, again = (
        _collect(both, tokenizer, prompts, mode=mode, max_completion_length=12, step=3, **how)[0]
        for how in ({}, {"generation_batch_size": 1}, {"generation_batch_size": 3})
    )
    for a, b, c in zip(whole, parts, again, strict=True):
        assert a.ids.tolist() == b.ids.tolist() == c.ids.tolist()
        assert _writers(a) == _writers(b) == _writers(c)


def test_what_a_step_draws_depends_on_seed_and_step_alone(pair, tokenizer, prompts):
    both = pair()
    config = SpeculativeConfig(max_completion_length=8)
    engine = config.build(*both, tokenizer, seed=0)
    for step in (0, 1):
        torch.manual_seed(step)
        last = engine.collect(prompts, step)
    before = torch.random.get_rng_state()
    fresh = config.build(*both, tokenizer, seed=0).collect(prompts, 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [t.ids.tolist() for t in fresh] == [t.ids.tolist() for t in last]
    others = [
        config.build(*both, tokenizer, seed=seed).collect(prompts, step)
        for seed, step in ((0, 0), (1, 1))
    ]
    ids = [[t.ids.tolist() for t in some] for some in (fresh, *others)]
    assert ids[0] != ids[1] != ids[2] != ids[0]


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("mode", MODES)
def test_no_completion_is_longer_than_the_limit(pair, tokenizer, prompts, mode, length):
    trajectories, _ = _collect(
        pair(), tokenizer, prompts, mode=mode, max_completion_length=length, num_generations=2
    )
    ends = {tokenizer.eos_token_id}
    assert [t.group_id for t in trajectories] == [0, 0, 1, 1, 2, 2, 3, 3]
    for t in trajectories:
        assert torch.equal(t.ids[: t.prompt_length], prompts[t.group_id].ids)
        ids = t.completion_ids.tolist()
        assert 1 <= len(ids) <= length
        assert t.is_terminated == (ids[-1] in ends)
        assert not ends & set(ids[:-1])
        assert t.is_terminated or len(ids) == length
        assert (t.origin, t.loss_mask.sum()) == ("mixed", len(ids))


def test_an_end_token_of_either_model_ends(pair, tokenizer, prompts):
    student, teacher = pair()
    student.model.generation_config.eos_token_id = [5, 6]
    teacher.model.generation_config.eos_token_id = 7
    trajectories, _ = _collect((student, teacher), tokenizer, prompts, num_generations=8)
    last = {int(t.ids[-1]) for t in trajectories if t.is_terminated}
    assert len(last) > 1
    assert last <= {tokenizer.eos_token_id, 5, 6, 7}
    inner = {i for t in trajectories for i in t.completion_ids[:-1].tolist()}
    assert not inner & {tokenizer.eos_token_id, 5, 6, 7}


def test_metrics_count_what_was_drafted_and_read(pair, tokenizer, prompts):
    trajectories, metrics = _collect(
        pair(), tokenizer, prompts, mode="topk", num_topk=3, num_draft=4
    )
    written = [w for t in trajectories for w in _writers(t)]
    share = written.count(TEACHER) / len(written)
    assert metrics["speculative/teacher_token_share"] == pytest.approx(share)
    assert [t.num_written("teacher") for t in trajectories] == [
        _writers(t).count(TEACHER) for t in trajectories
    ]
    assert 0 < metrics["speculative/acceptance_rate"] < 1
    assert 0 < metrics["speculative/mean_accepted_length"] <= 4
    assert metrics["speculative/draft_tokens_per_s"] > 0
    assert metrics["speculative/verify_tokens_per_s"] > 0
    for t in trajectories:
        # every token once at least, by both
        assert min(t.tokens_read.values()) >= len(t.ids) - 1


@pytest.mark.parametrize(("threshold", "is_alone"), [(0.0, True), (math.inf, False)])
def test_what_the_teacher_writes_alone_has_a_rate_of_its_own(
    pair, tokenizer, prompts, threshold, is_alone
):
    _, metrics = _collect(
        pair(), tokenizer, prompts, mode="threshold", threshold=threshold, window=1
    )
    assert ("speculative/teacher_tokens_per_s" in metrics) == is_alone
    assert metrics.get("speculative/teacher_tokens_per_s", 1.0) > 0


def test_a_row_by_itself_reads_each_token_once_a_round(pair, tokenizer, prompts):
    num_draft, limit = 4, 18
    trajectories, _ = _collect(
        pair(),
        tokenizer,
        prompts,
        mode="topk",
        num_topk=3,
        num_draft=num_draft,
        max_completion_length=limit,
        num_generations=3,
        generation_batch_size=1,
    )
    for t in trajectories:
        # all of the prompt but its last token, which the first round reads
        student = teacher = t.prompt_length - 1
        writers = _writers(t)
        while writers:
            length = min(num_draft, limit - t.completion_length + len(writers))
            student, teacher = student + length, teacher + length + 1
            # drafts up to the teacher's token, if one was refused
            is_refused = TEACHER in writers[:length]
            del writers[: writers.index(TEACHER) + 1 if is_refused else length]
        assert t.tokens_read == {"student": student, "teacher": teacher}


def test_a_teacher_that_takes_over_reads_nothing_again(pair, tokenizer, prompts):
    num_draft, limit = 3, 18
    trajectories, _ = _collect(
        pair(),
        tokenizer,
        prompts,
        mode="threshold",
        threshold=1.2,
        window=2,
        num_draft=num_draft,
        max_completion_length=limit,
        num_generations=2,
        generation_batch_size=1,
    )
    num_alone = 0
    for t in trajectories:
        writers = _writers(t)
        num_ours = writers.count(STUDENT)
        # a round for each num_draft tokens of the student, its last one ends in the teacher's
        num_rounds = num_ours // num_draft + 1 if TEACHER in writers else -(-num_ours // num_draft)
        starts = [num_draft * number for number in range(num_rounds)]
        num_read = t.prompt_length - 1 + sum(min(num_draft, limit - n) + 1 for n in starts)
        behind = max(0, writers.count(TEACHER) - 1)
        num_alone += behind
        assert t.tokens_read["teacher"] == num_read + behind
    assert num_alone > 10


def test_a_broken_model_is_said_so(pair, tokenizer, prompts):
    student, teacher = pair()
    engine = SpeculativeConfig(max_completion_length=4).build(student, teacher, tokenizer, seed=0)
    with torch.no_grad():
        student.lm_head_weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="student or teacher: its logits are not finite"):
        engine.collect(prompts, 0)


def test_no_prompts_give_no_completions(pair, tokenizer):
    assert _collect(pair(), tokenizer, [])[0] == []


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"mode": "rejection", "num_topk": 3},
            "num_topk means nothing in mode 'rejection'; leave it out,.*num_topk=25",
        ),
        ({"mode": "topk", "window": 3}, "window means nothing in mode 'topk'"),
        ({"mode": "greedy", "temperature": 0.5}, "temperature means nothing in mode 'greedy'"),
        ({"mode": "speculate"}, "rejection"),
    ],
)
def test_keys_that_a_mode_does_not_read_are_refused(settings, sentence):
    with pytest.raises(ValidationError, match=sentence):
        SpeculativeConfig(**settings)


def test_a_recipe_goes_over_to_another_mode_as_the_message_says():
    overrides = ["rollouts.mode=rejection"]
    with pytest.raises(ConfigError, match="num_topk=25"):
        load_config("skd", overrides)
    config = load_config("skd", [*overrides, "rollouts.num_topk=25"])
    assert config.rollouts.mode == "rejection"


def test_a_run_needs_a_teacher_at_hand(values):
    values["rollouts"] = {"kind": "speculative"}
    with pytest.raises(ConfigError, match=r"teacher: is required by rollouts.kind 'speculative'"):
        parse_config({**values, "teacher": None, "objective": {"kind": "token_nll"}})
    values["teacher"] = {"kind": "server", "url": "http://127.0.0.1:1", "signal": "hidden"}
    with pytest.raises(ConfigError, match=r"must be 'local' for rollouts.kind 'speculative'"):
        parse_config(values)


@pytest.mark.parametrize("mode", MODES)
def test_policy_gradients_need_a_law_that_is_known(values, mode):
    values["rollouts"] = {"kind": "speculative", "mode": mode}
    values["objective"] = {"kind": "sampled_token"}
    if mode in ("rejection", "block", "threshold"):
        assert parse_config(values).rollouts.tells_behaviour
    else:
        with pytest.raises(ConfigError, match=f"got 'speculative' with mode '{mode}'"):
            parse_config(values)


@pytest.mark.parametrize(
    ("mode", "ours", "theirs", "right", "key"),
    [
        ("rejection", 0.5, 1.0, 1.0, "teacher_temperature 1.0"),
        ("block", 1.0, 0.3, 0.3, "teacher_temperature 0.3"),
        ("rejection", 0.5, None, 0.5, "temperature 0.5"),
        ("threshold", 0.5, 1.0, 0.5, "temperature 0.5"),
    ],
)
def test_policy_gradients_are_at_the_temperature_sampled_at(values, mode, ours, theirs, right, key):
    laws = {"temperature": ours, "teacher_temperature": theirs}
    values["rollouts"] = {"kind": "speculative", "mode": mode, **laws}
    values["objective"] = {"kind": "sampled_token", "temperature": right}
    assert parse_config(values).objective.temperature == right
    values["objective"]["temperature"] = 0.7
    with pytest.raises(ConfigError, match=f"must equal rollouts.{key}, at which") as caught:
        parse_config(values)
    words = "sampled by the student (what the teacher writes after a switch is sampled at 1.0, and"
    assert (words in str(caught.value)) == (mode == "threshold")
