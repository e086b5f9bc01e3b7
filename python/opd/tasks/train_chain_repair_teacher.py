# SPDX-License-Identifier: Apache-2.0
"""Trains the chain_repair teacher: python -m opd.tasks.train_chain_repair_teacher --output-dir DIR

It learns from expert traces with a wrong value in front of every seventh right one and the R that
takes it back; the loss skips the wrong values. So it knows how to repair, while its own text, being
mostly right, seldom shows it.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from opd.tasks.chain_repair import PROMPT_LENGTH, VOCABULARY, ChainRepair
from opd.tasks.chain_repair_gauges import accuracy_by_length, repair_rate, sample

NUM_STEPS = 750
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
WARMUP_STEPS = 50
SEED = 2


def teacher_config() -> LlamaConfig:
    """A Llama of two layers, width 64, 104,896 parameters, untied embeddings."""
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        # the default of 0.02 is made for wide models and starts narrow ones too close to zero
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=3,
    )


def train_teacher(
    task: ChainRepair, *, num_steps: int = NUM_STEPS, seed: int = SEED
) -> LlamaForCausalLM:
    """Cross-entropy on fresh expert traces, AdamW, warm-up and then cosine decay to zero."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(teacher_config()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    for step in range(num_steps):
        decay = 0.5 * (1.0 + math.cos(math.pi * step / num_steps))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * decay
        ids, targets = _batch(task.expert_rows(BATCH_SIZE, seed=seed * 1_000_000 + step))
        logits = model(input_ids=ids).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            sys.stdout.write(f"step {step + 1} of {num_steps}: loss {loss.item():.4f}\n")
            sys.stdout.flush()
    return model.eval()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the chain_repair teacher.")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(arguments)
    # models this small lose time on a second thread, and one thread makes the run repeatable
    torch.set_num_threads(1)
    task = ChainRepair()
    model = train_teacher(task, num_steps=options.num_steps, seed=options.seed)
    model.save_pretrained(options.output_dir)
    task.load_tokenizer().save_pretrained(options.output_dir)
    prompts = task.every_row()
    greedy = accuracy_by_length(task, prompts, sample(model, task, prompts, temperature=0.0))
    longest = task.every_row(lengths=[task.max_length_n]) * 16
    sampled = accuracy_by_length(task, longest, sample(model, task, longest))
    sys.stdout.write(
        f"greedy accuracy, worst length: {min(greedy.values()):.3f}\n"
        f"accuracy at temperature 1, n={task.max_length_n}: {sampled[task.max_length_n]:.3f}\n"
        f"repair rate after an injected wrong value: {repair_rate(model, task):.3f}\n"
    )


def _batch(rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    token_id = {token: i for i, token in enumerate(VOCABULARY)}
    sequences = [f"{row['prompt']} {row['completion']}".split() for row in rows]
    width = max(map(len, sequences))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    # -100 is what cross_entropy leaves out: prompts, padding and injected wrong values
    targets = torch.full_like(ids, -100)
    for i, (row, sequence) in enumerate(zip(rows, sequences, strict=True)):
        ids[i, : len(sequence)] = torch.tensor([token_id[token] for token in sequence])
        taught = torch.tensor([0] * PROMPT_LENGTH + row["completion_mask"], dtype=torch.bool)
        targets[i, : len(sequence)][taught] = ids[i, : len(sequence)][taught]
    return ids, targets


if __name__ == "__main__":
    main()
