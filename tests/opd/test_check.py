# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
import yaml

import opd_kernels as opk
from opd.check import STAGES, check
from opd.cli import main
from opd.config import parse_config
from opd.schema import ConfigError
from tests.opd.crossing import byte_level, checked, pieces, save_pair, table


@pytest.fixture
def values(tmp_path):
    return save_pair(tmp_path)


def test_a_pair_that_fits_is_described(values, tmp_path):
    stages = []
    found = check(parse_config(values), on_stage=stages.append)
    assert stages == list(STAGES)
    assert found.wrong == found.doubts == []
    tokenizers = table(found, "tokenizers")
    assert tokenizers["student"]["tokens"] == "300" and tokenizers["teacher"]["tokens"] == "500"
    roles = table(found, "special tokens by role")
    assert roles["bos"] == {"student": "none", "teacher": "<s>"}
    shared = table(found, "shared vocabulary")
    p = opk.project_vocab(opk.TokenBytes(byte_level()), opk.TokenBytes(pieces()))
    assert shared["student"]["of its vocabulary"] == f"{p.student_coverage:.1%}"
    (row,) = table(found, "alignment").values()
    assert row["aligned"] == "100.00%"
    probes = table(found, "probe of zero")
    assert set(probes) == {"the same tokens", "the same tokens, renumbered"}
    assert not (tmp_path / "run").exists()


def test_chats_are_shown_as_both_models_read_them(tmp_path):
    found = checked(save_pair(tmp_path, chats=True))
    first = table(found, "the first prompt")
    assert "<|im_start|>user" in first["student"]["as text"]
    assert first["teacher"]["as text"].startswith("'<s>[user]")
    assert first["student"]["behind a turn"] == r"'<|im_end|>\n'"
    assert found.wrong == []
    (doubt,) = found.doubts
    assert "ends a turn with '<|im_end|>', and completions of the data end with '<|end|>'" in doubt


def test_a_turn_that_generation_does_not_end_at_is_wrong(tmp_path):
    values = save_pair(tmp_path, chats=True)
    path = tmp_path / "student" / "generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "eos_token_id": 0}))
    (sentence,) = checked(values).wrong
    assert "ends a turn with '<|im_end|>'" in sentence and "['<|end|>']" in sentence


def test_a_tokenizer_that_ends_prompts_is_wrong(values, tmp_path):
    from tokenizers import processors

    ending = copy.deepcopy(pieces())
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    ending.save_pretrained(tmp_path / "teacher")
    (sentence,) = checked(values).wrong
    assert sentence.startswith("teacher: its tokenizer puts '</s>' behind every prompt")


def test_a_run_of_one_vocabulary_is_looked_at_too(values):
    found = checked(values, teacher=values["student"], objective={"kind": "full_vocab"})
    assert found.wrong == []
    (row,) = table(found, "probe of zero").values()
    assert row["verdict"] == "as it should be" and abs(float(row["loss, nats"])) < 1e-5
    assert [table.title for table in found.tables].count("alignment") == 0


@pytest.mark.parametrize("kind", ["full_vocab", "alm"])
def test_a_teacher_that_ends_its_turns_where_the_student_goes_on_is_wrong(tmp_path, kind):
    """A base student of an instructed teacher, one vocabulary."""
    values = save_pair(tmp_path, chats=True)
    base, other = tmp_path / "student", tmp_path / "other"
    shutil.copytree(base, other)
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 0}))
    plain = copy.deepcopy(byte_level())
    plain.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    plain.save_pretrained(base)
    (base / "chat_template.jinja").write_text(plain.chat_template)
    found = checked(values, teacher={"model_name_or_path": str(other)}, objective={"kind": kind})
    (sentence,) = found.wrong
    assert sentence.startswith("the teacher ends what it writes with '<|im_end|>'")
    assert ("chat templates differ" in " ".join(found.doubts)) == (kind == "full_vocab")


def test_the_command_prints_tables_or_json_and_says_by_its_code_what_it_found(
    values, tmp_path, capsys
):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["check", "--config", str(path), "--num-rows", "4"]) == 0
    printed = capsys.readouterr().out
    assert "4 completions of the student" in printed
    assert printed.rstrip().endswith("nothing found that would train wrongly")
    settings = tmp_path / "student" / "tokenizer_config.json"
    data = tmp_path / "rows.jsonl"
    row = {"prompt": [{"role": "user", "content": "x"}], "completion": "y"}
    data.write_text(json.dumps(row))
    ends = tmp_path / "student" / "generation_config.json"
    ends.write_text(json.dumps({**json.loads(ends.read_text()), "eos_token_id": 0}))
    assert settings.is_file()
    assert main(["check", "--config", str(path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["wrong"] and found["tables"][0]["title"] == "tokenizers"
    assert main(["check", "--config", str(path), "--num-rows", "0"]) == 2
    assert main(["check", "--config", str(path), "objective.kind=alme"]) == 2
    assert "did you mean 'alm'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rollouts", "writer"),
    [
        ({}, "student"),
        ({"kind": "dataset"}, "data"),
        ({"kind": "dataset", "seq_kd": True}, "teacher"),
    ],
)
def test_the_texts_are_those_that_the_rollouts_would_train_on(values, rollouts, writer):
    found = checked(values, rollouts={**values["rollouts"], **rollouts})
    (name,) = table(found, "alignment")
    assert name.endswith(f"completions of the {writer}")
    assert found.wrong == []


def test_a_law_over_fewer_tokens_than_the_tokenizer_has(values):
    assert checked(values, vocab_size=290).wrong == []
    rollouts = {"kind": "dataset", "max_completion_length": 8}
    with pytest.raises(ConfigError, match=r"data.train_file: row \d+ has token 29\d .* over 290"):
        checked(values, vocab_size=290, rollouts=rollouts)


def test_tokens_that_prompts_begin_with_and_special_ones_without_a_role_are_shown(values, tmp_path):
    from tokenizers import processors

    beginning = copy.deepcopy(byte_level())
    beginning.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    beginning.save_pretrained(tmp_path / "student")
    found = checked(values)
    assert table(found, "the first prompt")["student"]["as text"].startswith("'<|im_start|>")
    names = table(found, "special tokens by role")["no role: text"]
    assert names == {"student": "<|im_start|>", "teacher": "none"}


def test_the_roles_of_a_teacher_with_the_same_tokens_are_its_own(values, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "student", other)
    ending = copy.deepcopy(byte_level())
    ending.eos_token = "<|im_end|>"
    ending.save_pretrained(other)
    found = checked(values, teacher={"model_name_or_path": str(other)})
    assert table(found, "special tokens by role")["eos"] == {
        "student": "<|end|>",
        "teacher": "<|im_end|>",
    }


def test_texts_without_trained_tokens_are_wrong(values, tmp_path):
    data = tmp_path / "rows.jsonl"
    row = {"prompt": "x", "completion": "b", "completion_mask": [0, 0]}
    data.write_text(json.dumps(row))
    found = checked(values, rollouts={"kind": "dataset", "max_completion_length": 8})
    assert "none of the texts has a token that is trained" in found.wrong
    assert torch.is_grad_enabled()
