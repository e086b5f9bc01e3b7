# SPDX-License-Identifier: Apache-2.0
"""Argument checks, the only place where their messages are formed.

Pattern: `{op}: {argument} must {requirement}, got {value}`, then the way out. Only metadata is
read: a check never waits for a device.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEFAULT_WORKSPACE_BYTES = 1 << 30
# OPD_MAX_TOPK of opd.h
MAX_TOPK = 4096


def no_forward_mode(op: str, *tensors: Tensor) -> None:
    """The kernels have no forward-mode derivative; without this it would come out as zero."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            f"{op}: forward-mode derivatives (torch.func.jvp) must be taken with "
            "backend='reference'; the kernels have reverse mode only."
        )


def real_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if the inputs are float64, else float32: the dtype of losses and statistics."""
    return torch.float64 if tensors[0].dtype == torch.float64 else torch.float32


def tensor(op: str, name: str, value: Tensor, dim: int) -> None:
    """A tensor of `dim` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}.")
    if value.dim() != dim:
        raise ValueError(
            f"{op}: {name} must have {dim} dimension(s), got shape {tuple(value.shape)}."
            + (" Flatten batch and sequence to one token dimension." if value.dim() > dim else "")
        )


def floating(op: str, **tensors: Tensor) -> None:
    """Floating tensors; all of them float64 or none."""
    for name, value in tensors.items():
        if value.dtype not in FLOATS:
            raise TypeError(
                f"{op}: {name} must be float32, bfloat16, float16 or float64, got {value.dtype}."
            )
    if len({value.dtype == torch.float64 for value in tensors.values()}) > 1:
        found = ", ".join(f"{name} {value.dtype}" for name, value in tensors.items())
        raise TypeError(
            f"{op}: float64 must be used for all of its inputs or for none, got {found}."
        )


def same_device(op: str, **tensors: Tensor | None) -> None:
    """All on the device of the first."""
    (first_name, first), *rest = tensors.items()
    for name, value in rest:
        if value is not None and value.device != first.device:
            raise ValueError(
                f"{op}: {name} must be on {first.device} like {first_name}, got {value.device}."
            )


def same_dtype(op: str, **tensors: Tensor) -> None:
    """All of the dtype of the first."""
    (first_name, first), *rest = tensors.items()
    for name, value in rest:
        if value.dtype != first.dtype:
            raise TypeError(
                f"{op}: {name} must have dtype {first.dtype} like {first_name}, got {value.dtype}."
            )


def length(op: str, name: str, value: Tensor, expected: int, like: str) -> None:
    """First dimension of `expected` rows, as many as `like` has."""
    if value.shape[0] != expected:
        raise ValueError(
            f"{op}: {name} must have {expected} rows like {like}, got shape {tuple(value.shape)}."
        )


def hidden_and_head(op: str, side: str, hidden: Tensor, weight: Tensor) -> None:
    """hidden [T, D] and weight [V, D] of one model."""
    hidden_name = f"{side}_hidden" if side else "hidden"
    weight_name = f"{side}_lm_head_weight" if side else "lm_head_weight"
    tensor(op, hidden_name, hidden, 2)
    tensor(op, weight_name, weight, 2)
    if hidden.shape[1] == 0:
        raise ValueError(f"{op}: {hidden_name} must have a hidden size of at least 1, got 0.")
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{op}: {weight_name} must have shape (vocab_size, {hidden.shape[1]}) to match "
            f"{hidden_name} {tuple(hidden.shape)}, got {tuple(weight.shape)}. One row is one token."
        )
    same_dtype(op, **{hidden_name: hidden, weight_name: weight})


def vocab_prefix(op: str, vocab_size: int | None, **widths: int) -> int:
    """The number of shared leading columns; without `vocab_size` all widths must agree."""
    names = list(widths)
    smallest = min(widths.values())
    if vocab_size is None:
        if len(set(widths.values())) > 1:
            found = ", ".join(f"{name} {width}" for name, width in widths.items())
            raise ValueError(
                f"{op}: {' and '.join(names)} must have the same vocabulary, got {found}. If the "
                f"first {smallest} ids are the same tokens and the rest is padding, pass "
                f"vocab_size={smallest}."
            )
        vocab_size = smallest
    elif isinstance(vocab_size, bool) or not isinstance(vocab_size, (int, torch.SymInt)):
        raise TypeError(f"{op}: vocab_size must be an int, got {type(vocab_size).__name__}.")
    if not 0 < vocab_size <= smallest:
        raise ValueError(f"{op}: vocab_size must be in [1, {smallest}], got {vocab_size}.")
    return vocab_size


