"""Layer norm and RMS norm over features that lie on several ranks.

Layer norm, with x_r [T, n] of rank r, n = w/R, dy the gradient at y, g = dy * weight, and <.> the mean over all w
features of a token, which is the mean over the ranks of their means:

    mean = <x>    s = 1 / sqrt(<(x - mean)^2> + eps)    h = (x - mean) s    y = h * weight + bias
    dx = s (g - <g> - h <g h>)    dweight = sum over tokens of dy * h    dbias = sum over tokens of dy

RMS norm has no mean, no bias, and no <g>.

A mean over all features is that of the ranks' means, all with as many features; a variance is the mean of theirs and of
the squares by which their means differ, which loses no digits where the mean is large.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_phantom.distributed.agreement import Rows
from lightning_phantom.distributed.exchange import gather_latents
from lightning_phantom.distributed.ranks import Ranks
from lightning_phantom.layers.twice import differentiate

Among = tuple[Ranks, Rows, str]  # with whom, for which tokens and for what numbers are exchanged


def norm(x: Tensor, weight: Any, bias: Any, among: Among, eps: float, centred: bool, dtype: torch.dtype) -> Tensor:
    """Layer norm or, if not `centred`, RMS norm.

    Args:
        x: own features of the group's tokens, [T, w/R].
        weight: the rank's own slice, [w/R], or None.
        bias: likewise.
        among: the ranks, their tokens, and what the exchange is called.
        eps: added to the variance.
        centred: whether the mean is taken off.
        dtype: of what is returned.
    """
    y: Tensor = _Norm.apply(x, weight, bias, among, eps, centred, dtype)
    return y


class _Norm(torch.autograd.Function):
    """See the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Any, bias: Any, among: Among, eps: float, centred: bool, dtype: torch.dtype
    ) -> Tensor:
        mean, scale = _statistics(_wide(x), among, eps, centred)
        ctx.options = among, eps, centred, dtype
        ctx.save_for_backward(x, weight, bias, mean, scale)
        return _scaled(_standard(x, mean, scale), weight, bias).to(dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (ranks, rows, what), _, centred, _ = ctx.options
        x, weight, bias, mean, scale = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            inputs, needed = (x, weight, bias), ctx.needs_input_grad[:3]
            return (*differentiate(lambda *given: [_norm_of(*given, *ctx.options)], inputs, needed, [dy]), *_NONE)

        dy, h = _wide(dy), _standard(x, mean, scale)
        if needs_x:
            g = dy if weight is None else dy * weight
            means = [(g * h).mean(1, keepdim=True), *([g.mean(1, keepdim=True)] if centred else [])]
            summed = ranks.sum(torch.cat(means, 1), rows, f"gradient: {what}")
        d_weight = (dy * h).sum(0).to(weight.dtype) if needs_weight else None
        d_bias = dy.sum(0).to(bias.dtype) if needs_bias else None
        if not needs_x:
            return (None, d_weight, d_bias, *_NONE)
        of_gh, *of_g = (summed() / ranks.size).split(1, 1)
        dx = torch.addcmul(g, h, of_gh, value=-1)
        for each in of_g:
            dx -= each
        return (dx.mul_(scale).to(x.dtype), d_weight, d_bias, *_NONE)


_NONE = (None,) * 4


def _norm_of(x: Tensor, weight: Any, bias: Any, among: Among, eps: float, centred: bool, dtype: torch.dtype) -> Tensor:
    """What `_Norm` computes, as operations that have gradients of any order."""
    return _scaled(_standard(x, *_statistics(_wide(x), among, eps, centred)), weight, bias).to(dtype)


def _statistics(x: Tensor, among: Among, eps: float, centred: bool) -> tuple[Tensor | None, Tensor]:
    """The mean over all features, if `centred`, and 1 / sqrt(variance + eps), of each token of x [T, w/R]: [T, 1]."""
    if not centred:
        squares = gather_latents(x.square().mean(1, keepdim=True), *among)
        return None, (squares.mean(0) + eps).rsqrt()
    own = torch.cat(torch.var_mean(x, 1, correction=0, keepdim=True), 1)
    variances, means = gather_latents(own, *among).split(1, 2)  # [R, T, 1] each
    mean = means.mean(0)
    return mean, ((variances + (means - mean).square()).mean(0) + eps).rsqrt()


def _standard(x: Tensor, mean: Tensor | None, scale: Tensor) -> Tensor:
    return (_wide(x) if mean is None else x - mean) * scale


def _scaled(h: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    h = h if weight is None else h * weight
    return h if bias is None else h + bias


def _wide(x: Tensor) -> Tensor:
    """In a type that sums can be taken in."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@cache
def epsilon(dtype: torch.dtype) -> float:
    """What rms_norm adds if it is not told: epsilon of the type that it computes in or, in older releases, of x's."""
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    little = torch.rms_norm(torch.tensor([8 * wide**0.5], dtype=dtype), (1,))  # 8 / sqrt(65), if wide is added
    return wide if little.item() > 0.5 else torch.finfo(dtype).eps
