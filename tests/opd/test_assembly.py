# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opd.assembly import open_run, versions
from opd.batch import collate_step
from opd.config import parse_config
from opd.schema import ConfigError
from opd.train import train


def _losses(values, **changes):
    run_dir = train(parse_config({**values, **changes}), quiet=True).output_dir
    from opd.metrics import read_jsonl

    return [row["loss"] for row in read_jsonl(run_dir / "metrics.jsonl")]


def test_the_parts_are_on_one_device_in_the_right_modes(config):
    run = open_run(config)
    assert run.student.model.training
    assert not run.teacher.model.training
    assert run.student.device == run.teacher.device
    assert run.step == 0


def test_heads_padded_differently_need_a_shared_vocabulary(values):
    values["teacher"]["config"]["vocab_size"] = 64
    with pytest.raises(ConfigError, match=r"head has 64 tokens .* set vocab_size=45"):
        open_run(parse_config(values))


def test_padding_of_the_teachers_head_does_not_reach_the_loss(values, tmp_path):
    from transformers import LlamaForCausalLM

    run = open_run(parse_config(values))
    teacher = run.teacher.model
    losses = []
    for num_rows in (45, 64):
        path = tmp_path / f"teacher{num_rows}"
        padded = LlamaForCausalLM.from_pretrained(_saved(teacher, path))
        padded.resize_token_embeddings(num_rows)
        padded.get_output_embeddings().weight.data[45:] = 1e4
        padded.save_pretrained(path)
        values["teacher"] = {"model_name_or_path": str(path)}
        output_dir = str(tmp_path / f"run{num_rows}")
        losses.append(_losses(values, vocab_size=45, output_dir=output_dir))
    assert losses[0] == losses[1]


def _saved(model, path):
    model.save_pretrained(path)
    return path


def test_gradient_checkpointing_does_not_change_the_losses(values, tmp_path):
    plain = _losses(values)
    values["student"]["gradient_checkpointing"] = True
    assert _losses(values, output_dir=str(tmp_path / "b")) == pytest.approx(plain, rel=1e-6)


def test_a_bfloat16_pair_trains(values):
    values["student"]["dtype"] = values["teacher"]["dtype"] = "bfloat16"
    losses = _losses(values)
    assert all(0 < loss < 100 for loss in losses)


def test_a_bfloat16_teacher_serves_a_float32_student(values):
    exact = _losses(values, max_steps=1)
    values["teacher"]["dtype"] = "bfloat16"
    rounded = _losses(values, max_steps=1, output_dir=values["output_dir"] + "2")
    assert rounded[0] == pytest.approx(exact[0], rel=0.05)


def test_rows_without_completions_are_refused_by_rollouts_that_follow_them(values, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "S m0 v0 1"}\n')
    values |= {"rollouts": {"kind": "replay"}, "evaluation": {"eval_steps": 1}}
    values["rollouts"]["max_completion_length"] = 8
    values["data"] = {"eval_file": str(path)}
    with pytest.raises(ConfigError, match=r"data.eval_file: must have completions"):
        open_run(parse_config(values))


def test_a_teacherless_run_needs_no_teacher(values):
    values |= {"teacher": None, "objective": {"kind": "token_nll"}, "rollouts": {"kind": "dataset"}}
    values["rollouts"]["max_completion_length"] = 8
    losses = _losses(values)
    assert len(losses) == 4


def test_threads_are_set(values):
    before = torch.get_num_threads()
    try:
        open_run(parse_config({**values, "num_threads": 2}))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_versions_name_what_a_result_depends_on():
    assert {"torch", "transformers", "opd_kernels", "python"} == set(versions())


def test_going_on_with_other_versions_is_said(values, caplog, monkeypatch):
    import opd.assembly

    train(parse_config({**values, "max_steps": 2}), quiet=True)
    monkeypatch.setattr(opd.assembly, "versions", lambda: {"torch": "9.9"})
    train(parse_config({**values, "max_steps": 2}), quiet=True)
    assert f"torch {torch.__version__} -> 9.9" in caplog.text


def test_another_end_token_of_the_teacher_is_said(values, hf_model, tmp_path, caplog):
    teacher = hf_model()
    teacher.generation_config.eos_token_id = [3, 7]
    teacher.save_pretrained(tmp_path / "teacher")
    open_run(parse_config(values))
    assert "end tokens" not in caplog.text
    values["teacher"] = {"model_name_or_path": str(tmp_path / "teacher")}
    open_run(parse_config(values))
    assert "the teacher's end tokens are ['E', 'v3'], the student's ['E']" in caplog.text


GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}


def _ratios(values):
    """Importance ratios of fresh samples, for which training must find the law drawn from."""
    run = open_run(parse_config({**values, "objective": {"kind": "sampled_token"}}))
    trajectories = run.rollouts.collect(run.data.take(0, 4), 0)
    (batch,), _ = collate_step(trajectories, batch_size=4, pad_id=0, device=run.student.device)
    assert run.student.model.training
    own = run.student.law(batch).token_logprobs(batch.token_ids).logprobs
    return (own - batch.behaviour_logprobs).exp().detach()


def test_fresh_samples_have_ratio_one_for_a_student_with_dropout(values):
    values["student"] = {"config": {**GPT2, "initializer_range": 0.4}}
    ratios = _ratios(values)
    torch.testing.assert_close(ratios, torch.ones_like(ratios))
    values["student"]["disable_dropout"] = False
    assert (_ratios(values) - 1).abs().max() > 0.1


