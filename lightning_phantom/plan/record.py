"""What is known of a module before it is touched: the proven chains, and what happens to each linear."""

from __future__ import annotations

import io
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from lightning_phantom.config import Config
from lightning_phantom.cost.count import Layer

# The plan's words for a layer's layouts, of its input and its output.
WORDS = {
    ("replicated", "sharded"): "colwise",
    ("sharded", "replicated"): "rowwise",
    ("sharded", "sharded"): "sharded",
    ("replicated", "replicated"): "phantom",
}
EXACT_WORDS = {**WORDS, ("replicated", "replicated"): "gathered"}


@dataclass(frozen=True)
class ProvenChain:
    """A chain, proven in the forward of its owner. All names are full names, from the root module.

    Attributes:
        owner: the module whose forward was proven.
        flows: each member with the value that it reads and the one that it writes, in the order of the forward. The
            values inside the chain are numbered; None is a value that something else reads or writes.
        siblings: groups of members that read the same value and so share their collectives.
        dropouts: each nn.Dropout on the way, with the value that it reads in each call in the owner's forward.
        opaque: what the owner calls that could not be traced; no member may run in there.
    """

    owner: str
    flows: tuple[tuple[str, int | None, int | None], ...]
    siblings: tuple[tuple[str, ...], ...] = ()
    dropouts: tuple[tuple[str, tuple[int | None, ...]], ...] = ()
    opaque: tuple[str, ...] = ()

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


@dataclass(frozen=True)
class PlannedLayer:
    """What happens to one linear, and why.

    Attributes:
        name: full name of the module.
        in_features: its input width.
        out_features: its output width.
        bias: whether it has one.
        transposed: whether its weight is kept as [in, out].
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
    transposed: bool
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
        words = (*WORDS.items(), *EXACT_WORDS.items())
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
        return chain.between_pairs() if self.config.in_pairs else frozenset()

    def siblings(self, chain: ProvenChain) -> tuple[tuple[str, ...], ...]:
        """The groups of a chain's members that share their collectives."""
        return chain.siblings_in_pairs() if self.config.in_pairs else chain.siblings

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
        kind = self.config.layer_kind.capitalize()
        table = Table(title=f"{kind} plan: {linears}, {self.config}", title_justify="left")
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


def join(owner: str, name: str) -> str:
    """The full name of what `owner` calls `name`."""
    return ".".join(part for part in (owner, name) if part)
