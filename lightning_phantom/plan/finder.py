"""Decides, without touching anything, what happens to each linear of a module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from lightning_phantom.config import Config, PhantomConfig, TensorParallelConfig
from lightning_phantom.cost.count import phantom_weights
from lightning_phantom.errors import PlanError
from lightning_phantom.layers.dense import features, is_conv1d, is_linear
from lightning_phantom.layers.split import SplitLinear
from lightning_phantom.plan.others import others
from lightning_phantom.plan.record import Plan, PlannedLayer
from lightning_phantom.plan.structure import FFN, Group, alone, elsewhere, find_ffns, unpaired
from lightning_phantom.plan.unfit import unfit


def plan_phantom(module: nn.Module, config: PhantomConfig) -> Plan:
    """List every linear of `module`, what happens to it under `config`, and why. Changes nothing.

    Without a plan of the user's own, the linears of feed-forward networks (FFNs) are swapped where phantom makes them
    smaller: those that a Hugging Face model's own tensor parallel plan names, that a trace of a forward finds connected
    by elementwise operations and norms, or that stand one after the other as d -> h and h -> d, gated or not. `"skip"`
    is the decision for the others. With a plan of the user's own, the linears that it names are swapped, and no other.

    Args:
        module: any module, on any device.
        config: what to swap and how.

    Raises:
        PlanError: the user's plan names what is not there or cannot be swapped.

    Examples:
        >>> print(plan_phantom(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), PhantomConfig(num_blocks=2)))
        Phantom plan: ...
    """
    return _make_plan(module, config)


def plan_tensor_parallel(module: nn.Module, config: TensorParallelConfig) -> Plan:
    """List every linear of `module`, and what tensor parallelism does to it: `plan_phantom` for the exact layers.

    The linears are found alike. What phantom would not make smaller is swapped, too.

    Raises:
        PlanError: the user's plan names what is not there or cannot be swapped.
    """
    return _make_plan(module, config)


def _make_plan(module: nn.Module, config: Config) -> Plan:
    linears = {name: m for name, m in module.named_modules() if is_linear(m)}
    new = {name: m for name, m in linears.items() if not isinstance(m, SplitLinear)}
    words = _resolve_words(config.plan, linears, module)
    reasons = unfit(module, new)
    obstacles = {name: reasons.get(name) or _indivisible(m, config) for name, m in new.items()}

    if config.plan is None:
        for name, part in elsewhere(module).items():
            obstacles[name] = obstacles.get(name) or part
        obstacles = {name: obstacles[name] or _no_gain(m, config) for name, m in new.items()}
        available = [name for name, why in obstacles.items() if why is None]
        ffns = find_ffns(module, available)
    else:
        available = [name for name in new if words.get(name, "skip") != "skip"]
        refused = [f"  {name}: {obstacles[name]}" for name in available if obstacles[name]]
        if refused:
            raise PlanError("\n".join(["the plan names layers that cannot be swapped; skip them:", *refused]))
        ffns = find_ffns(module, available)
        found = {name for ffn in ffns for name in ffn.names}
        ffns += [alone(name) for name in available if name not in found]
    places = {name: (ffn, group) for ffn in ffns for group in ffn.groups for name in group.names}
    unpaired_for = unpaired(module, available)

    layers = []
    for name, linear in linears.items():
        if isinstance(linear, SplitLinear):
            layers.append(_describe(name, linear, config, "skip", f"is a {linear.kind} layer already"))
        elif name in places:
            ffn, group = places[name]
            reason = f"FFN: {ffn.known_by}" if config.plan is None else "named in the plan"
            decision = config.decision(group.depth)
            before = _predecessor(ffn, group)
            planned = _describe(
                name, linear, config, decision, reason, _no_gain(linear, config) or "", before, linears.get(before)
            )
            divides = planned.out_features % (group.parts * config.parts) == 0
            layers.append(replace(planned, parts=group.parts if divides else 1))
        elif config.plan is not None:
            reason = "skipped by the plan" if name in words else "not named in the plan"
            layers.append(_describe(name, linear, config, "skip", reason))
        else:
            layers.append(_describe(name, linear, config, "skip", obstacles[name] or unpaired_for[name]))
    return Plan(config, tuple(layers), tuple(ffns), tuple(others(module)))


def _resolve_words(
    plan: Mapping[str, str] | None, linears: Mapping[str, nn.Module], module: nn.Module
) -> dict[str, str]:
    """The plan's word for each linear it names, by any of its names; later entries win."""
    first = {id(m): name for name, m in linears.items()}
    modules = dict(module.named_modules(remove_duplicate=False))
    words: dict[str, str] = {}
    for glob, word in (plan or {}).items():
        found = {name: m for name, m in modules.items() if fnmatchcase(name, glob)}
        matched = {first[id(m)]: word for m in found.values() if id(m) in first}
        if not matched:
            others = [f"{name!r} ({type(m).__name__})" for name, m in found.items()]
            what = f"matches {others[0]}, which is no linear layer" if others else "matches no module"
            names = ", ".join(map(repr, list(linears)[:8])) + (", ..." if len(linears) > 8 else "")
            raise PlanError(f"plan entry {glob!r}: {word!r} {what}. The linear layers here are: {names or 'none'}.")
        words.update(matched)
    return words


def _predecessor(ffn: FFN, group: Group) -> str:
    """The layer whose latents a group reads where it is to read another's; empty if there is none.

    A pair of linears, as in a transformer, reads its own: there it was no gain.
    """
    is_pair = max(each.depth for each in ffn.groups) < 2
    return "" if is_pair else group.after or ""


def _describe(
    name: str,
    linear: nn.Module,
    config: Config,
    decision: str,
    reason: str,
    warning: str = "",
    predecessor: str = "",
    before: nn.Module | None = None,
) -> PlannedLayer:
    sizes = features(linear)
    bias = linear.bias is not None
    dense = math.prod(sizes) + bias * sizes[1]
    k, latents, after = None, "own", dense
    if isinstance(linear, SplitLinear):
        k, after = linear.record().get("phantom_width"), linear.global_size()
    elif decision != "skip" and (k := config.width_of(*sizes)) is not None:
        in_before = width_before = 0
        if before is not None:
            latents = config.latents
            in_before = features(before)[0] if latents == "previous" else 0
            width_before = (config.width_of(*features(before)) or 0) if latents == "both" else 0
        after = phantom_weights(*sizes, config.parts, k, bias, config.mixing, in_before, width_before)
        if config.latents != "own":
            reason = f"{reason}; {_READS[latents].format(predecessor)}"
    transposed = is_conv1d(type(linear))
    return PlannedLayer(
        *(name, *sizes, bias, transposed, decision, reason, k, dense, after, warning),
        latents=latents,
        predecessor=predecessor if latents != "own" else "",
    )


_READS = {
    "own": "reads its own latents",
    "both": "reads its own latents and those of {!r}",
    "previous": "reads latents of what {!r} reads",
}


def _indivisible(linear: nn.Module, config: Config) -> str | None:
    sizes = features(linear)
    if any(size % config.parts or not size for size in sizes):
        return f"{sizes[0]} -> {sizes[1]} features do not divide into {config.parts_name}={config.parts}"
    return None


def _no_gain(linear: nn.Module, config: Config) -> str | None:
    sizes = features(linear)
    k = config.width_of(*sizes)
    if k is None or phantom_weights(*sizes, config.parts, k, False, config.mixing) < math.prod(sizes):
        return None
    return f"phantom would not make it smaller at k={k}"
