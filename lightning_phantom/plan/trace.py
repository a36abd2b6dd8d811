"""One torch.fx trace of a module's forward: which linears hand values to which, and read the same one."""

from __future__ import annotations

import gc
import inspect
import operator
import random
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lightning_phantom.layers import across
from lightning_phantom.layers.dense import is_linear
from lightning_phantom.layers.elementwise import ANSWERS, TABLE, is_elementwise_module

_METHODS = frozenset(TABLE.values())
_OPERATORS = frozenset(
    getattr(operator, name) for name in _METHODS if name.startswith("__") and hasattr(operator, name)
)
# They connect linears, too: those of which `across` knows nothing at the price of an exchange.
_WHOLE = tuple(
    getattr(nn, name) for name in "LayerNorm RMSNorm GroupNorm BatchNorm1d BatchNorm2d SyncBatchNorm PReLU".split()
)


class Flow(NamedTuple):
    """One call of a linear.

    Attributes:
        name: of the linear, from the traced module.
        sources: the linears whose outputs its input is made from, by elementwise operations and norms alone.
        reads: what it reads; equal for those that read the same value.
        leaves: whether something else reads what is made from its output.
        enters: whether what it reads is whole tokens: a norm that needs them has made it.
        exits: whether what it is the last to write into goes back to whole tokens, for such a norm or for something
            else.
        gated: whether a gated linear unit has made what it reads, of one linear's output.
        normed: whether an operation that knows how features lie, such as a layer norm, has made what it reads.
        norms: the operations of that kind on what it is the last to write into: the numbers a token of each.
        parts: 2 where a gated linear unit reads what it writes.
    """

    name: str
    sources: tuple[str, ...]
    reads: object
    leaves: bool
    enters: bool
    exits: bool
    gated: bool
    normed: bool
    norms: tuple[int, ...]
    parts: int


def flows_of(module: nn.Module, linears: Collection[str]) -> list[Flow] | None:
    """The calls of `linears` in the forward of a module, in order; None where it cannot be traced.

    The forward runs once, on stand-ins for tensors; what it changes is put back.
    """
    graph = _graph_of(module, linears)
    return None if graph is None else _Walk(module, linears, graph).flows()


class _Value(NamedTuple):
    """What elementwise operations and norms have made of the outputs of `sources`; see `Flow`."""

    sources: tuple[str, ...] = ()
    whole: bool = False
    gated: bool = False
    normed: bool = False


class _Walk:
    """A walk along a graph, from what is read to what is made of it."""

    def __init__(self, module: nn.Module, linears: Collection[str], graph: fx.Graph) -> None:
        self._module, self._linears, self._graph = module, linears, graph
        self._answers: set[fx.Node] = set()  # shapes, types and numbers that come of them
        self._values: dict[fx.Node, _Value] = {}
        self._leaving: set[str] = set()
        self._exiting: set[str] = set()
        self._gates: set[str] = set()
        self._norms: dict[str, tuple[int, ...]] = defaultdict(tuple)
        for node in graph.nodes:
            self._pass(node)

    def flows(self) -> list[Flow]:
        """The calls of linears, in order."""
        return [self._flow(node) for node in self._graph.nodes if self._is_call(node) and node.all_input_nodes]

    def _flow(self, node: fx.Node) -> Flow:
        name, read = str(node.target), node.all_input_nodes[0]
        value = self._values.get(read, _Value())
        return Flow(
            name,
            value.sources,
            read,
            leaves=name in self._leaving,
            enters=value.whole,
            exits=name in self._exiting,
            gated=value.gated,
            normed=value.normed,
            norms=self._norms[name],
            parts=2 if name in self._gates else 1,
        )

    def _is_call(self, node: fx.Node) -> bool:
        return node.op == "call_module" and node.target in self._linears

    def _pass(self, node: fx.Node) -> None:
        reads = [read for read in node.all_input_nodes if read not in self._answers]
        if node.all_input_nodes and (not reads or _asks(node)):
            self._answers.add(node)
            return
        read = [self._values[each] for each in reads if each in self._values]
        made = self._made_by(node, reads)
        if made is None:
            self._leaving.update(name for value in read for name in value.sources)
        else:
            self._values[node] = made
        if made is None or made.whole:
            self._exiting.update(value.sources[-1] for value in read)

    def _made_by(self, node: fx.Node, reads: list[fx.Node]) -> _Value | None:
        """What a node makes of linears' outputs; None where it makes something else."""
        if self._is_call(node):
            return _Value((str(node.target),))
        if not _by_feature(node, self._module):
            return None
        read = [self._values.get(each, _Value()) for each in reads if not _goes_along(each, self._module)]
        if not read or not all(value.sources for value in read):
            return None
        sources = tuple(dict.fromkeys(name for value in read for name in value.sources))
        cuts, was_gated = _is_gate(node, self._module), any(value.gated for value in read)
        cannot_cut = cuts and (was_gated or len(sources) > 1)
        if cannot_cut or _needs_whole(node, self._module) or any(value.whole for value in read):
            return _Value(sources, whole=True)
        numbers = _numbers(node, self._module)
        self._norms[sources[-1]] += tuple(numbers)
        self._gates.update(sources if cuts else ())
        return _Value(sources, gated=cuts or was_gated, normed=bool(numbers) or any(value.normed for value in read))


