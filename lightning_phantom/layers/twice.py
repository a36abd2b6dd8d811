"""Gradients of what has a backward of its own, where they are to be differentiated again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def differentiate(
    compute: Callable[..., Sequence[Tensor]], inputs: Sequence[Any], needed: Sequence[bool], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients of `compute(*inputs)`, None where not needed, as values that have gradients themselves.

    For backwards that are differentiated again (`create_graph=True`): the forward is computed once more.
    """
    wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
    found = iter(torch.autograd.grad(compute(*inputs), wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needed]
