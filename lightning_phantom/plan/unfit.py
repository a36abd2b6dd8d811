"""Why a linear cannot be swapped, whatever its sizes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lightning_phantom.layers.dense import is_plain_linear
from lightning_phantom.plan.reads import read_by_parents


def unfit(module: nn.Module, linears: Mapping[str, nn.Module]) -> dict[str, str]:
    """The reason for each of `linears` that cannot be swapped."""
    holders: dict[int, set[int]] = defaultdict(set)
    names: dict[int, list[str]] = defaultdict(list)
    for name, m in module.named_modules():
        for parameter in m._parameters.values():
            if parameter is not None:
                holders[_memory(parameter)].add(id(m))
                names[_memory(parameter)].append(name)
    read = read_by_parents(module)
    reasons: dict[str, str] = {}
    for name, linear in linears.items():
        if not name:
            reasons[name] = "it is the module itself; wrap it in nn.Sequential"
        elif linear in read:
            reasons[name] = f"its weight is read by {read[linear]}"
        elif why := _unusual(linear):
            reasons[name] = why
        elif tied := [p for p in linear.parameters() if len(holders[_memory(p)]) > 1]:
            other = next(n for n in names[_memory(tied[0])] if n != name)
            reasons[name] = f"its weights are tied to those of {other!r}"
    return reasons


def _memory(parameter: nn.Parameter) -> int:
    """What two parameters share when they are tied, be it as one object or as views of one memory."""
    return (type(parameter) is nn.Parameter and parameter.untyped_storage().data_ptr()) or id(parameter)


def _unusual(linear: Any) -> str | None:
    if parametrize.is_parametrized(linear):
        return "it is parametrised"
    if not isinstance(linear._parameters.get("weight"), nn.Parameter) or set(linear._parameters) - {"weight", "bias"}:
        return "its weight is pruned or otherwise computed"
    if is_lazy(linear.weight):
        return "its size is not known yet: run a batch through the module first"
    if type(linear.weight).__name__ not in ("Parameter", "FakeTensor"):
        return f"its weight is a {type(linear.weight).__name__}"
    if not linear.weight.is_floating_point():
        return f"its weights are {linear.weight.dtype}, which no phantom layer approximates"
    if linear._modules or linear._buffers:
        return "it holds modules or buffers of its own"
    if not is_plain_linear(linear):
        return f"{type(linear).__name__} computes something else than nn.Linear"
    if not _runs_own_forward(linear):
        return "a forward of its own has been set on it"
    if any(getattr(linear, kind) for kind in _HOOKS):
        return "it has hooks"
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in linear.parameters()):
        return "its parameters have gradient hooks"
    return None


_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


def _runs_own_forward(module: nn.Module) -> bool:
    """Whether calling `module` runs the forward of its class, not one set on the instance."""
    return getattr(module.forward, "__func__", None) is type(module).forward
