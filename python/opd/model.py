# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face causal LM as what the loss needs: hidden states, and how its head makes logits."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import field_validator, model_validator
from torch import Tensor, nn

from opd.batch import Batch, Head, Law
from opd.schema import ConfigError, Section, did_you_mean

# what configurations call the cap of the logits, factors of them, and what divides the logits in
# Granite and multiplies them in HyperCLOVA X: real tokens say which
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISOR_OR_FACTOR = "logits_scaling"
# of the largest logit
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_NUM_PROBE_TOKENS = 6
# parts of the names under which models keep probabilities of dropping something in training
_DROPOUTS = ("dropout", "pdrop", "layerdrop")


class ModelSource(Section):
    """Where a model comes from: a checkpoint, or a configuration for random weights.

    Attributes:
        model_name_or_path: a model in the Hugging Face format (safetensors only), an output_dir
            of an earlier run (its newest checkpoint is taken), or `builtin:chain_repair_teacher`.
        config: for random weights, when there is no model_name_or_path: `model_type` and what that
            type's config takes; the vocabulary and the special ids default to the tokenizer's.
        dtype: of the weights, and of the optimizer's state for a student: in bfloat16, updates
            below a 256th of a weight are lost.
        attn_implementation: as in transformers.
        trust_remote_code: run Python code that comes with the model.
    """

    model_name_or_path: str | None = None
    config: dict[str, Any] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.model_name_or_path is None and self.config is None:
            raise ValueError("must have model_name_or_path, or config for random weights")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config.model_type is required, for example 'llama'")
        return self


class StudentConfig(ModelSource):
    """The model that is trained.

    Attributes:
        tokenizer_name_or_path: default: the task's tokenizer, else the model's own.
        gradient_checkpointing: recompute activations in the backward pass.
        disable_dropout: train without dropout, as completions are sampled; with it, the law that
            is trained is not the one that was drawn from, and importance ratios are noise.
    """

    tokenizer_name_or_path: str | None = None
    gradient_checkpointing: bool = False
    disable_dropout: bool = True

    @field_validator("dtype")
    @classmethod
    def _check_trainable(cls, dtype: str) -> str:
        if dtype == "float16":
            raise ValueError(
                "must be float32 or bfloat16 for a student, whose updates overflow and underflow "
                "in pure float16, got 'float16'"
            )
        return dtype


class LanguageModel:
    """A causal LM split at its head.

    Args:
        model: with `get_output_embeddings()` and a base model that returns hidden states.
        name: the configuration key of the model, for errors.
        vocab_size: the prefix of the vocabulary that its laws are over. Default: all of it.
        workspace_bytes: scratch memory of the fused kernels.

    `sampled_size`: the prefix that completions are drawn from, None for all; smaller where the head
    has rows of padding, whose ids have no text that a teacher with other tokens could read.

    Raises:
        ConfigError: the model's logits are not those of a `Head` on its hidden states.
    """

    def __init__(
        self,
        model: Any,
        *,
        name: str = "student",
        vocab_size: int | None = None,
        workspace_bytes: int = 1 << 30,
    ) -> None:
        self.model = model
        self.name = name
        self.vocab_size = vocab_size
        self.sampled_size = vocab_size
        self.workspace_bytes = workspace_bytes
        self._takes_positions = (
            "position_ids" in inspect.signature(model.base_model.forward).parameters
        )
        self._head = read_head(model, name)

    @property
    def head(self) -> Head:
        """What turns hidden states into logits; its tensors are the parameters themselves."""
        embeddings = self.model.get_output_embeddings()
        bias = getattr(embeddings, "bias", None)
        return replace(self._head, weight=embeddings.weight, bias=bias)

    @property
    def lm_head_weight(self) -> nn.Parameter:
        """[V, D], the parameter itself."""
        return self.model.get_output_embeddings().weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head_weight.device

    @property
    def num_parameters(self) -> int:
        """Weights, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def max_positions(self) -> int | None:
        """Tokens that a sequence may have, where the model's configuration says so."""
        settings = self.model.config.get_text_config()
        return getattr(settings, "max_position_embeddings", None)

    def hidden(self, batch: Batch) -> Tensor:
        """[T, D] final hidden states at the positions whose next token is trained."""
        states = self.states(batch.input_ids, batch.attention_mask, batch.position_ids)
        rows = states.flatten(0, 1).index_select(0, batch.token_idx)
        return rows.to(self.lm_head_weight.dtype)

    def states(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any = None
    ) -> Tensor:
        """[B, S, D] final hidden states of tokens [B, S].

        Args:
            input_ids, position_ids: [B, S].
            attention_mask: [B, slots of the cache + S], 0 on padding.
            cache: of transformers, with the tokens before these; it grows by these. None: there
                are none before, and nothing is kept.
        """
        positions = {"position_ids": position_ids} if self._takes_positions else {}
        out = self.model.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=cache is not None,
            **({} if cache is None else {"past_key_values": cache}),
            **positions,
        )
        return out.last_hidden_state

    def law(self, batch: Batch) -> Law:
        """The model's next-token law at those positions, computed when first asked for."""
        return Law(
            lambda: self.hidden(batch),
            self.head,
            vocab_size=self.vocab_size,
            workspace_bytes=self.workspace_bytes,
        )