def _graph_of(module: nn.Module, linears: Collection[str]) -> fx.Graph | None:
    """The forward as a graph: of the ways that its conditions on values could go, the one that calls the most linears.

    They go all one way, but for those that an error follows on: asserts hold.
    """
    graphs = []
    for usual in (False, True):
        answers: dict[object, bool] = {}
        for _ in range(_CONDITIONS):
            tracer = _Tracer(linears, usual, answers)
            try:
                with _untouched(module), _without_cycles():
                    graphs.append(tracer.trace(module, _defaults(module)))
                break
            except Exception:  # user code meets stand-ins here: anything can be raised
                last = next((place for place in reversed(tracer.asked) if place not in answers), None)
                if last is None:
                    break
                answers[last] = not usual
        if not tracer.asked:
            break
    return max(graphs, key=lambda graph: sum(node.target in linears for node in graph.nodes), default=None)


def _asks(node: fx.Node) -> bool:
    """Whether a node reads nothing of a value but its shape, type or place."""
    name = node.args[1] if node.target is getattr else node.target if node.op == "call_method" else ""
    question = getattr(Tensor, str(name), None)
    return question in ANSWERS or getattr(question, "__get__", None) in ANSWERS


def _by_feature(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        return _is_by_feature(root.get_submodule(str(node.target)))
    known = (_METHODS,) if node.op == "call_method" else (TABLE, across.NORMS, _OPERATORS)
    return any(node.target in table for table in known) or _takes_parts(node)


def _goes_along(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node is a parameter of the module's own with one number, or one a feature."""
    if node.op != "get_attr":
        return False
    owner, _, name = str(node.target).rpartition(".")
    value = getattr(root.get_submodule(owner), name, None)
    return isinstance(value, nn.Parameter) and value.numel() == (value.shape[-1] if value.dim() else 1)


def _needs_whole(node: fx.Node, root: nn.Module) -> bool:
    if node.op != "call_module":
        return False
    inner = root.get_submodule(str(node.target)).modules()
    return any(isinstance(m, _WHOLE) and not across.operation_of(m) for m in inner)


def _takes_parts(node: fx.Node) -> bool:
    """Whether a node cuts a gate off what it gates, in the forward itself, or is one of the two."""
    given = (*node.args[1:], *node.kwargs.values())
    if node.target is operator.getitem:
        return _takes_parts(node.all_input_nodes[0])
    return given in ((), (-1,)) if node.target is F.glu else node.target in ("chunk", torch.chunk) and given == (2, -1)


def _is_gate(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node cuts a gate off what it gates."""
    if node.op != "call_module":
        return node.target is not operator.getitem and _takes_parts(node)
    return any(isinstance(m, nn.GLU) for m in root.get_submodule(str(node.target)).modules())


def _numbers(node: fx.Node, root: nn.Module) -> list[int]:
    """How many numbers a token each operation of a node that knows how features lie exchanges."""
    if node.op == "call_function":
        return [across.NORMS[node.target].numbers] if node.target in across.NORMS else []
    if node.op != "call_module":
        return []
    found = map(across.operation_of, root.get_submodule(str(node.target)).modules())
    return [operation.numbers for operation in found if operation]


def _is_by_feature(module: nn.Module) -> bool:
    """Whether it is an activation function, by its type or its name, a norm, or a sequence of such."""
    if type(module) is nn.Sequential:
        return all(map(_is_by_feature, module))
    names_itself = type(module).__name__.lower().endswith(("activation", "gelu", "relu", "silu"))
    is_known = is_elementwise_module(module) or isinstance(module, (*_WHOLE, nn.GLU))
    return is_known or (names_itself and not _holds_weights(module))


def _holds_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


_CONDITIONS = 16  # that a forward may have, to be tried the other way
_OF_THE_TRACE = (__file__, fx.proxy.__file__, fx._symbolic_trace.__file__)


class _Tracer(fx.Tracer):
    """Looks into modules that hold linears, and into no other.

    Attributes:
        asked: where the conditions on values stood.
    """

    def __init__(self, linears: Collection[str], usual: bool, answers: Mapping[object, bool]) -> None:
        super().__init__()
        self._linears, self._usual, self._answers = linears, usual, answers
        self.asked: list[object] = []

    def to_bool(self, obj: fx.Proxy) -> bool:
        frame = inspect.currentframe()
        while frame is not None and frame.f_code.co_filename in _OF_THE_TRACE:
            frame = frame.f_back
        assert frame is not None
        place = frame.f_code, frame.f_lasti
        self.asked.append(place)
        return self._answers.get(place, self._usual)

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
