"""Gradients of a model whose parameters lie partly on other ranks: the global norm, and what an optimizer must hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_phantom.comm import Ranks
from lightning_phantom.errors import PhantomError
from lightning_phantom.layers import PhantomLinear
from lightning_phantom.split import Split, split_layers


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


# Their step looks at whole tensors, norms or curvature, of which a shard knows only its part.
_NOT_ELEMENTWISE = {"Muon", "Adafactor", "LAMB", "Lamb", "LARS", "Shampoo", "SOAP"}
# Their step size comes from sums over every parameter they hold.
_OVER_ALL = {"LBFGS", "Prodigy", "DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD"}


def not_elementwise(optimizers: Iterable[Optimizer]) -> list[str]:
    """The names of the optimizers that train shards otherwise than they would the whole tensors."""
    return _named(optimizers, _NOT_ELEMENTWISE)


def over_all_parameters(optimizers: Iterable[Optimizer]) -> list[str]:
    """The names of the optimizers that take one decision for all their parameters."""
    return _named(optimizers, _OVER_ALL)


def _named(optimizers: Iterable[Optimizer], names: set[str]) -> list[str]:
    return [type(o).__name__ for o in optimizers if {c.__name__ for c in type(o).__mro__} & names]


def check_optimizers(optimizers: Iterable[Optimizer], module: nn.Module) -> None:
    """Raise PhantomError where an optimizer holds parameters from before the swap, or only a part of a phantom layer's.

    Both train silently: the old parameters go nowhere, the missing factors stay as they are.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    stale = len(held - {id(p) for p in module.parameters()})
    if stale:
        raise PhantomError(
            f"the optimizer holds {stale} parameters that are no longer in the model: they were collected before the "
            f"layers were swapped. Collect them inside configure_optimizers, from self.parameters()."
        )
    phantom = {name: layer for name, layer in split_layers(module).items() if isinstance(layer, PhantomLinear)}
    for name, layer in phantom.items():
        trainable = {key: id(p) for key, p in layer.named_parameters(recurse=False) if p.requires_grad}
        missing = [key for key, identity in trainable.items() if identity not in held]
        if missing and len(missing) < len(trainable):
            raise PhantomError(
                f"the optimizer holds only a part of {name!r}: {', '.join(missing)} would never be trained. "
                f"A phantom layer's parameters are {', '.join(trainable)}; pass all, or freeze those you leave out."
            )
