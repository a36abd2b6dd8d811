"""Predicts how long a step takes: the matrix products one by one, then what is sent.

A product takes `flops / flops_per_s + bytes / memory_bytes_per_s` and a fixed time to start, where bytes counts its
operands and its result once; a copy takes the same without FLOPs. A collective takes `sent_bytes / link_bytes_per_s +
latency_s`, and only what exceeds the work beside it is waited for: beside a phantom layer's latents that is the
products with its diagonal blocks, beside what an exact layer gathers its own share's, beside gradients that are
averaged the whole backward, beside weights that FSDP gathers the products of their own layer (it gathers the next
layer's meanwhile). Nothing runs beside what enters, leaves, or is summed by a row-parallel layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_phantom.config import resolve_phantom_width
from lightning_phantom.cost.count import (
    TENSOR_PARALLEL,
    Collective,
    Cost,
    Cut,
    Group,
    cuts,
    element_bytes_of,
    exact_collectives,
    phantom_collectives,
)
from lightning_phantom.cost.data_parallel import NOTHING, Dense, Divided
from lightning_phantom.cost.layer import Layer
from lightning_phantom.cost.methods import METHODS


@dataclass(frozen=True)
class Machine:
    """What one rank can do while the others are as busy.

    Attributes:
        flops_per_s: rate of large matrix products.
        memory_bytes_per_s: rate at which operands and results are read and written.
        op_s: time to start one operation, backward's bookkeeping included.
        link_bytes_per_s: rate at which one rank sends in a collective.
        latency_s: time of a collective that sends next to nothing.
    """

    flops_per_s: float
    memory_bytes_per_s: float
    op_s: float
    link_bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Work:
    """Operations of one rank.

    Attributes:
        flops: floating-point operations.
        elements: elements read and written.
        ops: operations started.
    """

    flops: int = 0
    elements: int = 0
    ops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.elements + other.elements, self.ops + other.ops)

    def seconds(self, machine: Machine, element_bytes: int) -> float:
        """Time on `machine`."""
        moved = self.elements * element_bytes / machine.memory_bytes_per_s
        return self.flops / machine.flops_per_s + moved + self.ops * machine.op_s


def product(batch: int, rows: int, inner: int, columns: int) -> Work:
    """`batch` products of a [rows, inner] by an [inner, columns] matrix."""
    elements = rows * inner + inner * columns + rows * columns
    return Work(2 * batch * rows * inner * columns, batch * elements, 1)


def copy(elements: int) -> Work:
    """Read and write so many elements."""
    return Work(0, 2 * elements, 1)


@dataclass(frozen=True)
class Stage:
    """A stretch of a rank's step: work, or a collective and the work of another stretch that it is hidden behind.

    Attributes:
        work: what is done here.
        hidden_behind: what is done elsewhere, while the collective runs.
        sent_bytes: bytes that this rank sends.
        calls: collectives issued.
        backward: whether it is of the backward.
    """

    work: Work = Work()
    hidden_behind: Work = Work()
    sent_bytes: int = 0
    calls: int = 0
    backward: bool = False


@dataclass(frozen=True)
class StepTime:
    """A predicted step, in seconds.

    Attributes:
        compute_s: products and copies.
        communication_s: the collectives, were nothing computed beside them.
        waited_s: what of it is not hidden behind products.
    """

    compute_s: float
    communication_s: float
    waited_s: float

    @property
    def seconds(self) -> float:
        """The whole."""
        return self.compute_s + self.waited_s


def predict(
    layers: Sequence[Layer],
    num_blocks: int,
    phantom_width: int | float,
    num_ranks: int,
    tokens: int,
    machine: Machine,
    dtype: str = "float32",
    rest: Dense = NOTHING,
    exact: Divided | None = None,
    smaller: Dense | None = None,
) -> dict[str, StepTime]:
    """Predict the step of a model, forward and backward, by method (`METHODS`).

    The arguments are `estimate_cost`'s; `layers` come from `Plan.cost_layers`, and `rest` is what else the model has.
    `exact` is how tensor parallelism divides it, if not into the same; `smaller` is the smaller dense model, if any.
    """
    model = Divided(tuple(layers), rest)
    exact, size = exact or model, element_bytes_of(dtype)
    group, of_ranks = Group(num_ranks, tokens, size), (num_ranks, tokens, dtype)
    phantom: list[Stage] = []
    for layer in model.layers:
        width = phantom_width if layer.phantom_width is None else layer.phantom_width
        k = resolve_phantom_width(width, layer.in_features, layer.out_features, num_blocks)
        phantom += phantom_stages(layer, num_blocks, k, group)
    dense = model.dense
    stages = {
        "ddp": _replicated(dense, dense.cost(*of_ranks), num_ranks, tokens),
        "fsdp": _fully_sharded(dense, num_ranks, tokens, size),
    }
    for method in TENSOR_PARALLEL if exact.layers else ():
        cut = [s for each in cuts(exact.layers, method) for s in exact_stages(*each, group)]
        # Outside its layers every rank of torch's own has all tokens, and no gradient is averaged.
        ranks = 1 if method == "tensor_parallel_torch" else num_ranks
        averaged = exact.averaged(method == "tensor_parallel", ranks, tokens, dtype)
        stages[method] = _replicated(exact.rest, averaged, ranks, tokens, cut)
    stages["phantom"] = _replicated(rest, rest.cost(*of_ranks), num_ranks, tokens, phantom)
    if smaller is not None:
        stages["smaller"] = _replicated(smaller, smaller.cost(*of_ranks), num_ranks, tokens)
    return {method: step_time(stages[method], machine, size) for method in METHODS if method in stages}


def _replicated(dense: Dense, averaged: Cost, num_ranks: int, tokens: int, beside: Sequence[Stage] = ()) -> list[Stage]:
    """What every rank computes of its own tokens; gradients are averaged during all of the backward."""
    alone = Group(1, -(-tokens // num_ranks), 0)
    stages = [*beside, *(s for layer in dense.layers for s in exact_stages(layer, Cut(), alone))]
    backward = sum((stage.work for stage in stages if stage.backward), Work())
    return [*stages, Stage(Work(), backward, averaged.weight_bytes, averaged.calls, True)]


def _fully_sharded(dense: Dense, num_ranks: int, tokens: int, element_bytes: int) -> list[Stage]:
    """The same under FSDP, layer by layer, and what is of no linear together."""
    alone = Group(1, -(-tokens // num_ranks), element_bytes)
    others = 3 * ((num_ranks - 1) * dense.weights * element_bytes // num_ranks)
    stages = [s for layer in dense.layers for s in fsdp_stages(layer, alone, num_ranks)]
    return [*stages, Stage(sent_bytes=others, calls=3 * (dense.weights > 0) * (num_ranks > 1))]


def step_time(stages: Iterable[Stage], machine: Machine, element_bytes: int) -> StepTime:
    """Add up the stages."""
    compute = communication = waited = 0.0
    for stage in stages:
        takes = stage.sent_bytes / machine.link_bytes_per_s + stage.calls * machine.latency_s
        hidden = stage.hidden_behind.seconds(machine, element_bytes)
        compute += stage.work.seconds(machine, element_bytes)
        communication += takes
        waited += max(0.0, takes - hidden)
    return StepTime(compute, communication, waited)


def exact_stages(layer: Layer, cut: Cut, group: Group) -> list[Stage]:
    """Forward and backward of a dense layer that is cut so, in the words of `layers.tensor_parallel`."""
    ranks, tokens, row = group.num_ranks, group.tokens, cut.row
    in_here, out_here = layer.in_features, layer.out_features
    in_here, out_here = (in_here // ranks, out_here) if row else (in_here, out_here // ranks)
    weight_grad = product(1, out_here, tokens, in_here)
    backward = weight_grad + copy(tokens * out_here)
    own_share = product(1, out_here, tokens // ranks, in_here)  # of a row-parallel layer's backward
    if layer.needs_input_grad:
        backward += product(1, tokens, out_here, in_here)
        own_share += product(1, tokens // ranks, out_here, in_here)
    if not row:
        own_tokens, own_features = (tokens // ranks, in_here) if layer.enters else (tokens, in_here // ranks)
        own_share = product(1, own_tokens, own_features, out_here)  # of a column-parallel layer's forward
    behind = {
        ("input", False, False): own_share,
        ("input", True, False): weight_grad,
        ("output", True, True): own_share,
    }
    stages = [Stage(product(1, tokens, in_here, out_here)), Stage(backward, backward=True)]
    if cut.by_torch:
        return stages + [_stage(sent, Work(), Work()) for sent in exact_collectives(layer, group, cut)]
    for sent in exact_collectives(layer, group, cut):
        exchanged = sent.of == ("input" if row else "output")
        width = layer.in_features if row else layer.out_features
        around = copy(tokens * width // ranks) if exchanged else Work()
        stages.append(_stage(sent, around, behind.get((sent.of, sent.backward, row), Work())))
    return stages


def fsdp_stages(layer: Layer, alone: Group, num_ranks: int) -> list[Stage]:
    """Forward and backward of a dense layer on own tokens, whose weights are gathered for each."""
    forward, backward = exact_stages(layer, Cut(), alone)
    if num_ranks == 1:
        return [forward, backward]
    sent = (num_ranks - 1) * layer.dense_weights * alone.element_bytes // num_ranks
    gathered = Stage(hidden_behind=forward.work, sent_bytes=sent, calls=1)
    return [forward, backward, gathered, Stage(Work(), backward.work, 2 * sent, 2, True)]


def phantom_stages(layer: Layer, num_blocks: int, k: int, group: Group) -> list[Stage]:
    """Forward and backward of a phantom layer, in the words of `layers.phantom`."""
    p, q, tokens = num_blocks, num_blocks // group.num_ranks, group.tokens
    m_in, m_out, others = layer.in_features // p, layer.out_features // p, (p - 1) * k
    local = product(q, tokens, m_in, m_out)  # L x
    forward = product(q, tokens, m_in, k) + local + product(q, tokens, others, m_out)
    forward += copy(tokens * p * k) + copy(q * tokens * others) + copy(tokens * q * m_out)
    latents = product(q, tokens, m_out, others) + copy(q * tokens * others) + copy(tokens * p * k)  # h
    factors = product(q, m_out, tokens, m_in) + product(q, m_out, tokens, others)  # dL and dD
    if layer.needs_input_grad:
        factors += product(q, tokens, m_out, m_in)  # L^T d
    rest = product(q, k, tokens, m_in) + copy(tokens * q * m_out)  # dC and db
    if layer.needs_input_grad:
        rest += product(q, tokens, k, m_in)  # C^T h
    stages = [Stage(forward), Stage(latents + factors + rest, backward=True)]
    for sent in phantom_collectives(layer, group, p, k):
        if sent.of == "latents":
            stages.append(_stage(sent, Work(), factors if sent.backward else local))
        else:
            width = layer.in_features if sent.of == "input" else layer.out_features
            stages.append(_stage(sent, copy(tokens * width // group.num_ranks), Work()))
    return stages


def _stage(sent: Collective, work: Work, behind: Work) -> Stage:
    return Stage(work, behind, sent.sent_bytes, sent.calls, sent.backward)
