"""Finds the feed-forward linears of a module and decides, without touching anything, what happens to each."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from lightning_phantom.config import Config, PhantomConfig, TensorParallelConfig
from lightning_phantom.cost.count import phantom_weights
from lightning_phantom.errors import PlanError
from lightning_phantom.layers.chain import runs_own_forward
from lightning_phantom.layers.dense import features, is_conv1d, is_linear
from lightning_phantom.layers.phantom import PhantomLinear
from lightning_phantom.layers.split import SplitLinear
from lightning_phantom.plan.declared import declared_chains, declared_words, left_exact
from lightning_phantom.plan.proof import Traces
from lightning_phantom.plan.record import EXACT_WORDS, WORDS, Plan, PlannedLayer, ProvenChain
from lightning_phantom.plan.tracing import has_forward_hooks

# Modules that read the weights of their linears themselves, in fused kernels.
_READS_WEIGHTS = (nn.MultiheadAttention,)


def plan_phantom(module: nn.Module, config: PhantomConfig) -> Plan:
    """List every linear of `module`, what happens to it under `config`, and why. Changes nothing.

    Without a plan of the user's own, a linear is swapped when it lies in a proven chain of two or more and phantom
    makes it smaller; `"skip"` is the decision for the others. A model's own tensor parallel plan (Hugging Face's models
    have one) stands in for the proof of a feed-forward block that cannot be traced. With a plan of the user's own, the
    linears that it names are swapped.

    Args:
        module: any module, on any device (weights are not read).
        config: what to swap and how.

    Raises:
        PlanError: the user's plan names what is not there or cannot be swapped, or a layout that is not proven.

    Example:
        >>> print(plan_phantom(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), PhantomConfig(num_blocks=2)))
        Phantom plan: ...
    """
    return _make_plan(module, config)


def plan_tensor_parallel(module: nn.Module, config: TensorParallelConfig) -> Plan:
    """List every linear of `module`, and what tensor parallelism does to it: `plan_phantom` for the exact layers.

    The linears are found alike. What phantom would not make smaller is swapped, too.

    Raises:
        PlanError: the user's plan names what is not there or cannot be swapped, or a layout that is not proven.
    """
    plan = _make_plan(module, config)
    styled = {name: both for c in plan.chains for name, both in c.layouts(plan.replicated(c)).items()}
    layers = [
        replace(layer, decision=EXACT_WORDS[styled.get(layer.name, layer.layouts)]) if layer.swapped else layer
        for layer in plan.layers
    ]
    return replace(plan, layers=tuple(layers))


def _make_plan(module: nn.Module, config: Config) -> Plan:
    linears = {name: m for name, m in module.named_modules() if is_linear(m)}
    new = {name: m for name, m in linears.items() if not isinstance(m, SplitLinear)}
    words = _resolve_words(config.plan, linears, module)
    traces = Traces(module)
    unfit = _unfit(module, new, traces)
    obstacles = {name: unfit.get(name) or _indivisible(m, config) for name, m in new.items()}

    if config.plan is None:
        obstacles = {name: why or _no_gain(new[name], config) for name, why in obstacles.items()}
        available = [name for name, why in obstacles.items() if why is None]
    else:
        available = [name for name in new if words.get(name, "skip") != "skip"]
        refused = [f"  {name}: {obstacles[name]}" for name in available if obstacles[name]]
        if refused:
            raise PlanError("\n".join(["the plan names layers that cannot be swapped; skip them:", *refused]))

    chains, unproven = traces.chains(available)
    declared = declared_words(module, new)
    if config.plan is None:
        proven = {name for chain in chains for name in chain.members}
        chains += declared_chains(module, declared, set(available) - proven, traces)
    layouts = {name: ("replicated", "replicated") for name in available if config.plan is not None}
    for chain in chains:
        layouts.update(chain.layouts())
    chain_of = {name: chain for chain in chains for name in chain.members}

    def why_in_no_chain(name: str) -> str:
        return unproven.get(name) or traces.why_untraced(name)

    if config.plan is not None:
        _check_layouts(words, layouts, why_in_no_chain)

    layers = []
    for name, linear in linears.items():
        if isinstance(linear, SplitLinear):
            kind = "phantom" if isinstance(linear, PhantomLinear) else "tensor-parallel"
            layers.append(_describe(name, linear, config, None, f"is a {kind} layer already"))
        elif name in layouts:
            reason = _why_swapped(chain_of.get(name), declared.get(name), traces)
            if no_gain := _no_gain(linear, config):
                reason = f"{reason}; warning: {no_gain}"
            layers.append(_describe(name, linear, config, layouts[name], reason))
        elif config.plan is not None:
            reason = "skipped by the plan" if name in words else "not named in the plan"
            layers.append(_describe(name, linear, config, None, reason))
        else:
            exact = left_exact(declared[name], unproven.get(name)) if name in declared else None
            reason = obstacles[name] or exact or f"no proven chain: {why_in_no_chain(name)}"
            layers.append(_describe(name, linear, config, None, reason))
    return Plan(config, tuple(layers), tuple(chains))


def _why_swapped(chain: ProvenChain | None, declared: str | None, traces: Traces) -> str:
    if chain is None:
        return "named in the plan"
    where = f"chain in {chain.owner or 'the root module'}"
    if chain.owner in traces.untraceable:
        return f"{where}, not traced ({traces.untraceable[chain.owner]}) but declared by the model's own TP plan"
    return f"{where}, traced" if declared else where


def _resolve_words(
    plan: Mapping[str, str] | None, linears: Mapping[str, nn.Module], module: nn.Module
) -> dict[str, str]:
    """The plan's word for each linear it names; later entries win."""
    words: dict[str, str] = {}
    for glob, word in (plan or {}).items():
        matched = [name for name in linears if fnmatchcase(name, glob)]
        if not matched:
            others = [f"{name!r} ({type(m).__name__})" for name, m in module.named_modules() if fnmatchcase(name, glob)]
            what = f"matches {others[0]}, which is no linear layer" if others else "matches no module"
            names = ", ".join(map(repr, list(linears)[:8])) + (", ..." if len(linears) > 8 else "")
            raise PlanError(f"plan entry {glob!r}: {word!r} {what}. The linear layers here are: {names or 'none'}.")
        words.update(dict.fromkeys(matched, word))
    return words


