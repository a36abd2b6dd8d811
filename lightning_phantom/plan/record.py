"""What a plan says: what happens to each linear of a module, and the feed-forward networks they form."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lightning_phantom.config import Config
from lightning_phantom.cost.layer import Layer
from lightning_phantom.plan.structure import FFN


@dataclass(frozen=True)
class PlannedLayer:
    """What happens to one linear, and why.

    Attributes:
        name: full name of the module.
        in_features: its input width.
        out_features: its output width.
        bias: whether it has one.
        transposed: whether its weight is kept as [in, out].
        decision: `"phantom"`; in a tensor-parallel plan `"colwise"` or `"rowwise"`; or `"skip"`, it stays as it is.
        reason: why, in words.
        phantom_width: k, resolved for this layer; None when it stays dense.
        weights_before: parameters of the dense layer.
        weights_after: parameters after the swap, all ranks together.
        warning: what a user should know, in words; empty if nothing.
        parts: 2 where its output is a gate and what it gates, side by side.
        latents: which it reads: `"own"`, `"both"` or `"previous"`.
        predecessor: the layer before it, of which it reads them; empty where they are its own.
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
    warning: str = ""
    parts: int = 1
    latents: str = "own"
    predecessor: str = ""

    @property
    def swapped(self) -> bool:
        """Whether the layer is replaced."""
        return self.decision != "skip"


@dataclass(frozen=True)
class Plan:
    """What `phantomize_`, or a strategy, would do to a module; `print(plan)` shows it as a table.

    Attributes:
        config: the request it answers.
        layers: every linear of the module, in `named_modules` order.
        ffns: the feed-forward networks that the swapped ones form; one named alone is one by itself.
        others: what holds weights like a linear's and is none; nothing happens to it.
    """

    config: Config
    layers: tuple[PlannedLayer, ...]
    ffns: tuple[FFN, ...]
    others: tuple[PlannedLayer, ...] = ()

    @property
    def swapped(self) -> tuple[PlannedLayer, ...]:
        """The layers that are replaced."""
        return tuple(layer for layer in self.layers if layer.swapped)

    def siblings(self) -> list[tuple[str, ...]]:
        """The groups of swapped layers that read the same value, and are cut alike."""
        return [group.names for ffn in self.ffns for group in ffn.groups if len(group.names) > 1]

    def cost_layers(self) -> list[Layer]:
        """The swapped layers as `estimate_cost` takes them: FFN by FFN, in the order of the forward."""
        by_name = {layer.name: layer for layer in self.swapped}
        found: dict[str, Layer] = {}
        for group in (group for ffn in self.ffns for group in ffn.groups):
            for n, name in enumerate(group.names):
                planned = by_name[name]
                layer = Layer(
                    planned.in_features,
                    planned.out_features,
                    planned.bias,
                    enters=group.enters,
                    leaves=group.exits,
                    shares_input=n > 0,
                    phantom_width=planned.phantom_width,
                    depth=group.depth,
                    norms=group.norms if n == 0 else (),
                    mixing=self.config.mixing,
                    gates=group.parts == 2,
                    gated=group.gated,
                )
                if planned.predecessor:
                    layer = layer.after(found[planned.predecessor], planned.latents)
                found[name] = layer
        return list(found.values())

    def __rich__(self) -> Any:
        """Render the plan as a rich table, repeated layers in one row."""
        from rich.table import Table

        linears = f"{len(self.swapped)} of {len(self.layers)} linears"
        kind = self.config.layer_kind.capitalize()
        table = Table(title=f"{kind} plan: {linears}, {self.config}", title_justify="left")
        for column in ("linear", "in", "out", "decision", "k", "weights before", "after"):
            table.add_column(column, justify="left" if column in ("linear", "decision") else "right", no_wrap=True)
        table.add_column("reason", overflow="fold")
        for alike in [*_folded(self.layers), *_folded(self.others)]:
            layer = alike[0]
            table.add_row(
                _name_of_all([each.name for each in alike]),
                str(layer.in_features),
                str(layer.out_features),
                layer.decision,
                "-" if layer.phantom_width is None else str(layer.phantom_width),
                f"{sum(each.weights_before for each in alike):,}",
                f"{sum(each.weights_after for each in alike):,}",
                _reason_of_all([each.reason for each in alike]),
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


_NUMBER = re.compile(r"(?<=\.)\d+\b|\b\d+(?=\.)")  # as part of a name


def _numberless(text: str) -> str:
    return _NUMBER.sub("*", text)


def _folded(layers: Sequence[PlannedLayer]) -> list[list[PlannedLayer]]:
    """Gather the linears that are alike but for the numbers in their names, in the order of the first of each."""

    def looks(layer: PlannedLayer) -> tuple[object, ...]:
        sizes = layer.in_features, layer.out_features, layer.bias, layer.decision, layer.phantom_width
        return (_numberless(layer.name), *sizes, _numberless(layer.reason))

    groups: dict[object, list[PlannedLayer]] = {}
    for layer in layers:
        groups.setdefault(looks(layer), []).append(layer)
    rows: list[list[PlannedLayer]] = []
    for group in groups.values():
        numbers = zip(*(_NUMBER.findall(layer.name) for layer in group), strict=True)
        has_one_name = math.prod(len(set(column)) for column in numbers) == len(group)
        rows += [group] if has_one_name else [[layer] for layer in group]
    return rows


def _name_of_all(names: Sequence[str]) -> str:
    """One name for names that differ in numbers: `layers.{0-23}.mlp.up`."""
    return _of_all(names, _numbers)


def _reason_of_all(reasons: Sequence[str]) -> str:
    """One reason for reasons that differ in numbers, with a * for each that does."""
    return _of_all(reasons, lambda found: "*")


def _of_all(texts: Sequence[str], write: Callable[[set[int]], str]) -> str:
    columns = zip(*(map(int, _NUMBER.findall(text)) for text in texts), strict=True)
    found = iter([set(column) for column in columns])
    return _NUMBER.sub(lambda number: number[0] if len(values := next(found)) == 1 else write(values), texts[0])


def _numbers(found: set[int]) -> str:
    """{0-23}, or {0-3,5} where some are missing."""
    runs = []
    for _, run in groupby(enumerate(sorted(found)), key=lambda pair: pair[1] - pair[0]):
        values = [value for _, value in run]
        runs.append(str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}")
    return "{" + ",".join(runs) + "}"