def temperature(op: str, name: str, value: float) -> float:
    """A positive finite number."""
    if isinstance(value, (bool, Tensor)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}.")
    if not 0 < value < math.inf:
        raise ValueError(f"{op}: {name} must be positive and finite, got {value}.")
    return float(value)


def temperatures(op: str, value: object) -> tuple[float | Tensor, float | Tensor]:
    """(student, teacher) from one number or [T] tensor, or a pair of them."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(
                f"{op}: temperature must be a number or (student, teacher), got {value!r}."
            )
        student, teacher = value
    else:
        student = teacher = value
    return (
        student if isinstance(student, Tensor) else temperature(op, "student temperature", student),
        teacher if isinstance(teacher, Tensor) else temperature(op, "teacher temperature", teacher),
    )


def real_values(op: str, name: str, value: Tensor) -> None:
    """No complex numbers: torch would drop their imaginary part with a warning."""
    if value.dtype.is_complex:
        raise TypeError(f"{op}: {name} must hold real numbers, got {value.dtype}.")


def per_token(rows, name: str, value: Tensor) -> Tensor:
    """[T] in the kernel's dtype, contiguous and without gradient; rows is a `_laws.Rows`."""
    tensor(rows.op, name, value, 1)
    length(rows.op, name, value, rows.num_tokens, "the hidden states or logits")
    real_values(rows.op, name, value)
    if value.device != rows.device:
        raise ValueError(f"{rows.op}: {name} must be on {rows.device}, got {value.device}.")
    if value.requires_grad:
        raise ValueError(
            f"{rows.op}: {name} must not require grad, got a tensor that does. It is a constant "
            "of the loss; detach() it."
        )
    return value.to(rows.real).contiguous()


def softcap(op: str, name: str, value: float | None) -> float:
    """A positive number; None is 0, which the kernels take for none."""
    if value is None:
        return 0.0
    return temperature(op, name, value)


def logit_scale(op: str, name: str, value: float) -> float:
    """A finite number that is not 0."""
    if isinstance(value, (bool, Tensor)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}.")
    if value == 0 or not -math.inf < value < math.inf:
        raise ValueError(f"{op}: {name} must be finite and not 0, got {value}.")
    return float(value)


def law_number(rows, name: str, value: float) -> float:
    """A number of a law whose size and inverse float32, where the kernel is in it, holds whole."""
    tiny = torch.finfo(torch.float32).tiny
    if rows.real != torch.float64 and not tiny <= abs(value) <= 1 / tiny:
        raise ValueError(
            f"{rows.op}: {name} must be in [{tiny:.3g}, {1 / tiny:.3g}] in size, as float32 holds "
            f"it and its inverse, got {value}."
        )
    return value


