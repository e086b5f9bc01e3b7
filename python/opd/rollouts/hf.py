# SPDX-License-Identifier: Apache-2.0
"""Completions by transformers' `generate`, with the log-probability each token was drawn with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from opd.batch import Origin, Prompt, Trajectory
from opd.rollouts.protocol import Rollouts
from opd.schema import Section


class Sampling(Section):
    """How completions are drawn.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among this many likeliest tokens; 0 for all.
        top_p: draw among the fewest tokens that hold this much mass.
        max_completion_length: tokens, the end token included.
        num_generations: completions of each prompt.
        generation_batch_size: completions generated at a time. Default: all of a step.
    """

    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_completion_length: int = Field(128, ge=1)
    num_generations: int = Field(1, ge=1)
    generation_batch_size: int | None = Field(None, ge=1)

    @property
    def temperature_key(self) -> str:
        """The key that has the temperature of the completions' law."""
        return "temperature"


class HfConfig(Sampling):
    """On-policy: the student writes every completion, with the weights it has at that step."""

    needs_teacher: ClassVar[bool] = False
    needs_completions: ClassVar[bool] = False
    needs_evaluation: ClassVar[bool] = False
    tells_behaviour: ClassVar[bool] = True

    kind: Literal["hf"] = "hf"
    temperature: float = Field(1.0, gt=0)

    def build(self, student: Any, teacher: Any, tokenizer: Any, **_: Any) -> HfRollouts:
        """The engine."""
        return HfRollouts(student, tokenizer, self)


class HfRollouts(Rollouts):
    """Completions by a model that is at hand, student or teacher."""

    def __init__(
        self, model: Any, tokenizer: Any, sampling: Sampling, *, origin: Origin = "student"
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.origin = origin

    def collect(self, prompts: Sequence[Prompt], step: int) -> list[Trajectory]:
        """`num_generations` completions for each prompt."""
        return sample(
            self.model, self.tokenizer, prompts, self.sampling, origin=self.origin, step=step
        )


class BehaviourRecorder:
    """A logits processor that keeps one [B, V] at a time and one float per generated token."""

    def __init__(self) -> None:
        self._law: Tensor | None = None
        self._drawn: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Look up the token that was just drawn, then remember the law of the next one."""
        self._look_up(input_ids[:, -1])
        self._law = torch.log_softmax(scores.float(), dim=-1)
        return scores

    def logprobs(self, completions: Tensor) -> Tensor:
        """[B, C] float32, nats, for the completions [B, C] that `generate` returned."""
        if len(self._drawn) < completions.shape[1]:
            self._look_up(completions[:, -1])
        return torch.stack(self._drawn[: completions.shape[1]], dim=1)

    def _look_up(self, token_ids: Tensor) -> None:
        if self._law is not None:
            self._drawn.append(self._law.gather(1, token_ids[:, None]).squeeze(1))


class SharedVocabulary:
    """A logits processor without which padding rows of the head would be sampled."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Only tokens of the shared vocabulary can be drawn."""
        padding = torch.arange(scores.shape[-1], device=scores.device) >= self._vocab_size
        return scores.masked_fill(padding, -torch.inf)


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    origin: Origin = "student",
    step: int = 0,
) -> list[Trajectory]:
    """Completions of prompts, each prompt's next to each other.

    Args:
        model: a `LanguageModel`; it is in eval mode meanwhile, and no graph is kept.
        tokenizer: for the padding and end tokens.
        prompts: P of them.
        sampling: how to draw; the model's own generation config is not used.
        origin: what to call the writer.
        step: the optimizer step.

    Returns:
        P * num_generations trajectories. Greedy ones have no behaviour log-probabilities.
    """
    repeated = [prompt for prompt in prompts for _ in range(sampling.num_generations)]
    size = sampling.generation_batch_size or len(repeated)
    trajectories: list[Trajectory] = []
    for start in range(0, len(repeated), size):
        chunk = repeated[start : start + size]
        completions, logprobs = _generate(model, tokenizer, chunk, sampling)
        end_ids = end_token_ids(model.model, tokenizer)
        for row, prompt in enumerate(chunk):
            trajectories.append(
                _trajectory(
                    prompt,
                    completions[row],
                    None if logprobs is None else logprobs[row],
                    end_ids,
                    origin=origin,
                    step=step,
                )
            )
    return trajectories


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a completion: the tokenizer's, and those of the generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({tokenizer.eos_token_id, *(i for i in listed if i is not None)})


@torch.no_grad()
def _generate(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], sampling: Sampling
) -> tuple[Tensor, Tensor | None]:
    from transformers import GenerationConfig, LogitsProcessorList
    from transformers.generation import logits_process as warpers

    longest = max(len(prompt.ids) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), tokenizer.pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt.ids) :] = prompt.ids
        attention_mask[row, longest - len(prompt.ids) :] = 1

    is_greedy = sampling.temperature == 0
    recorder = BehaviourRecorder()
    # the warping is done here, so that the recorder sees the law that is really drawn from
    processors = LogitsProcessorList()
    if model.sampled_size is not None:
        processors.append(SharedVocabulary(model.sampled_size))
    if not is_greedy:
        if sampling.temperature != 1.0:
            processors.append(warpers.TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k > 0:
            processors.append(warpers.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            processors.append(warpers.TopPLogitsWarper(float(sampling.top_p)))
        processors.append(recorder)
    generation = GenerationConfig(
        max_new_tokens=sampling.max_completion_length,
        do_sample=not is_greedy,
        temperature=None if is_greedy else 1.0,
        top_k=None if is_greedy else 0,
        top_p=None if is_greedy else 1.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_token_ids(model.model, tokenizer),
        use_cache=True,
    )
    with _for_generation(model.model, generation):
        try:
            output = model.model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                generation_config=generation,
                logits_processor=processors,
            )
        except RuntimeError as error:
            if "probability tensor contains" not in str(error):
                raise
            raise FloatingPointError(
                f"{model.name}: its logits are not finite, so nothing can be sampled; a lower "
                "learning_rate or max_grad_norm may help"
            ) from None
    completions = output[:, longest:]
    logprobs = None if is_greedy else recorder.logprobs(completions).cpu()
    return completions.cpu(), logprobs


@contextmanager
def _for_generation(model: Any, generation: Any) -> Iterator[None]:
    """Eval mode, and no default of the model's own (a repetition penalty, say) in the way."""
    was_training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = generation
    try:
        yield
    finally:
        model.train(was_training)
        model.generation_config = own


def _trajectory(
    prompt: Prompt,
    completion: Tensor,
    logprobs: Tensor | None,
    end_ids: list[int],
    *,
    origin: Origin,
    step: int,
) -> Trajectory:
    """Cut what `generate` padded: the completion stops after its first end token."""
    ends = torch.isin(completion, torch.tensor(end_ids)).nonzero().flatten()
    length = int(ends[0]) + 1 if len(ends) else len(completion)
    prompt_length = len(prompt.ids)
    loss_mask = torch.ones(prompt_length + length, dtype=torch.bool)
    loss_mask[:prompt_length] = False
    behaviour = None
    if logprobs is not None:
        behaviour = torch.cat([torch.zeros(prompt_length), logprobs[:length]])
    return Trajectory(
        ids=torch.cat([prompt.ids, completion[:length]]),
        prompt_length=prompt_length,
        loss_mask=loss_mask,
        behaviour_logprobs=behaviour,
        origin=origin,
        is_terminated=len(ends) > 0,
        step=step,
        row=prompt.row,
        group_id=prompt.group_id,
    )
