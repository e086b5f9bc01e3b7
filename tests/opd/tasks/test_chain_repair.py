# SPDX-License-Identifier: Apache-2.0
"""The task's rules and rows, its gauges on hand-made models, and the shipped teacher's accuracy."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd.tasks import TASKS, ChainRepair, train_chain_repair_teacher
from opd.tasks import chain_repair_gauges as gauges
from opd.tasks.chain_repair import MAPS, MAX_REPAIRS, PROMPT_LENGTH, REPAIR, VALUES, VOCABULARY

# map_seed 0 sends v0 here under m0..m7; a new draw of the maps would orphan the teacher
MAPS_OF_V0 = ["v15", "v15", "v9", "v13", "v2", "v6", "v13", "v5"]
TEACHER = Path(gauges.__file__).parent / "chain_repair_teacher"
TOKEN_ID = {token: i for i, token in enumerate(VOCABULARY)}


@pytest.fixture(scope="module")
def task() -> ChainRepair:
    return ChainRepair()


@pytest.fixture(scope="module")
def tokenizer(task):
    return task.load_tokenizer()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    # these models are so small that a second thread only costs time
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


class RuleFollower:
    """Puts `certainty` on the right next token and spreads the rest evenly over the other 44.

    Its cache is simply all ids so far. `lapse(tokens)` names what to say instead of the right one.
    """

    def __init__(self, task: ChainRepair, certainty: float, lapse=lambda tokens: None) -> None:
        self.task, self.certainty, self.lapse = task, certainty, lapse

    def __call__(self, input_ids, past_key_values=None, use_cache=False):
        seen = 0 if past_key_values is None else past_key_values.shape[1]
        ids = input_ids if seen == 0 else torch.cat([past_key_values, input_ids], dim=1)
        rest = (1 - self.certainty) / (len(VOCABULARY) - 1)
        law = torch.full((*ids.shape, len(VOCABULARY)), rest, dtype=torch.float64)
        for row, row_ids in enumerate(ids.tolist()):
            tokens = [VOCABULARY[i] for i in row_ids]
            right = self.task.right_tokens(tokens)
            for i, token in enumerate(right):
                said = self.lapse(tokens[: PROMPT_LENGTH + i]) or token
                place = law[row, PROMPT_LENGTH - 1 + i]
                if said is None:
                    place.fill_(1 / len(VOCABULARY))
                else:
                    place[TOKEN_ID[said]] = self.certainty
        return SimpleNamespace(logits=law.log()[:, seen:], past_key_values=ids)


def chain(task: ChainRepair, map_name: str, value: str, num_steps: int) -> list[str]:
    values = []
    for _ in range(num_steps):
        value = task.step(map_name, value)
        values.append(value)
    return values


def other_than(*values: str) -> str:
    return next(value for value in VALUES if value not in values)


def test_registry_builds_the_task_by_name():
    assert TASKS["chain_repair"](max_length_n=4) == ChainRepair(max_length_n=4, map_seed=0)


def test_task_is_frozen(task):
    with pytest.raises(FrozenInstanceError):
        task.map_seed = 1


@pytest.mark.parametrize("max_length_n", [0, 17])
def test_task_rejects_a_length_it_has_no_countdown_for(max_length_n):
    with pytest.raises(ValueError, match=rf"max_length_n must be in 1\.\.16, got {max_length_n}"):
        ChainRepair(max_length_n=max_length_n)


def test_every_map_is_a_permutation_and_no_two_are_equal(task):
    tables = [tuple(task.step(map_name, value) for value in VALUES) for map_name in MAPS]
    assert all(sorted(table) == sorted(VALUES) for table in tables)
    assert len(set(tables)) == len(MAPS)


def test_hidden_maps_are_those_the_shipped_teacher_learned(task):
    assert [task.step(map_name, "v0") for map_name in MAPS] == MAPS_OF_V0
    assert ChainRepair(map_seed=1).step("m0", "v0") != MAPS_OF_V0[0]


def test_tokenizer_gives_one_id_per_word_and_reads_it_back(task, tokenizer):
    assert len(tokenizer) == len(VOCABULARY) == 45
    for row in task.expert_rows(20, seed=3):
        text = f"{row['prompt']} {row['completion']}"
        ids = tokenizer(text).input_ids
        assert ids == [TOKEN_ID[word] for word in text.split()]
        assert tokenizer.decode(ids) == text


def test_tokenizer_ends_at_e_pads_left_and_adds_nothing(tokenizer):
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("PAD", "E")
    assert tokenizer.bos_token_id is None
    batch = tokenizer(["S m0 v0 1", "S m0 v0 1 v3 0 E"], padding=True)
    assert batch.input_ids[0][:3] == [tokenizer.pad_token_id] * 3
    assert batch.attention_mask[0] == [0, 0, 0, 1, 1, 1, 1]


def test_tokenizer_refuses_a_word_it_does_not_know(tokenizer):
    with pytest.raises(Exception, match="UNK"):
        tokenizer("S m0 v99 1")


def test_rows_repeat_under_one_seed_and_differ_under_another(task):
    assert task.rows(50, seed=7) == task.rows(50, seed=7)
    assert task.rows(50, seed=7) != task.rows(50, seed=8)
    assert task.expert_rows(50, seed=7) == task.expert_rows(50, seed=7)


def test_rows_go_through_the_lengths_in_turn(task):
    rows = task.rows(6, seed=0, lengths=[2, 16, 5])
    assert [row["prompt"].split()[-1] for row in rows] == ["2", "16", "5"] * 2
    lengths = {
        int(row["prompt"].split()[-1]) for row in ChainRepair(max_length_n=3).rows(9, seed=0)
    }
    assert lengths == {1, 2, 3}


@pytest.mark.parametrize("lengths", [[], [0], [4, 17]])
def test_rows_reject_lengths_outside_the_countdown(task, lengths):
    with pytest.raises(ValueError, match=r"lengths must be numbers in 1\.\.16, at least one, got"):
        task.rows(1, seed=0, lengths=lengths)


def test_every_row_is_all_prompts_once(task):
    prompts = [row["prompt"] for row in task.every_row()]
    assert len(prompts) == len(set(prompts)) == 16 * len(MAPS) * len(VALUES)


def test_row_answers_are_the_map_applied_n_times(task):
    for row in task.rows(40, seed=1):
        _, map_name, value, num_steps = row["prompt"].split()
        assert row["answer"] == chain(task, map_name, value, int(num_steps))[-1]


def test_expert_rows_are_right_and_masked_exactly_on_injected_values(task):
    rows = task.expert_rows(200, seed=5)
    for row in rows:
        tokens = row["completion"].split()
        right = task.right_tokens(f"{row['prompt']} {row['completion']}".split())
        assert task.verify(row["prompt"], row["completion"])
        assert len(row["completion_mask"]) == len(tokens) <= task.max_completion_length
        is_right = [int(token == expected) for token, expected in zip(tokens, right, strict=False)]
        assert is_right == row["completion_mask"]
        assert row["completion_mask"].count(0) == tokens.count(REPAIR) <= MAX_REPAIRS


def test_expert_rows_inject_at_the_rate_asked_for(task):
    rows = task.expert_rows(2000, seed=5, lengths=[4])
    num_wrong = sum(row["completion_mask"].count(0) for row in rows)
    # each of the 4 * 2000 steps gets a geometric number of wrong values, mean .15 / .85
    assert num_wrong / 8000 == pytest.approx(0.15 / 0.85, abs=0.015)
    assert all(
        0 not in row["completion_mask"] for row in task.expert_rows(50, seed=5, error_rate=0)
    )


def test_expert_rows_reject_an_error_rate_of_one(task):
    with pytest.raises(ValueError, match=r"error_rate must be in \[0, 1\), got 1.0"):
        task.expert_rows(1, seed=0, error_rate=1.0)


def test_verify_accepts_a_clean_a_repaired_and_a_twice_repaired_trace(task):
    first, second = chain(task, "m3", "v7", 2)
    wrong = other_than(first, second)
    prompt = "S m3 v7 2"
    assert task.verify(prompt, f"{first} 1 {second} 0 E")
    assert task.verify(prompt, f"{first} 1 {wrong} R {second} 0 E")
    assert task.verify(prompt, f"{wrong} R {wrong} R {first} 1 {second} 0 E PAD PAD")


def test_verify_rejects_wrong_unfinished_and_empty_answers(task):
    first, second = chain(task, "m3", "v7", 2)
    wrong = other_than(first, second)
    prompt = "S m3 v7 2"
    assert not task.verify(prompt, f"{first} 1 {wrong} 0 E")
    assert not task.verify(prompt, f"{first} 1 {second} 0")
    assert not task.verify(prompt, f"{first} 1 {wrong} 0 E {second}")
    assert not task.verify(prompt, "E")
    assert not task.verify(prompt, "")


@pytest.mark.parametrize("prompt", ["", "S m3 v7", "S m9 v7 2", "S m3 v7 0", "m3 S v7 2"])
def test_verify_names_a_prompt_that_is_none(task, prompt):
    with pytest.raises(ValueError, match=r"prompt must read 'S <m0\.\.m7> <v0\.\.v15> <1\.\.16>'"):
        task.verify(prompt, "v0 0 E")


def test_right_tokens_of_a_trace_with_a_repair(task):
    first, second = chain(task, "m3", "v7", 2)
    wrong = other_than(first, second)
    tokens = ["S", "m3", "v7", "2", first, "1", wrong, "R", second, "0", "E"]
    assert task.right_tokens(tokens) == [first, "1", second, "R", second, "0", "E", None]


def test_right_tokens_go_on_from_a_wrong_value_that_was_kept(task):
    wrong = other_than(task.step("m3", "v7"))
    tokens = ["S", "m3", "v7", "2", wrong, "1"]
    assert task.right_tokens(tokens)[-1] == task.step("m3", wrong)


def test_right_tokens_fall_silent_where_the_form_breaks(task):
    first = task.step("m3", "v7")
    tokens = ["S", "m3", "v7", "2", first, first, "1", "E"]
    assert task.right_tokens(tokens) == [first, "1", None, None, None]


def test_sample_of_a_certain_model_is_the_clean_chain(task):
    rows = task.rows(8, seed=0, lengths=[1, 3])
    completions = gauges.sample(RuleFollower(task, 1.0), task, rows, batch_size=3)
    clean = [row["completion"] for row in task.expert_rows(8, seed=0, error_rate=0, lengths=[1, 3])]
    assert completions == clean


def test_sample_repeats_under_one_seed_and_leaves_the_global_generator_alone(task):
    rows, model = task.rows(12, seed=0, lengths=[4]), RuleFollower(task, 0.6)
    before = torch.get_rng_state()
    first = gauges.sample(model, task, rows, seed=1)
    assert first == gauges.sample(model, task, rows, seed=1)
    assert first != gauges.sample(model, task, rows, seed=2)
    assert torch.equal(before, torch.get_rng_state())


def test_sample_at_temperature_zero_takes_the_likeliest_token(task):
    rows = task.rows(12, seed=0, lengths=[4])
    completions = gauges.sample(RuleFollower(task, 0.3), task, rows, temperature=0.0)
    assert gauges.accuracy_by_length(task, rows, completions) == {4: 1.0}


def test_sample_cuts_a_model_that_never_ends(task):
    model = RuleFollower(task, 1.0, lapse=lambda tokens: "v0")
    text = gauges.sample(model, task, task.rows(1, seed=0))[0]
    assert text.split() == ["v0"] * task.max_completion_length


def test_sample_rejects_a_negative_temperature(task):
    with pytest.raises(ValueError, match=r"temperature must be >= 0, got -1"):
        gauges.sample(RuleFollower(task, 1.0), task, [], temperature=-1.0)


def test_accuracy_by_length_counts_per_length(task):
    rows = task.rows(4, seed=0, lengths=[1, 2])
    right = gauges.sample(RuleFollower(task, 1.0), task, rows)
    assert gauges.accuracy_by_length(task, rows, [right[0], right[1], "E", right[3]]) == {
        1: 0.5,
        2: 1.0,
    }


def test_log_accuracy_slope_of_a_constant_slip(task):
    assert gauges.log_accuracy_slope({n: 0.99**n for n in range(1, 17)}) == pytest.approx(
        math.log(0.99)
    )
    assert math.isnan(gauges.log_accuracy_slope({1: 0.5, 2: 0.0}))


def test_repairs_per_sequence_counts_r():
    assert gauges.repairs_per_sequence(["v0 R v1 0 E", "v1 0 E"]) == 0.5


def test_repair_rate_of_a_rule_follower_is_its_certainty_squared(task):
    rate = gauges.repair_rate(RuleFollower(task, 0.8), task, num_rows=40, seed=1)
    assert rate == pytest.approx(0.64, abs=1e-5)


def test_repair_rate_of_a_model_that_overlooks_wrong_values_is_near_zero(task):
    def overlook(tokens):
        return "3" if task.right_tokens(tokens)[-1] == REPAIR else None

    model = RuleFollower(task, 0.8, lapse=overlook)
    expected = 0.8 * 0.2 / 44
    assert gauges.repair_rate(model, task, num_rows=40) == pytest.approx(expected, abs=1e-5)


def test_slip_rate_is_one_minus_the_certainty_on_any_states(task):
    rows = task.rows(16, seed=0, lengths=[1, 3])
    model = RuleFollower(task, 0.9)
    completions = gauges.sample(RuleFollower(task, 0.5), task, rows)
    assert gauges.slip_rate(model, task, rows, completions) == pytest.approx(0.1, abs=1e-5)


def test_slip_rate_sees_the_states_it_is_given(task):
    def overlook(tokens):
        return "3" if task.right_tokens(tokens)[-1] == REPAIR else None

    model = RuleFollower(task, 1.0, lapse=overlook)
    rows = task.expert_rows(8, seed=0, error_rate=0.5, lengths=[4])
    num_states = sum(len(row["completion_mask"]) for row in rows)
    num_wrong = sum(row["completion_mask"].count(0) for row in rows)
    texts = [row["completion"] for row in rows]
    assert gauges.slip_rate(model, task, rows, texts) == pytest.approx(num_wrong / num_states)
    clean = [row["completion"] for row in task.expert_rows(8, seed=0, error_rate=0, lengths=[4])]
    assert gauges.slip_rate(model, task, rows, clean) == 0.0


def test_kl_on_states_matches_the_closed_form_in_both_directions(task):
    rows = task.rows(6, seed=0, lengths=[2])
    texts = gauges.sample(RuleFollower(task, 1.0), task, rows)
    student, teacher = RuleFollower(task, 0.6), RuleFollower(task, 0.9)
    kl = gauges.kl_on_states(student, teacher, rows, texts)
    forward = 0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4)
    reverse = 0.6 * math.log(0.6 / 0.9) + 0.4 * math.log(0.4 / 0.1)
    assert kl["forward_kl"] == pytest.approx(forward, rel=1e-9)
    assert kl["reverse_kl"] == pytest.approx(reverse, rel=1e-9)


def test_measure_of_the_teacher_against_itself_shows_no_shift():
    task = ChainRepair(max_length_n=2)
    model = RuleFollower(task, 0.9)
    measured = gauges.measure(model, model, task, num_samples=1, num_samples_longest=1)
    assert set(measured["accuracy"]) == set(measured["greedy_accuracy"]) == {1, 2}
    assert measured["greedy_accuracy"] == {1: 1.0, 2: 1.0}
    assert 0.5 < measured["accuracy"][2] < measured["accuracy"][1] < 1.0
    assert measured["student_states/reverse_kl"] == measured["teacher_states/forward_kl"] == 0.0
    assert measured["dagger_ratio"] == 1.0


@pytest.fixture(scope="module")
def teacher():
    return AutoModelForCausalLM.from_pretrained(TEACHER, use_safetensors=True).eval()


def test_teacher_is_small_and_speaks_the_task_s_tokens(teacher, tokenizer):
    assert sum(path.stat().st_size for path in TEACHER.iterdir()) < 2 * 2**20
    assert sum(parameter.numel() for parameter in teacher.parameters()) == 104_896
    assert AutoTokenizer.from_pretrained(TEACHER).get_vocab() == tokenizer.get_vocab()


def test_teacher_is_right_on_every_prompt_when_greedy(task, teacher):
    prompts = task.every_row()
    completions = gauges.sample(teacher, task, prompts, temperature=0.0, batch_size=512)
    accuracy = gauges.accuracy_by_length(task, prompts, completions)
    assert accuracy == dict.fromkeys(range(1, 17), 1.0)


def test_teacher_slips_now_and_then_when_it_samples_long_chains(task, teacher):
    rows = task.every_row(lengths=[16]) * 8
    completions = gauges.sample(teacher, task, rows, seed=0)
    # .949 on 2,048 samples when it was trained; four standard errors of 1,024 samples are .028
    assert gauges.accuracy_by_length(task, rows, completions)[16] == pytest.approx(0.949, abs=0.028)


def test_teacher_repairs_what_its_own_text_seldom_shows(task, teacher):
    assert gauges.repair_rate(teacher, task, num_rows=512) == pytest.approx(0.949, abs=0.02)
    rows = task.rows(512, seed=2)
    assert gauges.repairs_per_sequence(gauges.sample(teacher, task, rows)) < 0.2


def test_teacher_training_is_deterministic_and_learns():
    task = ChainRepair(max_length_n=2)
    ids, targets = train_chain_repair_teacher._batch(task.expert_rows(64, seed=9))
    models = [train_chain_repair_teacher.train_teacher(task, num_steps=30) for _ in range(2)]
    assert all(map(torch.equal, *(list(model.parameters()) for model in models)))
    with torch.no_grad():
        logits = models[0](input_ids=ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())
    # a uniform guess costs log 45 nats
    assert float(loss) < math.log(len(VOCABULARY)) - 0.5


def test_teacher_training_skips_prompts_padding_and_injected_values(task):
    rows = task.expert_rows(32, seed=4, error_rate=0.4, lengths=[1, 6])
    ids, targets = train_chain_repair_teacher._batch(rows)
    assert ids.shape == targets.shape
    for row, row_ids, row_targets in zip(rows, ids, targets, strict=True):
        taught = [0] * PROMPT_LENGTH + row["completion_mask"]
        taught += [0] * (len(row_ids) - len(taught))
        assert (row_targets != -100).int().tolist() == taught
        assert torch.equal(row_targets[row_targets != -100], row_ids[row_targets != -100])