def load_model(config: ModelSource, tokenizer: Any, *, name: str, seed: int, device: str) -> Any:
    """The transformers model that a configuration asks for, on a device.

    Raises:
        ConfigError: no such model, no safetensors, a bad model configuration.
    """
    dtype = getattr(torch, config.dtype)
    attention = config.attn_implementation
    extra = {"attn_implementation": attention} if attention else {}
    if config.model_name_or_path is not None:
        model = _pretrained_model(config, name=name, dtype=dtype, extra=extra)
    else:
        model = _random_model(config, tokenizer, name=name, seed=seed, extra=extra).to(dtype)
    return model.to(resolve_device(device))


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to 0: layers, numbers kept by modules, its configuration."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        # attention reads its probability from an attribute, other code from the configuration
        holders = [module, *_configs(getattr(module, "config", None))]
        for holder in holders:
            for name, value in list(vars(holder).items()):
                is_probability = isinstance(value, float) and 0 < value <= 1
                if is_probability and any(part in name for part in _DROPOUTS):
                    setattr(holder, name, 0.0)


def _configs(config: Any) -> list[Any]:
    """A configuration and those of the parts of a composite model."""
    if config is None or not hasattr(config, "get_text_config"):
        return []
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [config, *(part for part in parts if part is not None)]


def load_tokenizer(config: StudentConfig) -> Any:
    """The student's tokenizer, with a padding token."""
    path = config.tokenizer_name_or_path or config.model_name_or_path
    if path is None:
        raise ConfigError("student.tokenizer_name_or_path: is required when there is no task")
    return load_tokenizer_at(path, "student", config.trust_remote_code)


