"""Proves where a forward hands activations from linear to linear element by element, by torch.fx.

Such a stretch, a *chain*, computes the same when every rank holds only its own features of each value inside it: each
operation there treats every feature alone, and every value is read by nothing outside it. What is proven is the forward
of one module, the *owner*, traced in train and in eval mode, with and without gradients, with its optional arguments
given and left out; what differs between these traces, or cannot be traced, is not proven. An owner may call modules
that cannot be traced, an attention say, before and after its chains: what these read and return is never sharded.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import fx, nn

from lightning_phantom.layers.chain import runs_own_forward
from lightning_phantom.layers.dense import is_linear
from lightning_phantom.plan.elementwise import ELEMENTWISE_FUNCTIONS, ELEMENTWISE_METHODS, is_elementwise_module
from lightning_phantom.plan.record import ProvenChain, join
from lightning_phantom.plan.tracing import has_forward_hooks, trace_forward
from lightning_phantom.plan.transformer import BLOCKS


class Traces:
    """The forwards of all modules below a root, traced once, and what can be read off them.

    Attributes:
        untraceable: why, for each owner that cannot be traced.
        read_directly: for each linear whose parameters some forward reads by itself, the module that does.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._graphs: dict[str, list[fx.Graph]] = {}
        self._opaque: set[nn.Module] = set()
        self.untraceable: dict[str, str] = {}
        self.read_directly: dict[str, str] = {}
        blocks: list[str] = []
        for name, module in reversed(list(root.named_modules())):  # from the inside out: see `opaque`
            if is_linear(module) or not any(is_linear(m) for m in module.modules()):
                continue
            if type(module) in BLOCKS:
                blocks.append(name)
                continue
            try:
                self._graphs[name] = trace_forward(module, self._opaque)
            except Exception as error:  # user code meets proxies here: anything can be raised
                self.untraceable[name] = _first_line(error)
                self._opaque.add(module)
                continue
            for node in (node for graph in self._graphs[name] for node in graph.nodes):
                if node.op == "get_attr" and not all(_asks_kind(user) for user in node.users):
                    self.read_directly[join(name, node.target.rpartition(".")[0])] = name
        self._owners = [*reversed(blocks), *reversed(self._graphs)]

    def chains(self, available: Collection[str]) -> tuple[list[ProvenChain], dict[str, str]]:
        """Return disjoint chains of the linears in `available`, the longest first, and why the others are in none."""
        left = set(available)
        found: list[ProvenChain] = []
        read = {owner: self._read(owner, left) for owner in self._owners}
        while candidates := [chain for chains, _, _ in read.values() for chain in chains]:
            best = max(candidates, key=self._preference)
            found.append(best)
            left -= set(best.members)
            for owner in self._owners:
                if any(_is_below(owner, member) for member in best.members):
                    read[owner] = self._read(owner, left)
        why: dict[str, str] = {}
        for _, reasons, differs in read.values():
            why = {**reasons, **why, **differs}
        return found, why

    def _read(self, owner: str, available: Collection[str]) -> tuple[list[ProvenChain], dict[str, str], dict[str, str]]:
        """The chains that `owner` owns, why linears are in none, and which of these differ from trace to trace."""
        if owner not in self._graphs:
            chain, reason = _known_chain(self._root, owner, available)
            return ([chain], {}, {}) if chain else ([], {}, {join(owner, f"linear{n}"): reason for n in (1, 2)})
        proofs = [_Proof(self._root, owner, graph, available, self._opaque) for graph in self._graphs[owner]]
        first, *others = proofs
        agreed = [c for c in first.chains if all(c in other.chains for other in others)]
        reason = f"{_quoted(owner)} computes otherwise in eval mode, without gradients or with other optional arguments"
        differs = {name: reason for chain in first.chains if chain not in agreed for name in chain.members}
        opaque = tuple(dict.fromkeys(name for proof in proofs for name in proof.opaque_calls))
        return [replace(chain, opaque=opaque) for chain in agreed], first.why, differs

    def why_untraced(self, linear: str) -> str:
        """Why no traced forward calls `linear`, in one line."""
        owners = [o for o in self.untraceable if _is_below(o, linear)]
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
    first, second, dropout = (join(owner, name) for name in ("linear1", "linear2", "dropout"))
    activation = block.activation
    if activation not in ELEMENTWISE_FUNCTIONS and not is_elementwise_module(activation):
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


class _Proof:
    """Reads one graph: which values are sharded, and so which linears form chains owned by `owner` itself."""

    def __init__(
        self, root: nn.Module, owner: str, graph: fx.Graph, available: Collection[str], opaque: Collection[nn.Module]
    ) -> None:
        self._root, self._owner = root, owner
        self._nodes = list(graph.nodes)
        self._at = {node: n for n, node in enumerate(self._nodes)}
        self._opaque = [n for n in self._nodes if n.op == "call_module" and self._module(n) in opaque]
        self.opaque_calls = [self._name(n) for n in self._opaque]
        calls = Counter(self._name(n) for n in self._nodes if n.op == "call_module")
        found = {n: self._name(n) for n in self._nodes if n.op == "call_module" and self._name(n) in available}
        self._linears = {
            n: name
            for n, name in found.items()
            if calls[name] == 1 and len(n.all_input_nodes) == 1 and self._keeps_mode(n)
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
        return join(self._owner, str(node.target))

    def _module(self, node: fx.Node) -> nn.Module:
        return self._root.get_submodule(self._name(node))

    def _keeps_mode(self, node: fx.Node) -> bool:
        """Whether the node runs in the grad mode of its owner's call: not so inside an autograd.Function's forward."""
        return bool(node.meta["grad"] == self._nodes[-1].meta["grad"])

    def _is_elementwise(self, node: fx.Node) -> bool:
        if not self._keeps_mode(node) or not node.all_input_nodes:
            return False
        if node.op == "call_module":  # without hooks: a module around one that has them is not traced
            module = self._module(node)
            return runs_own_forward(module) and is_elementwise_module(module)
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
        first, last = min(self._at[n] for n in group), max(self._at[r] for n in group for r in n.users)
        for node in self._opaque:
            if first < self._at[node] < last:
                return f"{self._what(node)}, which cannot be traced, runs before it is used"
        return None

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
        first, last = self._at[siblings[0]], self._at[siblings[-1]]
        return all(n in self._group for n in self._nodes[first:last])

    def _what(self, node: fx.Node) -> str:
        if node.op == "output":
            return f"the output of {_quoted(self._owner)}"
        if node.op == "call_module":
            return f"{self._name(node)!r} ({type(self._module(node)).__name__})"
        return f"{getattr(node.target, '__name__', node.target)}()"


def _asks_kind(node: fx.Node) -> bool:
    """Whether the node only asks a tensor for its dtype or device."""
    return node.target is getattr and node.args[1] in ("dtype", "device")


def _is_below(owner: str, name: str) -> bool:
    return name.startswith(f"{owner}." if owner else "")


def _quoted(owner: str) -> str:
    return repr(owner) if owner else "the root module"


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    line = text[0] if text else ""
    return f"{type(error).__name__}: {line[:100]}" if line else type(error).__name__
