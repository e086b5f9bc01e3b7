# SPDX-License-Identifier: Apache-2.0
"""Tiny models, a tokenizer, and configurations that train in a second."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

from opd.batch import Trajectory, collate
from opd.config import parse_config
from opd.model import LanguageModel
from opd.tasks import TASKS
from opd.teachers import LocalTeacher

_MODEL = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
STUDENT = {**_MODEL, "hidden_size": 16, "intermediate_size": 32}
TEACHER = {**_MODEL, "hidden_size": 24, "intermediate_size": 48}

VALUES = {
    "seed": 0,
    "num_threads": 1,
    "task": {"kind": "chain_repair", "num_rows": 32, "lengths": [1, 2]},
    "student": {"config": STUDENT},
    "teacher": {"config": {**TEACHER, "initializer_range": 0.5}},
    "rollouts": {"kind": "hf", "max_completion_length": 8},
    "objective": {"kind": "full_vocab", "divergence": "reverse_kl"},
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "report_to": ["jsonl"],
}


@pytest.fixture(autouse=True)
def _one_thread():
    # these models are so small that a second thread only costs
    torch.set_num_threads(1)


@pytest.fixture
def values(tmp_path):
    """A configuration as a mapping, to be changed by the test."""
    return {**copy.deepcopy(VALUES), "output_dir": str(tmp_path / "run")}


@pytest.fixture
def config(values):
    """The same as an object."""
    return parse_config(values)


@pytest.fixture(scope="session")
def tokenizer():
    """Of chain_repair: 45 words."""
    return TASKS["chain_repair"]().load_tokenizer()


@pytest.fixture
def hf_model():
    """A factory of tiny Llama models with weights large enough that laws are not uniform."""
    return make_hf_model


@pytest.fixture
def student():
    """A tiny language model."""
    return LanguageModel(make_hf_model(seed=1))


@pytest.fixture
def teacher():
    """A wider one, frozen."""
    return LocalTeacher(make_hf_model(seed=2, hidden_size=24), name="teacher")


@pytest.fixture
def trajectories():
    """Five completions of different lengths, with masked tokens in some."""
    return build_trajectories()


@pytest.fixture
def make_trajectories():
    """A factory of trajectories from pairs (prompt length, completion length)."""
    return build_trajectories


def make_hf_model(*, seed=1, hidden_size=16, vocab_size=45, **settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    values = {**STUDENT, "hidden_size": hidden_size, "initializer_range": 0.4, **settings}
    values.pop("model_type")
    config = LlamaConfig(vocab_size=vocab_size, pad_token_id=0, eos_token_id=3, **values)
    return LlamaForCausalLM(config)


def build_trajectories(lengths=((4, 3), (2, 6), (4, 1), (3, 4), (1, 5)), *, vocab_size=45):
    generator = torch.Generator().manual_seed(5)
    made = []
    for number, (prompt_length, completion_length) in enumerate(lengths):
        length = prompt_length + completion_length
        loss_mask = torch.arange(length) >= prompt_length
        if completion_length > 3:
            loss_mask[prompt_length + 1] = False
        made.append(
            Trajectory(
                ids=torch.randint(1, vocab_size, (length,), generator=generator),
                prompt_length=prompt_length,
                loss_mask=loss_mask,
                behaviour_logprobs=-torch.rand(length, generator=generator) * loss_mask,
                row={"prompt": "S m0 v0 1"},
                group_id=number,
            )
        )
    return made


@pytest.fixture
def batch(trajectories):
    """The five, padded."""
    return collate(trajectories, pad_id=0)


@pytest.fixture
def engine(teacher, tokenizer):
    """What a server runs, of the teacher above, with projected hidden states."""
    from opd.server.engine import Engine

    return Engine(teacher, name="tiny", tokenizer=tokenizer, hidden_rank=8)


@pytest.fixture
def live():
    """A factory of servers on this machine: live(engine, **settings) -> URL."""
    from tests.opd.server.live import running

    with contextlib.ExitStack() as stack:
        yield lambda engine, **settings: stack.enter_context(running(engine, **settings))