def load_tokenizer_at(path: str, key: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer at a path, with a padding token.

    Raises:
        ConfigError: there is none, or it has no end token; `key` says whose fault it is.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_model_path(path), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: no tokenizer at {path!r}, {_first_sentence(error)}") from None
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{key}: the tokenizer at {path!r} has no end token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def resolve_model_path(path: str) -> str:
    """A `builtin:` name, or a run's output_dir, as the path of a model."""
    if path.startswith("builtin:"):
        folder = Path(__file__).parent / "tasks"
        names = [other.name for other in folder.iterdir() if (other / "config.json").is_file()]
        name = path.removeprefix("builtin:")
        if name not in names:
            hint = did_you_mean(name, names) or f", there is {', '.join(names) or 'none'}"
            raise ConfigError(f"no builtin model {name!r}{hint}")
        return str(folder / name)
    from opd.checkpoint import newest_checkpoint

    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        return str(newest_checkpoint(path) or path)
    return path


def resolve_device(device: str) -> torch.device:
    """`auto` is the GPU if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: cannot use {device!r}, {_first_sentence(error)}") from None


def read_head(model: Any, name: str) -> Head:
    """How a model makes logits of hidden states: as its configuration says, tried on real tokens.

    Raises:
        ConfigError: it has no head's matrix, or its logits are made in another way.
    """
    embeddings = model.get_output_embeddings()
    if embeddings is None or getattr(embeddings, "weight", None) is None:
        raise ConfigError(f"{name}: {type(model).__name__} has no output embedding matrix")
    heads = list(_declared_heads(model.config.get_text_config(), embeddings))
    errors = _probe_errors(model, heads)
    best = min(range(len(heads)), key=errors.__getitem__)
    if errors[best] > PROBE_TOLERANCE.get(embeddings.weight.dtype, 1e-4):
        head = heads[0]
        bias = " + bias" if head.bias is not None else ""
        raise ConfigError(
            f"{name}: {type(model).__name__} has logits that are off by {errors[0]:.2g} of the "
            f"largest, on a few tokens, from softcap(logit_scale * (hidden states @ head'{bias})) "
            f"with the softcap {head.softcap} and logit_scale {head.logit_scale:g} that its "
            "configuration declares, so the fused loss would be wrong"
        )
    return heads[best]


def _declared_heads(config: Any, embeddings: nn.Module) -> Iterator[Head]:
    """What the names in a configuration can mean, the likeliest first."""

    def numbers(*names: str) -> list[float]:
        values = [getattr(config, name, None) for name in names]
        # 0, like None, says that there is none
        return [float(value) for value in values if isinstance(value, (int, float)) and value]

    softcap = next(iter(numbers(*_SOFTCAPS)), None)
    scale = math.prod(numbers(*_FACTORS))
    bias = getattr(embeddings, "bias", None)
    ambiguous = math.prod(numbers(_DIVISOR_OR_FACTOR))
    for factor in dict.fromkeys((1.0 / ambiguous, ambiguous)):
        yield Head(embeddings.weight, bias, softcap, scale * factor)


@torch.no_grad()
def _probe_errors(model: Any, heads: list[Head]) -> list[float]:
    """The largest difference from the model's own logits, relative to the largest of these."""
    was_training = model.training
    model.eval()
    size, device = heads[0].weight.shape[0], heads[0].weight.device
    ids = torch.arange(_NUM_PROBE_TOKENS, device=device)[None] % size
    logits = model(input_ids=ids, use_cache=False).logits.float()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    model.train(was_training)
    if logits.shape[-1] != size:
        return [math.inf] * len(heads)
    largest = logits.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    errors = [float((head.logits(hidden) - logits).abs().max() / largest) for head in heads]
    return [math.inf if math.isnan(error) else error for error in errors]


def _random_model(
    source: ModelSource, tokenizer: Any, *, name: str, seed: int, extra: dict[str, Any]
) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(source.config or {})
    model_type = settings.pop("model_type")
    settings.setdefault("vocab_size", len(tokenizer))
    for key in ("pad_token_id", "eos_token_id", "bos_token_id"):
        settings.setdefault(key, getattr(tokenizer, key))
    try:
        config = AutoConfig.for_model(model_type, **settings)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config, **extra)
    except Exception as error:
        # each model's config class refuses in its own way
        raise ConfigError(f"{name}.config: {_first_sentence(error)}") from None


def _pretrained_model(
    config: ModelSource, *, name: str, dtype: torch.dtype, extra: dict[str, Any]
) -> Any:
    from transformers import AutoModelForCausalLM

    path = str(config.model_name_or_path)
    siblings = [str(other) for other in Path(path).parent.glob("*") if other.is_dir()]
    # what lies next to existing folders is meant as a folder; the rest may be a name on the hub
    if siblings and Path(path).parent != Path() and not Path(path).exists():
        hint = did_you_mean(path, siblings)
        raise ConfigError(f"{name}.model_name_or_path: no such directory {path!r}{hint}")
    try:
        return AutoModelForCausalLM.from_pretrained(
            resolve_model_path(path),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            **extra,
        )
    except ConfigError as error:
        raise ConfigError(f"{name}.model_name_or_path: {error}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{name}.model_name_or_path: no model at {path!r}: {_first_sentence(error)}"
        ) from None


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0].rstrip(".")
