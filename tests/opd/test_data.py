# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest
import torch

from opd.data import DataConfig, PromptStream, TaskConfig, read_rows, tokenize_rows, training_rows
from opd.schema import ConfigError

CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}S {{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{% endif %}"
)


def _file(tmp_path, *lines):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "rows.jsonl:1: is not JSON"),
        ("[1]", "rows.jsonl:1: must have 'prompt' or 'messages', got list"),
        ('{"text": "a"}', "rows.jsonl:1: must have 'prompt' or 'messages', got 'text'"),
        ("", "has no rows"),
    ],
)
def test_a_bad_row_is_one_sentence_with_its_line(tmp_path, line, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_rows(_file(tmp_path, line), "data.train_file")


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    _file(tmp_path, '{"prompt": "a"}')
    with pytest.raises(ConfigError, match=r"data.train_file: no such file .* did you mean .*rows"):
        read_rows(str(tmp_path / "row.jsonl"), "data.train_file")


def test_the_file_is_read_in_place_of_the_task(tmp_path):
    path = _file(tmp_path, json.dumps({"prompt": "S m0 v0 1"}))
    task = TaskConfig(kind="chain_repair", num_rows=3)
    assert len(training_rows(task, DataConfig(train_file=path), with_completions=False)) == 1
    assert len(training_rows(task, DataConfig(), with_completions=False)) == 3


def test_task_rows_have_completions_when_they_are_needed():
    task = TaskConfig(kind="chain_repair", num_rows=3)
    rows = training_rows(task, DataConfig(), with_completions=True)
    assert all("completion" in row for row in rows)


def test_an_end_token_is_added_once(tokenizer):
    rows = [{"prompt": "S m0 v0 1", "completion": text} for text in ("v1 0", "v1 0 E")]
    prompts = tokenize_rows(rows, tokenizer, add_special_tokens=False)
    assert torch.equal(prompts[0].completion_ids, prompts[1].completion_ids)
    assert prompts[0].completion_ids[-1] == tokenizer.eos_token_id
    assert prompts[0].completion_mask.all()


def test_completion_mask_covers_the_end_token_or_is_extended_to_it(tokenizer):
    row = {"prompt": "S m0 v0 1", "completion": "v1 0", "completion_mask": [0, 1]}
    prompt = tokenize_rows([row], tokenizer, add_special_tokens=False)[0]
    assert prompt.completion_mask.tolist() == [False, True, True]
    with pytest.raises(ConfigError, match="row 1: completion_mask must have 3 items"):
        tokenize_rows([{**row, "completion_mask": [1]}], tokenizer, add_special_tokens=False)


def test_messages_go_through_the_chat_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    messages = [
        {"role": "user", "content": "m0 v0 1"},
        {"role": "assistant", "content": "v1 0"},
    ]
    prompt = tokenize_rows([{"messages": messages}], tokenizer, add_special_tokens=True)[0]
    assert tokenizer.decode(prompt.ids) == "S m0 v0 1"
    assert tokenizer.decode(prompt.completion_ids) == "v1 0 E"


def test_trls_chat_prompt_and_completion(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    row = {
        "prompt": [{"role": "user", "content": "m0 v0 1"}],
        "completion": [{"role": "assistant", "content": "v1 0"}],
    }
    prompt = tokenize_rows([row], tokenizer, add_special_tokens=True)[0]
    assert tokenizer.decode(prompt.ids) == "S m0 v0 1"
    assert tokenizer.decode(prompt.completion_ids) == "v1 0 E"


@pytest.mark.parametrize("row", [{"prompt": 3}, {"prompt": "S", "completion": [{"role": "x"}]}])
def test_a_row_of_the_wrong_type_is_one_sentence(tokenizer, row):
    with pytest.raises(ConfigError, match=r"row 1: its .* must be text"):
        tokenize_rows([row], tokenizer, add_special_tokens=False)


def test_lengths_that_the_task_does_not_have_are_one_sentence():
    task = TaskConfig(kind="chain_repair", lengths=[99])
    with pytest.raises(ConfigError, match=r"task.lengths: .*99"):
        training_rows(task, DataConfig(), with_completions=False)


def test_messages_without_a_template_are_an_error(tokenizer):
    with pytest.raises(ConfigError, match="row 1: is a chat, but"):
        tokenize_rows([{"messages": []}], tokenizer, add_special_tokens=False)


def test_an_empty_prompt_is_an_error(tokenizer):
    with pytest.raises(ConfigError, match="row 1: its prompt has no tokens"):
        tokenize_rows([{"prompt": ""}], tokenizer, add_special_tokens=False)


def test_long_prompts_are_left_out_and_all_of_them_is_an_error(tokenizer):
    rows = [{"prompt": "S m0 v0 1"}, {"prompt": "S m0"}]
    kept = tokenize_rows(rows, tokenizer, add_special_tokens=False, max_prompt_length=3)
    assert [prompt.group_id for prompt in kept] == [1]
    with pytest.raises(ConfigError, match="leaves none of 2 rows"):
        tokenize_rows(rows, tokenizer, add_special_tokens=False, max_prompt_length=1)


def _stream(shuffle=True, seed=0):
    return PromptStream(list(range(5)), seed=seed, shuffle=shuffle)


def test_an_epoch_has_every_prompt_once_across_steps():
    stream = _stream()
    taken = [prompt for step in range(5) for prompt in stream.take(step, 3)]
    for start in (0, 5, 10):
        assert sorted(taken[start : start + 5]) == [0, 1, 2, 3, 4]
    assert taken[:5] != taken[5:10]


def test_a_step_can_be_taken_without_those_before():
    stream = _stream()
    in_order = [stream.take(step, 3) for step in range(6)]
    assert _stream().take(5, 3) == in_order[5]
    assert stream.take(1, 3) == in_order[1]


def test_without_shuffling_the_order_is_that_of_the_file():
    assert _stream(shuffle=False).take(0, 7) == [0, 1, 2, 3, 4, 0, 1]


def test_a_line_ends_at_a_newline_only(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a\u2028b\x85c"}, {"prompt": "d"}]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(text.encode("utf-8"))
    assert read_rows(str(path), "data.train_file") == rows


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"data.train_file: cannot read '.*rows.jsonl' as UTF-8"):
        read_rows(str(path), "data.train_file")
