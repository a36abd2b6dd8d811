"""Finds the feed-forward linears of a module and decides, without touching anything, what happens to each."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from lightning_phantom.chain import runs_own_forward
from lightning_phantom.config import PhantomConfig, TensorParallelConfig, resolve_phantom_width
from lightning_phantom.cost import Layer, phantom_weights
from lightning_phantom.errors import PlanError
from lightning_phantom.layers import PhantomLinear
from lightning_phantom.proof import ProvenChain, Traces, has_forward_hooks
from lightning_phantom.split import SplitLinear

# Modules that read the weights of their linears themselves, in fused kernels.
_READS_WEIGHTS = (nn.MultiheadAttention,)
_WORDS = {
    ("replicated", "sharded"): "colwise",
    ("sharded", "replicated"): "rowwise",
    ("sharded", "sharded"): "sharded",
    ("replicated", "replicated"): "phantom",
}
_EXACT_WORDS = {**_WORDS, ("replicated", "replicated"): "gathered"}
Config = PhantomConfig | TensorParallelConfig


@dataclass(frozen=True)
class PlannedLayer:
    """What happens to one linear, and why.

    Attributes:
        name: full name of the module.
        in_features: its input width.
        out_features: its output width.
        bias: whether it has one.
        decision: `"colwise"`, `"sharded"`, `"rowwise"`, `"phantom"` or, in a tensor-parallel plan, `"gathered"` (both
            replicated at both ends), or `"skip"` when it stays as it is.
        reason: why, in words.
        phantom_width: k, resolved for this layer; None when it stays dense.
        weights_before: parameters of the dense layer.
        weights_after: parameters after the swap, all ranks together.
    """

    name: str
    in_features: int
    out_features: int
    bias: bool
    decision: str
    reason: str
    phantom_width: int | None
    weights_before: int
    weights_after: int

    @property
    def swapped(self) -> bool:
        """Whether the layer is replaced."""
        return self.decision != "skip"

    @property
    def layouts(self) -> tuple[str, str]:
        """Input and output layout of a swapped layer."""
        words = (*_WORDS.items(), *_EXACT_WORDS.items())
        return next(layouts for layouts, word in words if word == self.decision)


@dataclass(frozen=True)
class Plan:
    """What `phantomize_`, or a strategy, would do to a module; `print(plan)` shows it as a table.

    Attributes:
        config: the request it answers.
        layers: every linear of the module, in `named_modules` order.
        chains: the proven chains among the swapped ones.
    """

    config: Config
    layers: tuple[PlannedLayer, ...]
    chains: tuple[ProvenChain, ...]

    @property
    def swapped(self) -> tuple[PlannedLayer, ...]:
        """The layers that are replaced."""
        return tuple(layer for layer in self.layers if layer.swapped)

    def replicated(self, chain: ProvenChain) -> frozenset[int]:
        """The values inside a chain that every rank holds whole: none, but in Megatron's pairs."""
        return chain.between_pairs() if self._in_pairs else frozenset()

    def siblings(self, chain: ProvenChain) -> tuple[tuple[str, ...], ...]:
        """The groups of a chain's members that share their collectives."""
        return chain.siblings_in_pairs() if self._in_pairs else chain.siblings

    @property
    def _in_pairs(self) -> bool:
        return isinstance(self.config, TensorParallelConfig) and self.config.style == "megatron"

    def cost_layers(self) -> list[Layer]:
        """The swapped layers as `estimate_cost` takes them: chain by chain in forward order, then the lone ones."""
        by_name = {layer.name: layer for layer in self.swapped}
        riders = {name for chain in self.chains for group in chain.siblings for name in group[1:]}
        pair_riders = {name for chain in self.chains for group in chain.siblings_in_pairs() for name in group[1:]}
        layouts = {name: both for chain in self.chains for name, both in chain.layouts().items()}
        pairs = {name: both for chain in self.chains for name, both in chain.layouts(chain.between_pairs()).items()}
        lone = ("replicated", "replicated")
        return [
            Layer(
                by_name[name].in_features,
                by_name[name].out_features,
                by_name[name].bias,
                *layouts.get(name, lone),
                shares_input=name in riders,
                phantom_width=by_name[name].phantom_width,
                in_pairs=(*pairs.get(name, lone), name in pair_riders),
            )
            for name in dict.fromkeys([*layouts, *by_name])
        ]

    def __rich__(self) -> Any:
        """Render the plan as a rich table."""
        from rich.table import Table

        linears = f"{len(self.swapped)} of {len(self.layers)} linears"
        if isinstance(self.config, TensorParallelConfig):
            title = f"Tensor-parallel plan: {linears}, num_ranks={self.config.num_ranks}, style={self.config.style}"
        else:
            title = f"Phantom plan: {linears}, num_blocks={self.config.num_blocks}"
        table = Table(title=title, title_justify="left")
        for column in ("linear", "in", "out", "decision", "k", "weights before", "after"):
            table.add_column(column, justify="left" if column in ("linear", "decision") else "right", no_wrap=True)
        table.add_column("reason", overflow="fold")
        for layer in self.layers:
            table.add_row(
                layer.name,
                str(layer.in_features),
                str(layer.out_features),
                layer.decision,
                "-" if layer.phantom_width is None else str(layer.phantom_width),
                f"{layer.weights_before:,}",
                f"{layer.weights_after:,}",
                layer.reason,
            )
        table.add_section()
        before = sum(layer.weights_before for layer in self.layers)
        after = sum(layer.weights_after for layer in self.layers)
        table.add_row(
            "all linears", "", "", "", "", f"{before:,}", f"{after:,}", f"{after / max(before, 1):.3f} of dense"
        )
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=140)
        console.print(self)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def plan_phantom(module: nn.Module, config: PhantomConfig) -> Plan:
    """List every linear of `module`, what happens to it under `config`, and why. Changes nothing.

    Without a plan of the user's own, a linear is swapped when it lies in a proven chain of two or more and phantom
    makes it smaller; `"skip"` is the decision for the others. With one, the linears that it names are swapped.

    Raises:
        PlanError: the user's plan names what is not there or cannot be swapped, or a layout that is not proven.
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
        replace(layer, decision=_EXACT_WORDS[styled.get(layer.name, layer.layouts)]) if layer.swapped else layer
        for layer in plan.layers
    ]
    return replace(plan, layers=tuple(layers))


def _make_plan(module: nn.Module, config: Config) -> Plan:
    linears = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
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
    layouts = {name: ("replicated", "replicated") for name in available if config.plan is not None}
    for chain in chains:
        layouts.update(chain.layouts())
    owners = {name: chain.owner for chain in chains for name in chain.members}

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
            owner = owners.get(name)
            reason = f"chain in {owner or 'the root module'}" if owner is not None else "named in the plan"
            if no_gain := _no_gain(linear, config):
                reason = f"{reason}; warning: {no_gain}"
            layers.append(_describe(name, linear, config, layouts[name], reason))
        elif config.plan is not None:
            reason = "skipped by the plan" if name in words else "not named in the plan"
            layers.append(_describe(name, linear, config, None, reason))
        else:
            reason = obstacles[name] or f"no proven chain: {why_in_no_chain(name)}"
            layers.append(_describe(name, linear, config, None, reason))
    return Plan(config, tuple(layers), tuple(chains))


def _resolve_words(
    plan: Mapping[str, str] | None, linears: Mapping[str, nn.Linear], module: nn.Module
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
        if words[name] not in ("phantom", _WORDS[proven]):
            raise PlanError(
                f"plan entry {name!r}: {words[name]!r} is not proven; what is proven is {_WORDS[proven]!r} (input "
                f"{proven[0]}, output {proven[1]}). "
                + (f"Reason: {why(name)}. " if proven == ("replicated", "replicated") else "")
                + "Name it 'phantom' to get the best proven layout."
            )


def _describe(
    name: str, linear: nn.Linear, config: Config, layouts: tuple[str, str] | None, reason: str
) -> PlannedLayer:
    sizes = (linear.in_features, linear.out_features)
    bias = linear.bias is not None
    before = linear.in_features * linear.out_features + bias * linear.out_features
    if isinstance(linear, PhantomLinear):
        k = linear.phantom_width
        after = phantom_weights(*sizes, linear.num_blocks, k, bias)
        return PlannedLayer(name, *sizes, bias, "skip", reason, k, before, after)
    decision = "skip" if layouts is None else _WORDS[layouts]
    if layouts is None or isinstance(config, TensorParallelConfig):
        return PlannedLayer(name, *sizes, bias, decision, reason, None, before, before)
    k = resolve_phantom_width(config.phantom_width, *sizes, config.num_blocks)
    after = phantom_weights(*sizes, config.num_blocks, k, bias)
    return PlannedLayer(name, *sizes, bias, decision, reason, k, before, after)


def _indivisible(linear: nn.Linear, config: Config) -> str | None:
    if isinstance(config, TensorParallelConfig):
        parts, into = config.num_ranks, f"between {config.num_ranks} ranks"
    else:
        parts, into = config.num_blocks, f"into num_blocks={config.num_blocks}"
    if any(size % parts or not size for size in (linear.in_features, linear.out_features)):
        return f"{linear.in_features} -> {linear.out_features} features do not divide {into}"
    return None


def _no_gain(linear: nn.Linear, config: Config) -> str | None:
    if isinstance(config, TensorParallelConfig):
        return None
    sizes = (linear.in_features, linear.out_features)
    k = resolve_phantom_width(config.phantom_width, *sizes, config.num_blocks)
    if phantom_weights(*sizes, config.num_blocks, k, False) < linear.in_features * linear.out_features:
        return None
    return f"phantom would not make it smaller at k={k}"


def _unfit(module: nn.Module, linears: Mapping[str, nn.Linear], traces: Traces) -> dict[str, str]:
    """Why a linear cannot be swapped whatever the sizes."""
    uses = Counter(_memory(p) for m in module.modules() for p in m._parameters.values() if p is not None)
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
        elif paths[id(linear)] > 1 or any(uses[_memory(p)] > 1 for p in linear.parameters()):
            unfit[name] = "its weights are tied to another module's"
    return unfit


def _memory(parameter: nn.Parameter) -> int:
    """What two parameters share when they are tied, be it as one object or as views of one memory."""
    plain = type(parameter) is nn.Parameter and not parameter.is_meta
    return (plain and parameter.untyped_storage().data_ptr()) or id(parameter)


def _unusual(linear: nn.Linear) -> str | None:
    if parametrize.is_parametrized(linear):
        return "it is parametrised"
    if type(linear) is not nn.Linear:
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
