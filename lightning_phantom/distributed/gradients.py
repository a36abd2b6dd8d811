"""Gradients of a model whose parameters lie partly on other ranks: their average, their norm, and their overflows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_phantom.distributed.ranks import Ranks, Waiting
from lightning_phantom.distributed.shards import Split


class ShardAverage:
    """Averages the gradients of shards over the groups, in the backward, as soon as each is there.

    Within a group they hold the mean over its ranks already. What has been accumulated is averaged with the backward
    that is not `blocked`, like DistributedDataParallel's.

    Args:
        shards: the parameters of which each rank of a group has its own.
        ranks: those that hold the same shards, one in each group.

    Attributes:
        blocked: whether gradients only accumulate.
    """

    def __init__(self, shards: Iterable[Tensor], ranks: Ranks) -> None:
        self.blocked = False
        self._ranks = ranks
        self._arriving: dict[int, tuple[Tensor, list[Waiting]]] = {}
        self._handles = [p.register_post_accumulate_grad_hook(self._start) for p in shards if p.requires_grad]

    def remove(self) -> None:
        """Average no more."""
        for handle in self._handles:
            handle.remove()

    def _start(self, parameter: Tensor) -> None:
        if self.blocked or parameter.grad is None:
            return
        if not self._arriving:
            self._ranks.agreement.begin()
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        # A parameter that is reached again in this backward finds no gradient, and starts one that is added in the end.
        grad, parameter.grad = parameter.grad.contiguous(), None
        _, waiting = self._arriving.setdefault(id(parameter), (parameter, []))
        waiting.append(self._ranks.sum(grad, None, f"average of the gradient of a shard {list(grad.shape)}"))

    def _finish(self) -> None:
        arriving, self._arriving = self._arriving, {}
        for parameter, waiting in arriving.values():
            first, *others = (wait() for wait in waiting)
            for other in others:
                first += other
            parameter.grad = first.div_(self._ranks.size)


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
