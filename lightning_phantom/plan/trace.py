"""One torch.fx trace of a module's forward: which linears hand values to which, and read the same one."""

from __future__ import annotations

import gc
import inspect
import random
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from lightning_phantom.layers.dense import is_linear
from lightning_phantom.layers.elementwise import TABLE, is_elementwise_module

_METHODS = frozenset(TABLE.values())
_OPERATORS = frozenset("add sub mul truediv pow neg abs floordiv mod pos".split())
_NORMS = tuple(
    getattr(nn, name)
    for name in "LayerNorm RMSNorm GroupNorm BatchNorm1d BatchNorm2d SyncBatchNorm PReLU GLU".split()
    if hasattr(nn, name)
)


class Flow(NamedTuple):
    """One call of a linear.

    Attributes:
        name: of the linear, from the traced module.
        sources: the linears whose outputs its input is made from, by elementwise operations and norms alone.
        depth: how many linears lie before it, on the longest way.
        reads: what it reads; equal for those that read the same value.
        enters: whether that is whole tokens: from outside the linears, or out of a norm.
        leaves: whether something else reads what is made from its output.
        exits: whether what it is the last to write into goes back to whole tokens, for something else or for a norm.
        in_pairs: `enters` and `exits` where linears of odd depth write whole tokens, as in Megatron's pairs.
    """

    name: str
    sources: tuple[str, ...]
    depth: int
    reads: object
    enters: bool
    leaves: bool
    exits: bool
    in_pairs: tuple[bool, bool]


class _Layout:
    """Which values are whole tokens, and which linears write into those that go back to them."""

    def __init__(self) -> None:
        self.whole: set[fx.Node] = set()
        self.exiting: set[str] = set()

    def place(self, node: fx.Node, sources: Mapping[fx.Node, tuple[str, ...]], reads_whole: bool) -> None:
        """Note what an operation makes, and what it does to what it reads."""
        read = node.all_input_nodes
        if reads_whole or any(r in self.whole for r in read):
            self.whole.add(node)
            self.exiting.update(sources[r][-1] for r in read if r in sources and r not in self.whole)


def flows_of(module: nn.Module, linears: Collection[str]) -> list[Flow] | None:
    """The calls of `linears` in the forward of a module, in order; None where it cannot be traced.

    The forward runs once, on stand-ins for tensors; what it changes is put back.
    """
    try:
        with _untouched(module), _without_cycles():
            graph = _Tracer(linears).trace(module, _defaults(module))
    except Exception:  # user code meets stand-ins here: anything can be raised
        return None
    sources: dict[fx.Node, tuple[str, ...]] = {}
    depth: dict[str, int] = {}
    calls: list[tuple[str, fx.Node]] = []
    leaving: set[str] = set()
    inside, in_pairs = _Layout(), _Layout()
    for node in graph.nodes:
        read = node.all_input_nodes
        if node.op == "call_module" and node.target in linears:
            name = str(node.target)
            depth[name] = max((depth[s] + 1 for r in read for s in sources.get(r, ())), default=0)
            sources[node] = (name,)
            calls += [(name, r) for r in read[:1]]
            if depth[name] % 2:
                in_pairs.whole.add(node)
            continue
        if read and all(r in sources for r in read) and _connects(node, module):
            sources[node] = tuple(dict.fromkeys(name for r in read for name in sources[r]))
        else:
            leaving.update(name for r in read for name in sources.get(r, ()))
        for layout in (inside, in_pairs):
            layout.place(node, sources, node not in sources or _is_norm(node, module))
    return [
        Flow(
            name,
            sources.get(reads, ()),
            depth[name],
            reads,
            reads in inside.whole,
            name in leaving,
            name in inside.exiting,
            (reads in in_pairs.whole, name in in_pairs.exiting),
        )
        for name, reads in calls
    ]


def _is_norm(node: fx.Node, root: nn.Module) -> bool:
    return node.op == "call_module" and isinstance(root.get_submodule(str(node.target)), _NORMS)


def _connects(node: fx.Node, root: nn.Module) -> bool:
    """Whether linears before and after it are of one FFN: a norm, or an operation that treats every feature alone."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return is_elementwise_module(module) or _is_norm(node, root) or _is_activation(module)
    name = getattr(node.target, "__name__", str(node.target))
    if node.op == "call_method":
        return name in _METHODS
    return node.op == "call_function" and (node.target in TABLE or name in _OPERATORS)


def _is_activation(module: nn.Module) -> bool:
    """Whether it is an activation function, by its name: it holds nothing."""
    return type(module).__name__.lower().endswith(("activation", "gelu", "relu", "silu")) and not list(
        module.parameters()
    )


class _Tracer(fx.Tracer):
    """Looks into modules that hold linears, and into no other."""

    def __init__(self, linears: Collection[str]) -> None:
        super().__init__()
        self._linears = linears

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_linear(m) or not any(name.startswith(f"{module_qualified_name}.") for name in self._linears)


def _defaults(module: nn.Module) -> dict[str, Any]:
    """Optional arguments, as a call leaves them."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


@contextmanager
def _without_cycles() -> Iterator[None]:
    """Free what is left in cycles, as by fx where a forward unpacks a value: the frames of all its callers."""
    enabled = gc.isenabled()
    gc.disable()  # so that all that is made here stays young, and is all that is looked at
    try:
        yield
    finally:
        gc.collect(0)
        if enabled:
            gc.enable()


@contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Undo what a traced forward leaves behind: attributes it sets, lists it appends to, numbers it draws."""
    attributes = [vars(m) for m in module.modules()]
    kept: list[tuple[Any, Any]] = [(a, dict(a)) for a in attributes]
    kept += [(v, v.copy()) for a in attributes for v in a.values() if type(v) in (dict, list, set)]
    random_state, python_state = torch.get_rng_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(random_state)
        random.setstate(python_state)
        for changed, before in kept:
            changed.clear()
            (changed.extend if type(changed) is list else changed.update)(before)
