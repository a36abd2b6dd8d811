"""What holds weights like a linear's and is none: it stays dense, and the plan says why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lightning_phantom.layers.dense import is_linear
from lightning_phantom.plan.record import PlannedLayer


def others(root: nn.Module) -> Iterator[PlannedLayer]:
    """A row for each parameter that holds the weights of several experts, and for each module that is like a linear."""
    for name, module in root.named_modules():
        if is_linear(module):
            continue
        bias = isinstance(module._parameters.get("bias"), nn.Parameter)
        if sizes := _sizes_like_a_linears(module):
            reason = f"{type(module).__name__} is no nn.Linear: make it one, or a subclass with the same forward"
            yield _row(name, *sizes, bias, reason, sum(p.numel() for p in module.parameters(recurse=False)))
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() == 3 and _holds_experts(name, module):
                experts, n_out, n_in = parameter.shape
                reason = f"the weights of {experts} experts in one parameter, which no linear reads"
                yield _row(f"{name}.{key}" if name else key, n_in, n_out, False, reason, parameter.numel())


def _row(name: str, n_in: int, n_out: int, bias: bool, reason: str, weights: int) -> PlannedLayer:
    return PlannedLayer(name, n_in, n_out, bias, False, "skip", reason, None, weights, weights)


def _sizes_like_a_linears(module: Any) -> tuple[Any, Any] | None:
    """The widths of what a module reads and writes, if its weight is a matrix between them."""
    weight = module._parameters.get("weight")
    for of in ("features", "channels"):
        n_in, n_out = getattr(module, f"in_{of}", None), getattr(module, f"out_{of}", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and {n_in, n_out} == set(weight.shape):
            return n_in, n_out
    return None


def _holds_experts(name: str, module: nn.Module) -> bool:
    """Whether a module calls itself experts."""
    return any("expert" in called.lower() for called in (name.rpartition(".")[2], type(module).__name__))