def autocast_pair(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast, hidden states in the head's dtype; the op forms float32 logits of its own."""
    both = isinstance(hidden, Tensor) and isinstance(weight, Tensor)
    if both and hidden.dtype != weight.dtype and torch.is_autocast_enabled(hidden.device.type):
        return hidden.to(weight.dtype), weight
    return hidden, weight


def lora(
    rows, value: object, head: Tensor, name: str = "student_lora"
) -> tuple[Tensor | None, Tensor | None]:
    """(scaling * A, B) of the pair that adds scaling * B @ A to the head [V, D].

    scaling * A is in the kernel's dtype: rounded to 16 bits it would be another head.
    """
    if value is None:
        return None, None
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        raise TypeError(f"{rows.op}: {name} must be (A, B, scaling), got {value!r}.")
    down, up, scaling = value
    tensor(rows.op, f"A of {name}", down, 2)
    tensor(rows.op, f"B of {name}", up, 2)
    scaling = logit_scale(rows.op, f"scaling of {name}", scaling)
    rank = down.shape[0]
    if down.shape[1] != head.shape[1] or up.shape[0] != head.shape[0] or up.shape[1] != rank:
        raise ValueError(
            f"{rows.op}: {name} must be A (r, {head.shape[1]}) and B ({head.shape[0]}, r) "
            f"for a head {tuple(head.shape)}, got {tuple(down.shape)} and {tuple(up.shape)}."
        )
    for which, value in (("A", down), ("B", up)):
        if value.device != rows.device:
            raise ValueError(
                f"{rows.op}: {which} of {name} must be on {rows.device}, got {value.device}."
            )
        if value.dtype not in FLOATS:
            raise TypeError(
                f"{rows.op}: {which} of {name} must be a floating tensor, got {value.dtype}."
            )
    return down.to(rows.real) * scaling, up


def gradient_tolerance(op: str, value: float | None, reduction: str) -> float:
    """A positive number; None is 0, exact."""
    if value is None:
        return 0.0
    if reduction == "none":
        raise ValueError(
            f"{op}: gradient_tolerance must be None with reduction='none', got {value!r}: the "
            "gradient is formed in backward, when the statistics that say what it dropped are "
            "returned already. Pass the weights as token_weights and reduction='sum'."
        )
    return temperature(op, "gradient_tolerance", value)


def bias(rows, name: str, value: Tensor, vocab_size: int) -> Tensor:
    """[V] or longer, in the kernel's dtype and contiguous."""
    tensor(rows.op, name, value, 1)
    if value.shape[0] < vocab_size:
        raise ValueError(
            f"{rows.op}: {name} must have one value per token of the vocabulary "
            f"({vocab_size}), got shape {tuple(value.shape)}."
        )
    if value.device != rows.device:
        raise ValueError(f"{rows.op}: {name} must be on {rows.device}, got {value.device}.")
    if value.dtype not in FLOATS:
        raise TypeError(f"{rows.op}: {name} must be a floating tensor, got {value.dtype}.")
    return value.to(rows.real).contiguous()


def used_reference(op: str, model: Tensor | None, *options: object) -> None:
    """Bias, softcap and logit scale of a reference model only where there is one."""
    given = [value for value in options if value is not None and not isinstance(value, Tensor)]
    tensors = [value for value in options if isinstance(value, Tensor)]
    if model is None and (tensors or any(value != 1.0 for value in given)):
        raise ValueError(
            f"{op}: reference_bias, reference_softcap and reference_logit_scale must come with a "
            "reference model, got none."
        )


def id_table(rows, name: str, value: Tensor) -> Tensor:
    """[T, K] ids as contiguous int64, from [T, K] or [T]; negative ones are ignored."""
    if isinstance(value, Tensor) and value.dim() == 1:
        value = value.unsqueeze(1)
    tensor(rows.op, name, value, 2)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{rows.op}: {name} must be int64 or int32, got {value.dtype}.")
    length(rows.op, name, value, rows.num_tokens, "the hidden states or logits")
    if value.device != rows.device:
        raise ValueError(f"{rows.op}: {name} must be on {rows.device}, got {value.device}.")
    return value.to(torch.int64).contiguous()


def label_weights(rows, value: Tensor, labels: Tensor) -> Tensor:
    """The shape of labels, in the kernel's dtype, contiguous and without gradient."""
    if isinstance(value, Tensor) and value.dim() == 1:
        value = value.unsqueeze(1)
    tensor(rows.op, "label_weights", value, 2)
    if value.shape != labels.shape:
        raise ValueError(
            f"{rows.op}: label_weights must have the shape of labels {tuple(labels.shape)}, got "
            f"{tuple(value.shape)}."
        )
    if value.device != rows.device:
        raise ValueError(f"{rows.op}: label_weights must be on {rows.device}, got {value.device}.")
    if value.requires_grad:
        raise ValueError(
            f"{rows.op}: label_weights must not require grad, got a tensor that does. They are "
            "constants of the loss; detach() them."
        )
    return value.to(rows.real).contiguous()


def token_weights(
    op: str, value: Tensor | None, num_tokens: int, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """[T] weights in the kernel's dtype, contiguous and without gradient; None stays None."""
    if value is None:
        return None
    tensor(op, "token_weights", value, 1)
    length(op, "token_weights", value, num_tokens, "the hidden states or logits")
    real_values(op, "token_weights", value)
    if value.device != device:
        raise ValueError(f"{op}: token_weights must be on {device}, got {value.device}.")
    if value.requires_grad:
        raise ValueError(
            f"{op}: token_weights must not require grad, got a tensor that does. They are "
            "constants of the loss; detach() them."
        )
    return value.to(dtype).contiguous()


def token_ids(op: str, value: Tensor, num_tokens: int, device: torch.device) -> Tensor:
    """[T] ids as contiguous int64; their range is checked by the kernel, on CPU."""
    tensor(op, "token_ids", value, 1)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: token_ids must be int64 or int32, got {value.dtype}.")
    length(op, "token_ids", value, num_tokens, "the hidden states or logits")
    if value.device != device:
        raise ValueError(f"{op}: token_ids must be on {device}, got {value.device}.")
    return value.to(torch.int64).contiguous()


def num_topk(op: str, value: int, vocab_size: int) -> int:
    """An int from 1 to what a kernel holds, and no more than there are tokens."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: num_topk must be an int, got {type(value).__name__}.")
    if not 1 <= value <= min(MAX_TOPK, vocab_size):
        raise ValueError(
            f"{op}: num_topk must be in [1, {min(MAX_TOPK, vocab_size)}] for a vocabulary of "
            f"{vocab_size}, got {value}."
        )
    return value


def one_of(op: str, name: str, value: str, allowed: Iterable[str]) -> str:
    """A string from a short list."""
    allowed = tuple(allowed)
    if value not in allowed:
        listed = ", ".join(repr(item) for item in allowed)
        raise ValueError(f"{op}: {name} must be one of {listed}, got {value!r}.")
    return value


def optional_bool(op: str, name: str, value: bool | None) -> None:
    """True, False or None."""
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True, False or None, got {value!r}.")


def names(op: str, name: str, value: Iterable[str]) -> tuple[str, ...]:
    """Several strings; a single one is refused, because its letters would be taken for them."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{op}: {name} must be a sequence of names, got {value!r}.")
    return tuple(value)


def token_ids_in_range(
    op: str, value: Tensor, vocab_size: int, name: str = "token_ids", padding: bool = False
) -> None:
    """Ids inside the vocabulary. For the body of an op, on CPU: elsewhere it would wait.

    `padding`: negative ids are slots without one.
    """
    if value.device.type != "cpu" or value.numel() == 0:
        return
    outside = torch.nonzero(
        (value >= vocab_size) if padding else (value < 0) | (value >= vocab_size)
    )
    if len(outside):
        position = tuple(int(index) for index in outside[0])
        where = position[0] if len(position) == 1 else position
        raise ValueError(
            f"{op}: {name} must be {'below' if padding else 'in [0,'} {vocab_size}"
            f"{'' if padding else ')'}, got {int(value[position])} at position {where}."
            + (" Drop ignored positions (-100) before the call." if name == "token_ids" else "")
        )


def distinct_ids(op: str, value: Tensor, vocab_size: int, name: str) -> None:
    """Ids [M] of a vocabulary, none of them twice. On CPU and not in a trace, as above."""
    if torch.compiler.is_compiling() or value.device.type != "cpu" or isinstance(value, FakeTensor):
        return
    token_ids_in_range(op, value, vocab_size, name)
    counts = torch.bincount(value, minlength=vocab_size)
    if bool((counts > 1).any()):
        raise ValueError(
            f"{op}: {name} must hold every id once, got {int(counts.argmax())} more often."
        )


def values_in_range(
    op: str, name: str, value: Tensor, weights: Tensor | None, low: float, high: float, words: str
) -> None:
    """Values of the tokens that count. For the body of an op, on CPU: elsewhere it would wait."""
    if value.device.type != "cpu" or value.numel() == 0:
        return
    outside = ~((value >= low) & (value <= high))
    if weights is not None:
        outside &= weights != 0
    outside = torch.nonzero(outside)
    if len(outside):
        position = int(outside[0])
        raise ValueError(
            f"{op}: {name} must be {words}, got {float(value[position])} at position {position}."
        )


def rows_in_order(op: str, status: Tensor, words: dict[int, str]) -> None:
    """Rows that a kernel has not refused. On CPU, and not in a trace: elsewhere it would wait."""
    is_traced = torch.compiler.is_compiling() or isinstance(status, FakeTensor)
    if is_traced or status.device.type != "cpu" or status.numel() == 0:
        return
    refused = torch.nonzero(status)
    if len(refused):
        row = int(refused[0])
        raise ValueError(
            f"{op}: rows must be laws, best first, but row {row} is none: "
            f"{words[int(status[row])]}."
        )


def byte_count(op: str, value: int) -> int:
    """A byte budget."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: workspace_bytes must be an int, got {type(value).__name__}.")
    return value


def workspace(op: str, value: int, smallest: int, why: str | None = None) -> int:
    """A byte budget that holds at least one token."""
    if value < smallest:
        raise ValueError(
            f"{op}: workspace_bytes must be at least {smallest} (one token of this vocabulary"
            f"{'' if why is None else '; ' + why}), got {value}."
        )
    return value


def unit_stride(value: Tensor) -> Tensor:
    """The tensor with a contiguous last dimension, copied only if it has none."""
    return value if value.stride(-1) == 1 or value.numel() == 0 else value.contiguous()
