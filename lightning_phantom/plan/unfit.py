"""Why a linear cannot be swapped, whatever its sizes."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from lightning_phantom.layers.dense import is_plain_linear
from lightning_phantom.plan.transformer import BLOCKS

# Modules that read the weights of their linears themselves, in fused kernels.
_READS_WEIGHTS = (nn.MultiheadAttention,)


def unfit(module: nn.Module, linears: Mapping[str, nn.Module]) -> dict[str, str]:
    """The reason for each of `linears` that cannot be swapped."""
    holders: dict[int, set[int]] = defaultdict(set)
    names: dict[int, list[str]] = defaultdict(list)
    for name, m in module.named_modules():
        for parameter in m._parameters.values():
            if parameter is not None:
                holders[_memory(parameter)].add(id(m))
                names[_memory(parameter)].append(name)
    read = _read_by_parents(module)
    reasons: dict[str, str] = {}
    for name, linear in linears.items():
        if not name:
            reasons[name] = "it is the module itself; wrap it in nn.Sequential"
        elif name in read:
            reasons[name] = f"its weight is read by {read[name]}"
        elif why := _unusual(linear):
            reasons[name] = why
        elif tied := [p for p in linear.parameters() if len(holders[_memory(p)]) > 1]:
            other = next(n for n in names[_memory(tied[0])] if n != name)
            reasons[name] = f"its weights are tied to those of {other!r}"
    return reasons


def _memory(parameter: nn.Parameter) -> int:
    """What two parameters share when they are tied, be it as one object or as views of one memory."""
    plain = type(parameter) is nn.Parameter and not parameter.is_meta
    return (plain and parameter.untyped_storage().data_ptr()) or id(parameter)


def _read_by_parents(root: nn.Module) -> dict[str, str]:
    """The linears whose weight the forward of a module above them names, and who reads it."""
    found = {}
    for owner, m in root.named_modules():
        who = f"the forward of {owner or 'the root module'!r} itself"
        if isinstance(m, _READS_WEIGHTS):
            below = [name for name, _ in m.named_modules(prefix=owner) if name != owner]
            found.update(dict.fromkeys(below, f"{type(m).__name__} {owner!r} itself"))
        elif not isinstance(m, BLOCKS):
            for path in _weights_named_by(type(m)):  # type: ignore[arg-type]
                found[f"{owner}.{path}" if owner else path] = who
    return found


@cache
def _weights_named_by(cls: type[nn.Module]) -> tuple[str, ...]:
    if cls.__module__.startswith("torch.nn"):
        return ()
    try:
        source = inspect.getsource(cls.forward)
    except (OSError, TypeError):
        return ()
    return tuple(
        re.findall(r"\bself\.(\w+(?:\.\w+)*)\.(?:weight|bias)\b(?!\.(?:dtype|device|shape|requires_grad))", source)
    )


def _unusual(linear: Any) -> str | None:
    if parametrize.is_parametrized(linear):
        return "it is parametrised"
    if not is_plain_linear(linear):
        return f"{type(linear).__name__} is not nn.Linear itself, and has a forward of its own"
    if not isinstance(linear._parameters.get("weight"), nn.Parameter) or set(linear._parameters) - {"weight", "bias"}:
        return "its weight is pruned or otherwise computed"
    if not linear.weight.is_floating_point():
        return f"its weights are {linear.weight.dtype}, which no phantom layer approximates"
    if linear._modules or linear._buffers:
        return "it holds modules or buffers of its own"
    state_hooks = linear._state_dict_hooks or linear._load_state_dict_pre_hooks or linear._load_state_dict_post_hooks
    if has_forward_hooks(linear) or state_hooks or not runs_own_forward(linear):
        return "it has hooks, or a forward of its own"
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in linear.parameters()):
        return "its parameters have gradient hooks"
    return None


def runs_own_forward(module: nn.Module) -> bool:
    """Whether calling `module` runs the forward of its class, not one set on the instance."""
    return getattr(module.forward, "__func__", None) is type(module).forward


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether `module` has hooks around its forward or backward."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)
