"""What phantom parallelism would do to a model, and what a step would cost on so many ranks: counted and predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lightning_phantom.cost.collectives import Group
from lightning_phantom.cost.count import TENSOR_PARALLEL, Cost, element_bytes_of, estimate_cost, exact_cost
from lightning_phantom.cost.data_parallel import NOTHING, Dense, Divided, fsdp_cost
from lightning_phantom.cost.layer import Layer
from lightning_phantom.cost.machine import Machine, StepTime
from lightning_phantom.cost.methods import EXACT, METHODS
from lightning_phantom.cost.predict import predict
from lightning_phantom.errors import PhantomError

MOST_BLOCKS = 4096


@dataclass(frozen=True)
class Scale:
    """A step on so many ranks.

    Attributes:
        num_blocks: p.
        phantom_widths: each k that a layer has.
        num_ranks: R.
        tokens: rows of the activations of one step on these ranks together.
        dtype: type of the activations.
        costs: weights, FLOPs, bytes and calls of one rank, by method (`METHODS`, but for those that cannot be had).
        times: the predicted step, likewise.
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
        return min((m for m in EXACT if m in self.times), key=lambda method: self.times[method].seconds)

    def ratio(self, what: str, method: str | None = None) -> float | None:
        """Phantom's "weights", "flops", "sent_bytes" or "step" over a method's, or the fastest's; None of nothing."""
        mine, theirs = (self._figure(what, each) for each in ("phantom", method or self.fastest))
        return mine / theirs if theirs else None

    def _figure(self, what: str, method: str) -> float:
        return self.times[method].seconds if what == "step" else getattr(self.costs[method], what)

    def tp_ratio(self, what: str) -> float:
        """Phantom's counted "flops" or "sent_bytes" over those of the cheaper tensor parallelism; 0 of nothing."""
        least = min((self._figure(what, method) for method in TENSOR_PARALLEL if method in self.costs), default=0)
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
                for m in self.costs
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
        rest: what else the model has.
        exact: how tensor parallelism divides the model; None: into the same layers and the same rest.
        smaller: the smaller dense model; None: there is none.
        left_out: methods that cannot train this model, and why.
        beside: whether what a step does beside linears and collectives counts, too (see `predict`).
    """

    layers: tuple[Layer, ...]
    phantom_width: int | float
    tokens: int
    dtype: str
    machine: Machine
    rest: Dense = NOTHING
    exact: Divided | None = None
    smaller: Dense | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    beside: bool = True

    def scale(self, num_blocks: int, num_ranks: int) -> Scale:
        """Count and predict a step at this p on this many ranks.

        Raises:
            PhantomError: the sizes do not fit each other.
        """
        layers = tuple(self.at(layer, num_blocks) for layer in self.layers)
        model, of_ranks = Divided(layers, self.rest), (num_ranks, self.tokens, self.dtype)
        exact = model if self.exact is None or not self.exact.divides_by(num_ranks) else self.exact
        arguments = (num_blocks, self.phantom_width, num_ranks, self.tokens)
        costs = {"ddp": model.dense.cost(*of_ranks)}
        costs["fsdp"] = fsdp_cost(model.dense.layers, *of_ranks, self.rest.weights)
        costs["phantom"] = estimate_cost(layers, *arguments, self.dtype).phantom + self.rest.cost(*of_ranks)
        group = Group(num_ranks, self.tokens, element_bytes_of(self.dtype))
        for method in TENSOR_PARALLEL if exact.layers else ():
            ranks = 1 if method == "tensor_parallel_torch" else num_ranks  # torch's read the same batches
            rest = exact.averaged(method == "tensor_parallel", ranks, self.tokens, self.dtype)
            costs[method] = exact_cost(exact.layers, method, group) + rest
        if self.smaller is not None:
            costs["smaller"] = self.smaller.cost(*of_ranks)
        held = {method: cost.weights for method, cost in costs.items()} if self.beside else None
        times = predict(layers, *arguments, self.machine, self.dtype, self.rest, exact, self.smaller, held)
        methods = [method for method in METHODS if method in costs and method not in self.left_out]
        costs, times = {m: costs[m] for m in methods}, {m: times[m] for m in methods}
        widths = tuple(sorted({layer.phantom_width or 0 for layer in layers}))
        return Scale(num_blocks, widths, num_ranks, self.tokens, self.dtype, costs, times)

    def at(self, layer: Layer, num_blocks: int) -> Layer:
        """A layer with its k at this p."""
        resolved = layer.without_width().with_width(self.phantom_width, num_blocks)
        # Where a block is no feature wide there is no k; the cost model refuses such sizes with its own words.
        return resolved if resolved.phantom_width else replace(resolved, phantom_width=1)

    def times_as_wide(self, factor: float) -> Setting:
        """The same model with so many times the features everywhere; k as it is asked for, and as many tokens."""

        def wider(layers: Sequence[Layer]) -> tuple[Layer, ...]:
            return tuple(
                replace(
                    layer, in_features=int(layer.in_features * factor), out_features=int(layer.out_features * factor)
                )
                for layer in layers
            )

        def dense(part: Dense) -> Dense:
            return Dense(wider(part.layers), int(part.weights * factor))

        exact = None if self.exact is None else Divided(wider(self.exact.layers), dense(self.exact.rest))
        return replace(self, layers=wider(self.layers), rest=dense(self.rest), exact=exact, smaller=None)

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


def pays_from(setting: Setting, num_blocks: int, num_ranks: int) -> int | None:
    """From how many features of its widest layer on phantom's step is no longer than the fastest other's.

    Of the same model with all widths halved or doubled again and again; None where it is longer in the widest.
    """
    features = None
    for factor in (2.0**n for n in range(6, -7, -1)):
        wide = setting.times_as_wide(factor)
        try:
            if (wide.scale(num_blocks, num_ranks).ratio("step") or 0) > 1:
                break
        except PhantomError:  # too narrow for so many blocks
            break
        features = max(layer.in_features for layer in wide.layers)
    return features


def best(rows: Sequence[Scale]) -> Scale:
    """The row with the shortest predicted step of phantom."""
    return min(rows, key=lambda row: row.times["phantom"].seconds)


def stops_paying(rows: Sequence[Scale]) -> Scale | None:
    """The first row at which phantom has as much work, or sends as many bytes, as tensor parallelism."""
    return next((row for row in rows if max(row.tp_ratio("flops"), row.tp_ratio("sent_bytes")) >= 1), None)