def _check_layouts(words: Mapping[str, str], layouts: Mapping[str, tuple[str, str]], why: Any) -> None:
    """Raise PlanError where the user names a layout that differs from the proven one."""
    for name, proven in layouts.items():
        if words[name] not in ("phantom", WORDS[proven]):
            raise PlanError(
                f"plan entry {name!r}: {words[name]!r} is not proven; what is proven is {WORDS[proven]!r} (input "
                f"{proven[0]}, output {proven[1]}). "
                + (f"Reason: {why(name)}. " if proven == ("replicated", "replicated") else "")
                + "Name it 'phantom' to get the best proven layout."
            )


def _describe(
    name: str, linear: nn.Module, config: Config, layouts: tuple[str, str] | None, reason: str
) -> PlannedLayer:
    sizes = features(linear)
    bias = linear.bias is not None
    before = math.prod(sizes) + bias * sizes[1]
    decision, k, blocks = "skip", None, config.parts
    if isinstance(linear, PhantomLinear):
        k, blocks = linear.phantom_width, linear.num_blocks
    elif layouts is not None:
        decision, k = WORDS[layouts], config.width_of(*sizes)
    after = before if k is None else phantom_weights(*sizes, blocks, k, bias)
    return PlannedLayer(name, *sizes, bias, is_conv1d(type(linear)), decision, reason, k, before, after)


def _indivisible(linear: nn.Module, config: Config) -> str | None:
    sizes = features(linear)
    if any(size % config.parts or not size for size in sizes):
        return f"{sizes[0]} -> {sizes[1]} features do not divide into {config.parts_name}={config.parts}"
    return None


def _no_gain(linear: nn.Module, config: Config) -> str | None:
    sizes = features(linear)
    k = config.width_of(*sizes)
    if k is None or phantom_weights(*sizes, config.parts, k, False) < math.prod(sizes):
        return None
    return f"phantom would not make it smaller at k={k}"


def _unfit(module: nn.Module, linears: Mapping[str, nn.Module], traces: Traces) -> dict[str, str]:
    """Why a linear cannot be swapped whatever the sizes."""
    users: dict[int, list[str]] = defaultdict(list)
    for name, m in module.named_modules():
        for parameter in m._parameters.values():
            if parameter is not None:
                users[_memory(parameter)].append(name)
    paths = Counter(id(m) for _, m in module.named_modules(remove_duplicate=False))
    readers = {n: type(m).__name__ for n, m in module.named_modules() if isinstance(m, _READS_WEIGHTS)}
    unfit = {}
    for name, linear in linears.items():
        reader = next((n for n in readers if name.startswith(f"{n}." if n else "")), None)
        if reader is not None:
            unfit[name] = f"its weight is read by {readers[reader]} {reader!r} itself"
        elif name in traces.read_directly:
            unfit[name] = (
                f"its weight is read by the forward of {traces.read_directly[name] or 'the root module'!r} itself"
            )
        elif not name:
            unfit[name] = "it is the module itself, which nothing can be put in the place of; wrap it in nn.Sequential"
        elif why := _unusual(linear):
            unfit[name] = why
        elif paths[id(linear)] > 1 or any(len(users[_memory(p)]) > 1 for p in linear.parameters()):
            others = [repr(n) for p in linear.parameters() for n in users[_memory(p)] if n != name]
            unfit[name] = (
                f"its weights are tied to those of {others[0]}" if others else "it is tied: used in two places"
            )
    return unfit


def _memory(parameter: nn.Parameter) -> int:
    """What two parameters share when they are tied, be it as one object or as views of one memory."""
    plain = type(parameter) is nn.Parameter and not parameter.is_meta
    return (plain and parameter.untyped_storage().data_ptr()) or id(parameter)


def _unusual(linear: Any) -> str | None:
    if parametrize.is_parametrized(linear):
        return "it is parametrised"
    if type(linear) is not nn.Linear and not is_conv1d(type(linear)):
        return f"{type(linear).__name__} is not nn.Linear itself"
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
