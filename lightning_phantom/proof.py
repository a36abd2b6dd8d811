"""Proves where a forward hands activations from linear to linear element by element, by torch.fx.

Such a stretch, a *chain*, computes the same when every rank holds only its own features of each value inside it: each
operation there treats every feature alone, and every value is read by nothing outside it. What is proven is the forward
of one module, the *owner*, traced in train and in eval mode, with and without gradients, with its optional arguments
given and left out; what differs between these traces, or cannot be traced, is not proven.
"""

from __future__ import annotations

import inspect
import itertools
import operator
import random
import weakref
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from lightning_phantom.chain import Chain, runs_own_forward
from lightning_phantom.fused import BLOCKS

# Parameter-free and elementwise, by exact type: a subclass may do anything. PReLU is missing on purpose (its weight
# would get a partial gradient), and so is every dropout but nn.Dropout (its mask can be drawn block by block).
ELEMENTWISE_MODULES = frozenset(
    getattr(nn, name)
    for name in (
        "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish ReLU ReLU6 SELU "
        "Sigmoid SiLU Softplus Softshrink Softsign Tanh Tanhshrink Threshold Dropout"
    ).split()
)
_NAMES = (
    "relu relu6 gelu silu mish elu selu celu leaky_relu hardtanh hardswish hardsigmoid hardshrink softshrink "
    "tanhshrink softplus softsign logsigmoid threshold sigmoid tanh abs neg square sqrt rsqrt exp log erf sin cos "
    "reciprocal clamp mul multiply add sub div true_divide pow maximum minimum"
).split()
ELEMENTWISE_FUNCTIONS = frozenset(
    getattr(namespace, name) for namespace in (torch, F) for name in _NAMES if hasattr(namespace, name)
) | {operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.neg, abs}
ELEMENTWISE_METHODS = frozenset(name for name in _NAMES if hasattr(torch.Tensor, name))


@dataclass(frozen=True)
class ProvenChain:
    """A chain, proven in the forward of its owner. All names are full names, from the root module.

    Attributes:
        owner: the module whose forward was proven.
        flows: each member with the value that it reads and the one that it writes, in the order of the forward. The
            values inside the chain are numbered; None is a value that something else reads or writes.
        siblings: groups of members that read the same value and so share their collectives.
        dropouts: each nn.Dropout on the way, with the value that it reads in each call in the owner's forward.
    """

    owner: str
    flows: tuple[tuple[str, int | None, int | None], ...]
    siblings: tuple[tuple[str, ...], ...]
    dropouts: tuple[tuple[str, tuple[int | None, ...]], ...]

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the chain's linears, in the order of the forward."""
        return tuple(name for name, _, _ in self.flows)

    def layouts(self, replicated: Collection[int] = ()) -> dict[str, tuple[str, str]]:
        """Input and output layout of each member, when all values inside but the `replicated` ones are sharded."""
        whole = {None, *replicated}
        return {
            name: ("replicated" if read in whole else "sharded", "replicated" if written in whole else "sharded")
            for name, read, written in self.flows
        }

    def between_pairs(self) -> frozenset[int]:
        """The values that every rank holds whole in Megatron's pairs: those made from sharded ones."""
        layouts: dict[int | None, str] = {None: "replicated"}
        for _, read, written in self.flows:
            layouts.setdefault(written, "sharded" if layouts[read] == "replicated" else "replicated")
        return frozenset(value for value, layout in layouts.items() if value is not None and layout == "replicated")

    def siblings_in_pairs(self) -> tuple[tuple[str, ...], ...]:
        """The groups of siblings that share collectives in Megatron's pairs: those whose weights are cut alike."""
        layouts = self.layouts(self.between_pairs())
        rows = {name for name, both in layouts.items() if both == ("sharded", "replicated")}
        groups = ([n for n in group if (n in rows) is row] for group in self.siblings for row in (True, False))
        return tuple(tuple(group) for group in groups if len(group) > 1)


