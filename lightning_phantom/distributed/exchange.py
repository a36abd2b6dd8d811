"""The exchanges of `Ranks` with their gradients, as conjugate pairs: what one does forward, the other does backward.

A value in token layout, [t, w], is one rank's own, and so is its gradient: that of this rank's loss. A value in feature
layout, [T, w/R], belongs to all ranks of the group, and its gradient is that of their mean loss. (So the gradients of
parameters inside add up to the group's mean by themselves, as DistributedDataParallel makes those outside.) Passing
from one to the other therefore scales:

| forward | backward |
|---|---|
| `to_features` times c | `to_tokens` times c R |
| `to_tokens` times c | `to_features` times c / R |
| `gather_tokens` times c | `sum_tokens` times c R |
| `sum_tokens` times c | `gather_tokens` times c / R |
| `gather_latents` | `sum_latents` |
| `transpose_latents` | `transpose_latents` |

Where the ranks read one batch for all (`Rows.shared`), each has the same loss, and nothing is scaled. Every backward is
an exchange of this file again, so gradients of any order are right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_phantom.distributed.agreement import Rows
from lightning_phantom.distributed.ranks import Ranks


def to_features(x: Tensor, ranks: Ranks, rows: Rows, what: str, scale: float = 1.0) -> Tensor:
    """Own tokens, all features [t, w] -> the group's tokens, own features [T, w/R]."""
    return _Exchange.apply(x, "to_features", ranks, rows, what, scale)


def to_tokens(x: Tensor, ranks: Ranks, rows: Rows, what: str, scale: float = 1.0) -> Tensor:
    """The group's tokens, own features [T, w/R] -> own tokens, all features [t, w]."""
    return _Exchange.apply(x, "to_tokens", ranks, rows, what, scale)


def gather_tokens(x: Tensor, ranks: Ranks, rows: Rows, what: str, scale: float = 1.0) -> Tensor:
    """Own tokens [t, w] -> the group's tokens [T, w], all features."""
    return _Exchange.apply(x, "gather_tokens", ranks, rows, what, scale)


def sum_tokens(x: Tensor, ranks: Ranks, rows: Rows, what: str, scale: float = 1.0) -> Tensor:
    """The group's tokens [T, w] on each rank -> own tokens [t, w] of their sum."""
    return _Exchange.apply(x, "sum_tokens", ranks, rows, what, scale)


def gather_latents(x: Tensor, ranks: Ranks, rows: Rows | None, what: str) -> Tensor:
    """[T, w] of each rank -> [R, T, w]."""
    return x.unsqueeze(0) if ranks.size == 1 else _Latents.apply(x, "all_gather", ranks, rows, what)


def sum_latents(x: Tensor, ranks: Ranks, rows: Rows, what: str) -> Tensor:
    """[R, T, w] on each rank -> this rank's [T, w] of their sum."""
    return x[0] if ranks.size == 1 else _Latents.apply(x, "reduce_scatter", ranks, rows, what)


def transpose_latents(x: Tensor, ranks: Ranks, rows: Rows | None, what: str) -> Tensor:
    """[R, T, w], a part for each rank -> [R, T, w], a part from each."""
    return x if ranks.size == 1 else _Latents.apply(x, "transpose", ranks, rows, what)


_CONJUGATES = {
    "to_features": "to_tokens",
    "to_tokens": "to_features",
    "gather_tokens": "sum_tokens",
    "sum_tokens": "gather_tokens",
}
_LEAVES_TOKENS = ("to_features", "gather_tokens")


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, way: str, ranks: Ranks, rows: Rows, what: str, scale: float) -> Tensor:
        ctx.way, ctx.ranks, ctx.rows, ctx.what, ctx.scale = way, ranks, rows, what, scale
        x = x.clone() if x._is_zerotensor() else x  # a gradient without memory of its own
        moved: Tensor = getattr(ranks, way)(x, rows, what, scale)()
        return moved.clone() if moved._is_view() else moved  # autograd forbids writing into views made here

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ranks, rows, way = ctx.ranks, ctx.rows, ctx.way
        factor = 1 if rows.shared else ranks.size if way in _LEAVES_TOKENS else 1 / ranks.size
        back = _Exchange.apply(grad, _CONJUGATES[way], ranks, rows, _of_gradients(ctx.what), ctx.scale * factor)
        return back, None, None, None, None, None


class _Latents(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, way: str, ranks: Ranks, rows: Rows, what: str) -> Tensor:
        ctx.among = _ADJOINTS[way], ranks, rows, _of_gradients(what)
        return getattr(ranks, way)(x, rows, what)()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Latents.apply(grad, *ctx.among), None, None, None, None


_ADJOINTS = {"all_gather": "reduce_scatter", "reduce_scatter": "all_gather", "transpose": "transpose"}


def _of_gradients(what: str) -> str:
    return what if what.startswith("gradient") else f"gradient: {what}"


def replicated(parameter: Tensor, ranks: Ranks) -> Tensor:
    """`parameter`, which every rank holds, to be read in feature layout.

    There a rank sees a share of its gradient: scaled so that the mean over the ranks is the whole.
    """
    return _Scaled.apply(parameter, ranks.size) if parameter.requires_grad else parameter


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None
