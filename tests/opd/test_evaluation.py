# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest
import torch

from opd.data import DataConfig, TaskConfig
from opd.evaluation import EvaluationConfig, ends_with_answer, evaluate, load_held_out
from opd.schema import ConfigError
from opd.teachers import LocalTeacher

TASK = TaskConfig(kind="chain_repair", lengths=[1])


def _evaluate(student, teacher, tokenizer, **settings):
    config = EvaluationConfig(**{"num_prompts": 6, "lengths": [1, 3], **settings})
    held_out = load_held_out(config, TASK, DataConfig(), tokenizer)
    return evaluate(student, teacher, tokenizer, held_out, config, max_completion_length=8)


def test_the_shipped_teacher_is_nearly_always_right_and_a_random_student_is_not(tokenizer, student):
    from opd.teachers import LocalConfig

    config = LocalConfig(model_name_or_path="builtin:chain_repair_teacher")
    teacher = config.build(tokenizer, device="cpu", vocab_size=None, workspace_bytes=1 << 20)
    found = _evaluate(teacher, teacher, tokenizer, num_prompts=32).metrics
    assert found["eval/accuracy/greedy"] > 0.95
    assert found["eval/student_states/reverse_kl"] == pytest.approx(0.0, abs=1e-6)
    assert found["eval/data_states/forward_kl"] == pytest.approx(0.0, abs=1e-6)
    other = _evaluate(student, teacher, tokenizer, num_prompts=32).metrics
    assert other["eval/accuracy/t1"] < 0.3
    assert other["eval/data_states/reverse_kl"] > 0.5


def test_names(student, teacher, tokenizer):
    found = _evaluate(student, teacher, tokenizer, temperature=[0.7, 0.0]).metrics
    assert {
        "eval/accuracy/t0.7",
        "eval/accuracy/t0.7/n1",
        "eval/accuracy/greedy/n3",
        "eval/completions/clipped_ratio",
        "eval/student_states/entropy",
        "eval/data_states/nll",
    } <= set(found)


def test_twice_is_the_same_and_uses_no_training_randomness(student, teacher, tokenizer):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    student.model.train()
    first = _evaluate(student, teacher, tokenizer)
    assert torch.equal(torch.get_rng_state(), before)
    assert student.model.training
    torch.manual_seed(8)
    assert _evaluate(student, teacher, tokenizer) == first


def test_batch_size_does_not_change_the_comparison(student, teacher, tokenizer):
    found = [
        _evaluate(student, teacher, tokenizer, batch_size=size, temperature=[0.0]).metrics
        for size in (3, 100)
    ]
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-4), name


def test_samples_are_spread_over_the_lengths(student, teacher, tokenizer):
    samples = _evaluate(student, teacher, tokenizer, num_samples=4, temperature=[1.0]).samples
    assert [sample["prompt"].split()[-1] for sample in samples] == ["1", "1", "3", "3"]
    assert set(samples[0]) == {"sampling", "prompt", "completion", "answer", "is_correct"}


def test_without_a_teacher_there_is_no_kl(student, tokenizer):
    found = _evaluate(student, None, tokenizer).metrics
    assert "eval/data_states/nll" in found
    assert not any(name.endswith("_kl") for name in found)


def test_training_and_held_out_rows_differ(tokenizer):
    task = TASK.load()
    config = EvaluationConfig(num_prompts=20, lengths=[16])
    held_out = load_held_out(config, TASK, DataConfig(), tokenizer)
    rows = task.rows(20, seed=TASK.seed, lengths=[16])
    assert [p.row["prompt"] for p in held_out.prompts] != [row["prompt"] for row in rows]


def test_a_file_of_answers_needs_no_task(student, tokenizer, tmp_path):
    path = tmp_path / "eval.jsonl"
    completion = _greedy_text(student, tokenizer)
    rows = [
        {"prompt": "S m0 v0 1", "answer": completion.split()[-1]},
        {"prompt": "S m0 v0 1", "answer": "something else"},
        {"prompt": "S m0 v0 1"},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    config = EvaluationConfig(temperature=[0.0])
    held_out = load_held_out(config, None, DataConfig(eval_file=str(path)), tokenizer)
    found = evaluate(student, None, tokenizer, held_out, config, max_completion_length=6)
    assert found.metrics["eval/accuracy/greedy"] == 0.5
    assert "eval/data_states/nll" not in found.metrics


def _greedy_text(student, tokenizer):
    from opd.data import tokenize_rows
    from opd.rollouts import Sampling, sample

    prompts = tokenize_rows([{"prompt": "S m0 v0 1"}], tokenizer, add_special_tokens=False)
    sampling = Sampling(temperature=0, max_completion_length=6)
    ids = sample(student, tokenizer, prompts, sampling)[0].completion_ids
    return tokenizer.decode(ids.tolist(), skip_special_tokens=True)


def test_without_task_and_file_it_says_what_is_missing(tokenizer):
    with pytest.raises(ConfigError, match=r"data.eval_file: is required by evaluation"):
        load_held_out(EvaluationConfig(), None, DataConfig(), tokenizer)


def test_a_teacher_can_be_evaluated_like_a_student(hf_model, tokenizer):
    twin = LocalTeacher(hf_model(), name="teacher")
    assert _evaluate(twin, None, tokenizer).metrics


@pytest.mark.parametrize(
    ("text", "answer", "verdict"),
    [
        ("The answer is 4.", "4", True),
        ("The answer is 14", "4", False),
        ("The answer is -4", "4", False),
        ("The answer is -4", "-4", True),
        ("The answer is 2.4", "4", False),
        ("Yes.", "Yes.", True),
        ("x=4 ", " 4", True),
        ("It is (a+b)*c", "(a+b)*c", True),
        ("anything", "", None),
        ("anything.", ".", None),
    ],
)
def test_an_answer_is_a_whole_word_at_the_end(text, answer, verdict):
    assert ends_with_answer(text, answer) is verdict