class Traces:
    """The forwards of all modules below a root, traced once, and what can be read off them.

    Attributes:
        untraceable: why, for each owner that cannot be traced.
        read_directly: for each linear whose parameters some forward reads by itself, the module that does.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._graphs: dict[str, list[fx.Graph]] = {}
        self.untraceable: dict[str, str] = {}
        self.read_directly: dict[str, str] = {}
        self._blocks: list[str] = []
        for name, module in root.named_modules():
            if isinstance(module, nn.Linear) or not any(isinstance(m, nn.Linear) for m in module.modules()):
                continue
            if type(module) in BLOCKS:
                self._blocks.append(name)
                continue
            try:
                self._graphs[name] = _trace(module)
            except Exception as error:  # user code meets proxies here: anything can be raised
                self.untraceable[name] = _first_line(error)
                continue
            for node in (node for graph in self._graphs[name] for node in graph.nodes):
                if node.op == "get_attr" and not all(_asks_kind(user) for user in node.users):
                    self.read_directly[_join(name, node.target.rpartition(".")[0])] = name

    def chains(self, available: Collection[str]) -> tuple[list[ProvenChain], dict[str, str]]:
        """Return disjoint chains of the linears in `available`, the longest first, and why the others are in none."""
        left = set(available)
        found: list[ProvenChain] = []
        while True:
            candidates: list[ProvenChain] = []
            why: dict[str, str] = {}
            for owner in self._blocks:
                chain, reason = _known_chain(self._root, owner, left)
                if chain is None:
                    why.update({_join(owner, name): reason for name in ("linear1", "linear2")})
                else:
                    candidates.append(chain)
            for owner, graphs in self._graphs.items():
                proofs = [_Proof(self._root, owner, graph, left) for graph in graphs]
                agreed = [c for c in proofs[0].chains if all(c in other.chains for other in proofs[1:])]
                for name, reason in proofs[0].why.items():
                    why.setdefault(name, reason)
                for chain in set(proofs[0].chains) - set(agreed):
                    reason = (
                        f"{_quoted(owner)} computes otherwise in eval mode, without gradients or with other optional "
                        f"arguments"
                    )
                    why.update(dict.fromkeys(chain.members, reason))
                candidates += agreed
            if not candidates:
                return found, why
            best = max(candidates, key=self._preference)
            found.append(best)
            left -= set(best.members)

    def why_untraced(self, linear: str) -> str:
        """Why no traced forward calls `linear`, in one line."""
        owners = [o for o in self.untraceable if linear.startswith(f"{o}." if o else "")]
        if not owners:
            return "no traced forward calls it"
        owner = max(owners, key=len)
        return f"the forward of {_quoted(owner)} cannot be traced ({self.untraceable[owner]})"

    def _preference(self, chain: ProvenChain) -> tuple[bool, int]:
        # Lightning calls training_step, which may or may not call the root's forward: ask what lies inside first.
        is_step_module = chain.owner == "" and hasattr(self._root, "training_step")
        return (not is_step_module, len(chain.members))


def _known_chain(root: nn.Module, owner: str, available: Collection[str]) -> tuple[ProvenChain | None, str]:
    """The chain linear2(dropout(activation(linear1(x)))) of torch's transformer layers, or why it is none."""
    block: Any = root.get_submodule(owner)
    first, second, dropout = (_join(owner, name) for name in ("linear1", "linear2", "dropout"))
    activation = block.activation
    if activation not in ELEMENTWISE_FUNCTIONS and type(activation) not in ELEMENTWISE_MODULES:
        return None, f"the activation of {_quoted(owner)} is not known to be elementwise"
    parts = [m for m in (block.dropout, activation) if isinstance(m, nn.Module)]
    usual = all(runs_own_forward(m) and not has_forward_hooks(m) for m in parts)
    if type(block.dropout) is not nn.Dropout or not usual or not runs_own_forward(block):
        return None, f"{_quoted(owner)} has been changed: its dropout or a forward is not torch's own, or has hooks"
    if not {first, second} <= set(available):
        return None, "its neighbour in the feed-forward block is not swapped"
    chain = ProvenChain(
        owner=owner,
        flows=((first, None, 0), (second, 0, None)),
        siblings=(),
        dropouts=((dropout, (0,)),),
    )
    return chain, ""


class _Tracer(fx.Tracer):
    """Marks in `meta` what a graph does not show: each node's grad mode, and whether its value outlives the forward."""

    def __init__(self) -> None:
        super().__init__()
        self._values: list[tuple[fx.Node, weakref.ref[fx.Proxy]]] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Linear) or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["grad"] = torch.is_grad_enabled()
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        value = super().proxy(node)
        self._values.append((node, weakref.ref(value)))
        return value

    def trace(self, *args: Any) -> fx.Graph:
        graph = super().trace(*args)
        for node, value in self._values:
            node.meta["kept"] = value() is not None
        return graph


