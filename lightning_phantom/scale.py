"""What phantom parallelism would do to a model, and what a step would cost on so many ranks: counted and predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lightning_phantom.config import PhantomConfig
from lightning_phantom.cost import Cost, estimate_cost
from lightning_phantom.errors import PhantomError
from lightning_phantom.ffn import Plan, plan_phantom
from lightning_phantom.predict import METHODS, Machine, StepTime, predict

MOST_BLOCKS = 4096


@dataclass(frozen=True)
class Scale:
    """The feed-forward part of a step on so many ranks.

    Attributes:
        plan: what would be swapped.
        num_blocks: p.
        num_ranks: R.
        tokens: rows of the activations of one step on these ranks.
        dtype: type of the activations.
        costs: weights, FLOPs, bytes and calls of one rank, by method (`predict.METHODS`).
        times: the predicted step, by method.
    """

    plan: Plan
    num_blocks: int
    num_ranks: int
    tokens: int
    dtype: str
    costs: dict[str, Cost]
    times: dict[str, StepTime]

    @property
    def fastest_tp(self) -> str:
        """The style of tensor parallelism with the shorter predicted step."""
        return min(METHODS[1:3], key=lambda method: self.times[method].seconds)

    def ratio(self, what: str) -> float | None:
        """Phantom over the cheaper tensor parallelism: `"weights"`, `"flops"`, `"sent_bytes"`; None of nothing."""
        least = min(getattr(self.costs[method], what) for method in METHODS[1:3])
        return getattr(self.costs["phantom"], what) / least if least else None

    @property
    def time_ratio(self) -> float:
        """Predicted step of phantom over that of the fastest tensor parallelism."""
        return self.times["phantom"].seconds / self.times[self.fastest_tp].seconds

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "num_blocks": self.num_blocks,
            "num_ranks": self.num_ranks,
            "swapped": len(self.plan.swapped),
            "phantom_widths": sorted({layer.phantom_width for layer in self.plan.swapped}),
            "methods": {
                m: {**asdict(self.costs[m]), "flops": self.costs[m].flops, "sent_bytes": self.costs[m].sent_bytes}
                | {**asdict(self.times[m]), "step_s": self.times[m].seconds}
                for m in METHODS
            },
            "phantom_over_tp": {what: self.ratio(what) for what in ("weights", "flops", "sent_bytes")}
            | {"step": self.time_ratio},
        }


def scale(module: nn.Module, config: PhantomConfig, num_ranks: int, tokens: int, dtype: str, machine: Machine) -> Scale:
    """Plan `module` and count and predict its feed-forward part.

    Raises:
        PhantomError: nothing would be swapped, or the sizes do not fit each other.
    """
    plan = plan_phantom(module, config)
    if not plan.swapped:
        raise PhantomError(f"nothing would be swapped at num_blocks={config.num_blocks}:\n{plan}")
    layers = plan.cost_layers()
    arguments = (config.num_blocks, config.phantom_width, num_ranks, tokens)
    estimate = estimate_cost(layers, *arguments, dtype)
    dense = estimate_cost(layers, config.num_blocks, config.phantom_width, 1, tokens, dtype).tensor_parallel
    costs = {"dense": dense} | {method: getattr(estimate, method) for method in METHODS[1:]}
    return Scale(plan, config.num_blocks, num_ranks, tokens, dtype, costs, predict(layers, *arguments, machine, dtype))


def sweep(
    module: nn.Module, config: PhantomConfig, tokens: int, dtype: str, machine: Machine, num_ranks: int | None = None
) -> list[Scale]:
    """`scale` at every number of blocks p that is a power of two or divides the widest layer, up to 4096.

    On p ranks, one block each; with `num_ranks`, at the p that it divides, on that many. Only those p at which the
    same linears are swapped as at the smallest, so that the rows are about one model.
    """
    widest = max((m.in_features for m in module.modules() if isinstance(m, nn.Linear)), default=1)
    rows: list[Scale] = []
    for p in range(2, min(MOST_BLOCKS, widest) + 1):
        if (widest % p and p & (p - 1)) or (num_ranks is not None and p % num_ranks):
            continue
        try:
            row = scale(module, _at(config, p), p if num_ranks is None else num_ranks, tokens, dtype, machine)
        except PhantomError:
            continue
        if not rows or _names(row.plan) == _names(rows[0].plan):
            rows.append(row)
    return rows


def best(rows: Sequence[Scale]) -> Scale:
    """The row with the shortest predicted step of phantom."""
    return min(rows, key=lambda row: row.times["phantom"].seconds)


def stops_paying(rows: Sequence[Scale]) -> Scale | None:
    """The first row at which phantom has more work, or sends more bytes, than tensor parallelism."""
    return next((row for row in rows if max(row.ratio("flops") or 0, row.ratio("sent_bytes") or 0) >= 1), None)


def _names(plan: Plan) -> set[str]:
    return {layer.name for layer in plan.swapped}


def _at(config: PhantomConfig, num_blocks: int) -> PhantomConfig:
    return PhantomConfig(num_blocks, config.phantom_width, config.plan, config.init, config.seed)
