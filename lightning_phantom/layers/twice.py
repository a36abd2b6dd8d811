"""What has a backward of its own, where that is to be differentiated again, and where it cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def differentiate(
    compute: Callable[..., Sequence[Tensor]], inputs: Sequence[Any], needed: Sequence[bool], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients of `compute(*inputs)`, None where not needed, as values that have gradients themselves.

    For backwards that are differentiated again (`create_graph=True`): the forward is computed once more.
    """
    wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
    found = iter(torch.autograd.grad(compute(*inputs), wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needed]


def is_transformed() -> bool:
    """Whether torch.func, forward-mode differentiation or a trace is at work, which know operations alone."""
    is_traced = torch._C._get_tracing_state() is not None
    return is_traced or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