def _trace(owner: nn.Module) -> list[fx.Graph]:
    """Trace `owner` in train and eval mode, with and without gradients, with optional arguments given and left out."""
    if type(owner).__module__.startswith("torch.nn") and type(owner) is not nn.Sequential:
        raise TypeError(f"{type(owner).__name__} is not on the list of known types")
    if not runs_own_forward(owner):
        raise TypeError("its forward was replaced on the instance")
    for name, module in owner.named_modules():
        if name and has_forward_hooks(module):
            raise TypeError(f"{name!r} has forward hooks, which would see one rank's features")
    parameters = inspect.signature(type(owner).forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    graphs = []
    for training, grad, left_out in itertools.product((True, False), (True, False), _left_out(defaults)):
        with _untouched(owner), torch.set_grad_enabled(grad):
            for module in owner.modules():
                module.training = training
            graphs.append(_Tracer().trace(owner, left_out or None))
    return graphs


def _left_out(defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Which optional arguments to leave out: none, all, each alone, all but one; so each pair in each combination."""
    names = frozenset(defaults)
    choices = [frozenset(), names, *(frozenset({n}) for n in names), *(names - {n} for n in names)]
    return [{n: value for n, value in defaults.items() if n in choice} for choice in dict.fromkeys(choices)]


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


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether `module` has hooks around its forward or backward, other than this package's own."""
    hooks = [
        hook
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        for hook in getattr(module, kind).values()
    ]
    return any(not isinstance(getattr(hook, "__self__", None), Chain) for hook in hooks)


class _Proof:
    """Reads one graph: which values are sharded, and so which linears form chains owned by `owner` itself."""

    def __init__(self, root: nn.Module, owner: str, graph: fx.Graph, available: Collection[str]) -> None:
        self._root, self._owner = root, owner
        self._nodes = list(graph.nodes)
        calls = Counter(self._name(n) for n in self._nodes if n.op == "call_module")
        found = {n: self._name(n) for n in self._nodes if n.op == "call_module" and self._name(n) in available}
        self._linears = {
            n: name for n, name in found.items() if calls[name] == 1 and _reads_one(n) and self._keeps_mode(n)
        }
        self.why = {name: "it is called more than once" for name in available if calls[name] > 1}
        for node, name in found.items():
            if not self._keeps_mode(node):
                self.why.setdefault(name, "it is called where gradients are switched on or off")
        self._group: dict[fx.Node, fx.Node] = {}
        for node in self._nodes:
            if node in self._linears:
                self._group[node] = node
            elif self._is_elementwise(node) and all(i in self._group for i in node.all_input_nodes):
                self._merge(node)
        self._sharded = self._provable_values()
        self.chains = self._find_chains()

    def _name(self, node: fx.Node) -> str:
        return _join(self._owner, str(node.target))

    def _module(self, node: fx.Node) -> nn.Module:
        return self._root.get_submodule(self._name(node))

    def _keeps_mode(self, node: fx.Node) -> bool:
        """Whether the node runs in the grad mode of its owner's call: not so inside an autograd.Function's forward."""
        return bool(node.meta["grad"] == self._nodes[-1].meta["grad"])

    def _is_elementwise(self, node: fx.Node) -> bool:
        if not self._keeps_mode(node):
            return False
        constants = [a for a in (*node.args, *node.kwargs.values()) if not isinstance(a, fx.Node)]
        if not node.all_input_nodes or not all(c is None or isinstance(c, (bool, int, float, str)) for c in constants):
            return False
        if node.op == "call_module":
            module = self._module(node)
            usual = runs_own_forward(module) and not has_forward_hooks(module)
            return usual and type(module) in ELEMENTWISE_MODULES
        if node.op == "call_function":
            return node.target in ELEMENTWISE_FUNCTIONS
        return node.op == "call_method" and node.target in ELEMENTWISE_METHODS

    def _find(self, node: fx.Node) -> fx.Node:
        while self._group[node] is not node:
            node = self._group[node]
        return node

    def _merge(self, node: fx.Node) -> None:
        self._group[node] = self._find(node.all_input_nodes[0])
        for other in node.all_input_nodes[1:]:
            self._group[self._find(other)] = self._find(node)

    def _provable_values(self) -> set[fx.Node]:
        """The values that may be sharded: those of every group in which no value is read by anything else."""
        groups: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in self._group:
            groups[self._find(node)].append(node)
        sharded: set[fx.Node] = set()
        for group in groups.values():
            reason = self._objection(group)
            if reason is None:
                sharded.update(group)
            else:
                for node in group:
                    if node in self._linears:
                        self.why.setdefault(self._linears[node], reason)
        return sharded

    def _objection(self, group: list[fx.Node]) -> str | None:
        """Why the values of a group cannot be sharded; None if they can."""
        for node in group:
            readers = list(node.users)
            if node.meta.get("kept"):
                return f"{self._what(node)} is kept beyond the forward"
            if not readers:
                return f"the result of {self._what(node)} is not used"
            for reader in readers:
                if reader in self._group and reader not in self._linears:
                    continue
                if reader not in self._linears:
                    return f"{self._what(node)} is read by {self._what(reader)}, outside any chain"
            if len(readers) > 2 or (len(readers) == 2 and not all(r in self._linears for r in readers)):
                return f"{self._what(node)} is read {len(readers)} times: {', '.join(map(self._what, readers))}"
        widths: set[Any] = {self._module(n).out_features for n in group if n in self._linears}
        widths |= {self._module(r).in_features for n in group for r in n.users if r in self._linears}
        return None if len(widths) == 1 else f"widths differ along the way: {sorted(widths)}"

    def _find_chains(self) -> list[ProvenChain]:
        """Join the linears that write to or read from the same group, and keep what `owner` itself runs."""
        links: dict[fx.Node, set[fx.Node]] = defaultdict(set)
        for node in (n for n in self._nodes if n in self._sharded):  # in an order that all ranks share
            links[self._find(node)].update({node} & self._linears.keys())
            links[self._find(node)].update(r for r in node.users if r in self._linears)
        chains: list[set[fx.Node]] = []
        for linked in links.values():
            touching = [c for c in chains if c & linked]
            chains = [c for c in chains if not c & linked] + [linked.union(*touching)]
        return [self._chain([n for n in self._nodes if n in c]) for c in chains if self._runs_in_owner(c)]

    def _runs_in_owner(self, linears: set[fx.Node]) -> bool:
        """Whether `owner` is the innermost module whose call holds all of them: an inner one has a proof of its own."""
        stacks = [[path for path, _ in n.meta.get("nn_module_stack", {}).values()][:-1] for n in linears]
        shared = set(stacks[0]).intersection(*stacks[1:])
        return not shared - {""}

    def _chain(self, linears: list[fx.Node]) -> ProvenChain:
        by_input: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for n in linears:
            by_input[n.all_input_nodes[0]].append(n)
        siblings = [n for n in by_input.values() if len(n) > 1 and self._undisturbed(n)]
        values: dict[fx.Node, int] = {}

        def number(value: fx.Node) -> int | None:
            return values.setdefault(self._find(value), len(values)) if value in self._sharded else None

        flows = tuple((self._linears[n], number(n.all_input_nodes[0]), number(n)) for n in linears)
        calls: dict[str, list[int | None]] = defaultdict(list)
        for n in self._nodes:
            if n.op == "call_module" and type(self._module(n)) is nn.Dropout:
                inside = n in self._sharded and self._find(n) in values
                calls[self._name(n)].append(number(n) if inside else None)
        return ProvenChain(
            owner=self._owner,
            flows=flows,
            siblings=tuple(tuple(self._linears[n] for n in nodes) for nodes in siblings),
            dropouts=tuple((name, tuple(read)) for name, read in calls.items() if any(v is not None for v in read)),
        )

    def _undisturbed(self, siblings: list[fx.Node]) -> bool:
        """Whether nothing outside the chain, which might write into their common input, runs between them."""
        first, last = (self._nodes.index(n) for n in (siblings[0], siblings[-1]))
        return all(n in self._group for n in self._nodes[first:last])

    def _what(self, node: fx.Node) -> str:
        if node.op == "output":
            return f"the output of {_quoted(self._owner)}"
        if node.op == "call_module":
            return f"{self._name(node)!r} ({type(self._module(node)).__name__})"
        return f"{getattr(node.target, '__name__', node.target)}()"


def _reads_one(node: fx.Node) -> bool:
    return len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs


def _asks_kind(node: fx.Node) -> bool:
    """Whether the node only asks a tensor for its dtype or device."""
    return node.target is getattr and node.args[1] in ("dtype", "device")


def _join(owner: str, name: str) -> str:
    return ".".join(part for part in (owner, name) if part)


def _quoted(owner: str) -> str:
    return repr(owner) if owner else "the root module"


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    line = text[0] if text else ""
    return f"{type(error).__name__}: {line[:100]}" if line else type(error).__name__
