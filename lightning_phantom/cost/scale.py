"""What phantom parallelism would do to a model, and what a step would cost on so many ranks: counted and predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lightning_phantom.cost.count import Cost, estimate_cost
from lightning_phantom.cost.data_parallel import NOTHING, Rest, ddp_cost, fsdp_cost
from lightning_phantom.cost.layer import Layer
from lightning_phantom.cost.predict import METHODS, OTHERS, Machine, StepTime, predict
from lightning_phantom.errors import PhantomError

MOST_BLOCKS = 4096
TENSOR_PARALLEL = ("tensor_parallel", "tensor_parallel_layerwise")


@dataclass(frozen=True)
class Scale:
    """A step on so many ranks.

    Attributes:
        num_blocks: p.
        phantom_widths: each k that a layer has.
        num_ranks: R.
        tokens: rows of the activations of one step on these ranks together.
        dtype: type of the activations.
        costs: weights, FLOPs, bytes and calls of one rank, by method (`predict.METHODS`).
        times: the predicted step, by method.
    """

    num_blocks: int
    phantom_widths: tuple[int, ...]
    num_ranks: int
    tokens: int
    dtype: str
    costs: dict[str, Cost]
    times: dict[str, StepTime]

    @property
    def fastest(self) -> str:
        """Of the methods that train the dense model, the one with the shortest predicted step."""
        return min(OTHERS, key=lambda method: self.times[method].seconds)

    def ratio(self, what: str, method: str | None = None) -> float | None:
        """Phantom's "weights", "flops", "sent_bytes" or "step" over a method's, or the fastest's; None of nothing."""
        mine, theirs = (self._figure(what, each) for each in ("phantom", method or self.fastest))
        return mine / theirs if theirs else None

    def _figure(self, what: str, method: str) -> float:
        return self.times[method].seconds if what == "step" else getattr(self.costs[method], what)

    def tp_ratio(self, what: str) -> float:
        """Phantom's counted "flops" or "sent_bytes" over those of the cheaper tensor parallelism; 0 of nothing."""
        least = min(self._figure(what, method) for method in TENSOR_PARALLEL)
        return self._figure(what, "phantom") / least if least else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "num_blocks": self.num_blocks,
            "num_ranks": self.num_ranks,
            "phantom_widths": self.phantom_widths,
            "methods": {
                m: {**asdict(self.costs[m]), "flops": self.costs[m].flops, "sent_bytes": self.costs[m].sent_bytes}
                | {**asdict(self.times[m]), "step_s": self.times[m].seconds}
                for m in METHODS
            },
            "fastest": self.fastest,
            "phantom_over_fastest": {what: self.ratio(what) for what in ("weights", "flops", "sent_bytes", "step")},
        }


@dataclass(frozen=True)
class Setting:
    """What stays the same while p and R vary.

    Attributes:
        layers: the linears to swap, as `Plan.cost_layers` gives them.
        phantom_width: k, an int or a fraction.
        tokens: rows of the activations of one step, all ranks together.
        dtype: their type.
        machine: what a rank can do.
        rest: what else the model has, under every method alike.
    """

    layers: tuple[Layer, ...]
    phantom_width: int | float
    tokens: int
    dtype: str
    machine: Machine
    rest: Rest = NOTHING

    def scale(self, num_blocks: int, num_ranks: int) -> Scale:
        """Count and predict a step at this p on this many ranks.

        Raises:
            PhantomError: the sizes do not fit each other.
        """
        layers = [self.at(layer, num_blocks) for layer in self.layers]
        arguments = (num_blocks, self.phantom_width, num_ranks, self.tokens)
        estimate = estimate_cost(layers, *arguments, self.dtype)
        rest = self.rest.cost(num_ranks, self.tokens, self.dtype)
        whole = ((*layers, *self.rest.layers), num_ranks, self.tokens, self.dtype, self.rest.weights)
        costs = {"ddp": ddp_cost(*whole), "fsdp": fsdp_cost(*whole)}
        costs |= {method: getattr(estimate, method) + rest for method in METHODS if method not in costs}
        widths = tuple(sorted({layer.phantom_width or 0 for layer in layers}))
        times = predict(layers, *arguments, self.machine, self.dtype, self.rest)
        return Scale(num_blocks, widths, num_ranks, self.tokens, self.dtype, costs, times)

    def at(self, layer: Layer, num_blocks: int) -> Layer:
        """A layer with its k at this p."""
        resolved = layer.without_width().with_width(self.phantom_width, num_blocks)
        # Where a block is no feature wide there is no k; the cost model refuses such sizes with its own words.
        return resolved if resolved.phantom_width else replace(resolved, phantom_width=1)

    def sweep(self, num_ranks: int | None = None) -> list[Scale]:
        """`scale` at every p that is a power of two or divides the widest layer, up to where phantom stops paying.

        On p ranks, one block each; with `num_ranks`, at the p that it divides, on that many.
        """
        widest = max(layer.in_features for layer in self.layers)
        rows: list[Scale] = []
        for p in range(2, min(MOST_BLOCKS, widest) + 1):
            if (widest % p and p & (p - 1)) or (num_ranks is not None and p % num_ranks):
                continue
            try:
                rows.append(self.scale(p, p if num_ranks is None else num_ranks))
            except PhantomError:  # p does not divide every layer
                continue
            if stops_paying(rows):
                break
        return rows


def best(rows: Sequence[Scale]) -> Scale:
    """The row with the shortest predicted step of phantom."""
    return min(rows, key=lambda row: row.times["phantom"].seconds)


def stops_paying(rows: Sequence[Scale]) -> Scale | None:
    """The first row at which phantom has as much work, or sends as many bytes, as tensor parallelism."""
    return next((row for row in rows if max(row.tp_ratio("flops"), row.tp_ratio("sent_bytes")) >= 1), None)
