"""Gradients of a model whose parameters lie partly on other ranks: their norm, and their overflows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_phantom.distributed.ranks import Ranks
from lightning_phantom.distributed.shards import Split


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor], max_norm: float, sharded: dict[int, Split], norm_type: float = 2.0
) -> Tensor:
    """Scale the gradients down to a global norm of `max_norm`, and return the norm before; collective.

    The shards' part of the norm is summed over their ranks, the replicated parameters' part counts once.
    """
    held = [p for p in parameters if p.grad is not None]
    shards = [p.grad for p in held if id(p) in sharded and p.grad is not None]
    replicated = [p.grad for p in held if id(p) not in sharded and p.grad is not None]
    ranks = next((sharded[id(p)].ranks for p in held if id(p) in sharded), Ranks(None))
    device = held[0].device if held else torch.device("cpu")

    def power(grads: Sequence[Tensor]) -> Tensor:
        norm = nn.utils.get_total_norm(grads, norm_type).to(device) if grads else torch.zeros((), device=device)
        return norm if norm_type == float("inf") else norm**norm_type

    if norm_type == float("inf"):
        norm = torch.maximum(ranks.all_reduce(power(shards), "max"), power(replicated))
    else:
        norm = (ranks.all_reduce(power(shards), "sum") + power(replicated)) ** (1 / norm_type)
    nn.utils.clip_grads_with_norm_(held, max_norm, norm)
    return norm


def agree_on_inf(scaler: Any, ranks: Ranks) -> None:
    """Make a GradScaler skip a step on every rank when one rank's gradients overflowed.

    A skipped step changes the scale and Adam's step count, so ranks that decide alone drift apart.
    """
    own = type(scaler)._unscale_grads_

    def unscale(optimizer: Optimizer, *args: Any) -> dict[torch.device, Tensor]:
        found: dict[torch.device, Tensor] = own(scaler, optimizer, *args)
        return {device: ranks.all_reduce(inf, "max") for device, inf in found.items()}

    scaler._unscale_grads_ = unscale
