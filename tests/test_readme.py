# SPDX-License-Identifier: Apache-2.0
"""The README's Python runs as printed and computes what it says."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parent.parent


def readme_function(name: str):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    scope: dict[str, object] = {}
    for block in blocks:
        exec(block, scope)
    return scope[name]


def test_readme_loss_is_the_masked_mean_divergence_and_trains_the_student():
    torch.manual_seed(0)
    sizes = {"vocab_size": 101, "num_hidden_layers": 1, "num_attention_heads": 2}
    student = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, **sizes))
    teacher = Qwen2ForCausalLM(
        Qwen2Config(hidden_size=32, intermediate_size=64, num_key_value_heads=2, **sizes)
    )
    input_ids = torch.randint(0, 101, (2, 9))
    attention_mask = torch.ones_like(input_ids)
    loss_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    loss_mask[0, 4:] = True
    loss_mask[1, 2:7] = True

    loss = readme_function("distillation_loss")(
        student, teacher, loss_mask, input_ids=input_ids, attention_mask=attention_mask
    )
    loss.backward()
    got = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()

    log_q = torch.log_softmax(student(input_ids).logits, -1)[:, :-1][loss_mask[:, 1:]]
    log_p = torch.log_softmax(teacher(input_ids).logits, -1)[:, :-1][loss_mask[:, 1:]].detach()
    log_m = ((log_q.exp() + log_p.exp()) / 2).log()
    half_p = (log_p.exp() * (log_p - log_m)).sum(-1)
    half_q = (log_q.exp() * (log_q - log_m)).sum(-1)
    expected = ((half_p + half_q) / 2).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-6)


def byte_level(num_tokens: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=num_tokens, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(
        ["the cat sat on the mat, and the hat sat on the cat"] * 4, trainer
    )
    return tokenizer


def test_readme_alignment_is_of_the_same_bytes():
    student, teacher = byte_level(262), byte_level(280)
    ids = student.encode("the cat and the \U0001f600").ids[:-1]  # half an emoji
    teacher_ids, chunks = readme_function("aligned")(student, teacher, ids)
    assert len(teacher_ids) < len(ids)
    assert chunks.is_aligned.all()
    assert int(chunks.num_bytes.sum()) == len("the cat and the ") + 3
    assert chunks.student_offsets[-1] == len(ids)
    assert chunks.teacher_offsets[-1] == len(teacher_ids)