def test_no_dropout_is_left_anywhere(values):
    values["student"] = {"config": {**GPT2, "attn_pdrop": 0.2}}
    model = open_run(parse_config(values)).student.model
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    assert (model.config.attn_pdrop, model.config.embd_pdrop, model.config.resid_pdrop) == (0, 0, 0)
    values["student"] = {"config": {**values["teacher"]["config"], "attention_dropout": 0.2}}
    model = open_run(parse_config(values)).student.model
    assert model.model.layers[0].self_attn.attention_dropout == 0.0


def test_padding_of_the_students_head_is_never_sampled(values):
    values["student"]["config"]["vocab_size"] = 64
    evaluation = {"num_prompts": 4, "lengths": [1], "temperature": [1.0, 0.0]}
    values |= {"vocab_size": 45, "max_steps": 2, "evaluation": evaluation}
    assert train(parse_config(values), quiet=True).step == 2


def test_padding_of_a_writing_teachers_head_is_never_sampled(values):
    values["teacher"]["config"]["vocab_size"] = 64
    values["rollouts"] = {"kind": "dataset", "seq_kd": True, "max_completion_length": 20}
    run = open_run(parse_config({**values, "vocab_size": 45}))
    written = run.rollouts.collect(run.data.take(0, 8), 0)
    assert max(int(trajectory.ids.max()) for trajectory in written) < 45


def _resume_with(values, **changes):
    done = train(parse_config({**values, "max_steps": 1}), quiet=True)
    return parse_config({**values, "resume_from_checkpoint": str(done.checkpoint), **changes})


def test_going_on_from_a_path_takes_the_new_optimizer_settings(values):
    changes = {"adam_beta2": 0.95, "adam_epsilon": 1e-6, "weight_decay": 0.1}
    optimizer = open_run(_resume_with(values, **changes)).optimizer
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
    assert {group["eps"] for group in optimizer.param_groups} == {1e-6}
    assert all(int(state["step"]) == 1 for state in optimizer.state.values())


def test_going_on_with_other_rollouts_starts_those_afresh_and_says_so(values, caplog):
    replay = {"kind": "replay", "max_completion_length": 8, "init_threshold": 0.3}
    evaluation = {"eval_steps": 1, "num_prompts": 2}
    run = open_run(_resume_with(values, rollouts=replay, evaluation=evaluation))
    assert run.step == 1
    assert run.rollouts.metrics()["replay/phi"] == 0.3
    assert "rollouts 'replay' start afresh, the checkpoint is of 'hf'" in caplog.text


def test_a_training_state_of_another_model_is_one_sentence(values):
    config = _resume_with(values)
    path = Path(config.resume_from_checkpoint) / "training_state.pt"
    tensors = torch.load(path, weights_only=True)
    del tensors["optimizer"]["param_groups"][0]
    torch.save(tensors, path)
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint: '.*' does not fit this run, "):
        open_run(config)


@pytest.mark.parametrize("rollouts", [{"kind": "dataset"}, {"kind": "mixture", "lmbda": 0.9}])
def test_a_row_without_completion_is_found_before_training(values, tmp_path, rollouts):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "S m0 v0 1", "completion": "v1"}\n{"prompt": "S m0 v0 2"}\n')
    values |= {"data": {"train_file": str(path)}}
    values["rollouts"] = {"max_completion_length": 8, **rollouts}
    with pytest.raises(ConfigError, match=r"data.train_file: row 2 has no completion, which"):
        open_run(parse_config(values))


def test_a_teacher_without_tokenizer_is_said(values, hf_model, tmp_path, caplog):
    hf_model().save_pretrained(tmp_path / "teacher")
    values["teacher"] = {"model_name_or_path": str(tmp_path / "teacher")}
    open_run(parse_config(values))
    assert "has no tokenizer to compare with the student's" in caplog.text


def _teacher_on_disk(path, hf_model, tokenizer, *, seed=2):
    hf_model(seed=seed).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return {"model_name_or_path": str(path)}


def test_tokens_that_no_law_is_over_are_not_compared(values, hf_model, tmp_path):
    from opd.tasks import TASKS

    more = TASKS["chain_repair"]().load_tokenizer()
    more.add_tokens(["one more"])
    values["teacher"] = _teacher_on_disk(tmp_path / "teacher", hf_model, more)
    assert open_run(parse_config(values)).teacher.lm_head_weight.shape[0] == len(more) - 1


def test_another_teacher_at_the_same_path_is_refused(values, hf_model, tokenizer, tmp_path, caplog):
    path = tmp_path / "teacher"
    values["teacher"] = _teacher_on_disk(path, hf_model, tokenizer)
    done = train(parse_config({**values, "max_steps": 1}), quiet=True)
    config = parse_config({**values, "max_steps": 1})
    assert open_run(config).step == 1
    _teacher_on_disk(path, hf_model, tokenizer, seed=3)
    other = r"another teacher, its weights or their dtype have the .* take another output_dir"
    with pytest.raises(ConfigError, match=other):
        open_run(config)
    assert "another teacher" not in caplog.text
    forced = {**values, "max_steps": 1, "resume_from_checkpoint": str(done.checkpoint)}
    assert open_run(parse_config(forced)).step == 1
    assert "was trained with another teacher" in caplog.text
