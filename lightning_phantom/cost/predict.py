"""Predicts how long a step takes: the matrix products one by one, then what is sent.

A product takes `flops / flops_per_s + bytes / memory_bytes_per_s` and a fixed time to start, where bytes counts its
operands and its result once; a copy takes the same without FLOPs. A collective takes `sent_bytes / link_bytes_per_s +
latency_s`, and only what exceeds the work beside it is waited for: beside a phantom layer's latents that is the
products with its diagonal blocks (and those of the layer before, where they are made of that one's input), beside what
an exact layer gathers its own share's, beside gradients that are averaged the whole backward, beside weights that FSDP
gathers the products of their own layer (it gathers the next layer's meanwhile). Nothing runs beside what enters,
leaves, or is summed by a row-parallel layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_phantom.cost.count import (
    Collective,
    Cost,
    Group,
    element_bytes_of,
    exact_collectives,
    phantom_collectives,
)
from lightning_phantom.cost.data_parallel import NOTHING, Rest, ddp_cost
from lightning_phantom.cost.layer import Layer, as_layers, is_row, latents_of

METHODS = ("ddp", "fsdp", "tensor_parallel", "tensor_parallel_layerwise", "phantom")
OTHERS = METHODS[:-1]  # which train the dense model


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
    rest: Rest = NOTHING,
) -> dict[str, StepTime]:
    """Predict the step (forward and backward, no optimizer) of these layers, by method (`METHODS`).

    The arguments are `estimate_cost`'s; `layers` come from `Plan.cost_layers`. DDP and FSDP train the dense layers on
    as many ranks. `rest` is computed under every method alike.
    """
    group = Group(num_ranks, tokens, element_bytes_of(dtype))
    alone = Group(1, -(-tokens // num_ranks), group.element_bytes)  # own tokens
    stages: dict[str, list[Stage]] = {method: [] for method in METHODS}
    averaged = {method: rest.cost(num_ranks, tokens, dtype) for method in METHODS}
    averaged["ddp"] = ddp_cost((*layers, *rest.layers), num_ranks, tokens, dtype, rest.weights)
    averaged["fsdp"] = Cost()  # layer by layer
    for layer in as_layers(layers):
        stages["ddp"] += exact_stages(layer, False, alone)
        stages["fsdp"] += fsdp_stages(layer, alone, num_ranks)
        stages["tensor_parallel"] += exact_stages(layer, is_row(layer), group)
        stages["tensor_parallel_layerwise"] += exact_stages(layer, False, group)
        stages["phantom"] += phantom_stages(layer.with_width(phantom_width, num_blocks), num_blocks, group)
    for method, own in stages.items():
        for layer in rest.layers:
            own += fsdp_stages(layer, alone, num_ranks) if method == "fsdp" else exact_stages(layer, False, alone)
        backward = sum((stage.work for stage in own if stage.backward), Work())
        own.append(Stage(Work(), backward, averaged[method].weight_bytes, averaged[method].calls, True))
    stages["fsdp"].append(_weights_alone(rest.weights, num_ranks, group.element_bytes))
    return {method: step_time(stages[method], machine, group.element_bytes) for method in METHODS}


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


def exact_stages(layer: Layer, row: bool, group: Group) -> list[Stage]:
    """Forward and backward of a dense layer cut by `row` or by column, in the words of `layers.tensor_parallel`."""
    ranks, tokens = group.num_ranks, group.tokens
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
    for sent in exact_collectives(layer, group, row):
        exchanged = sent.of == ("input" if row else "output")
        width = layer.in_features if row else layer.out_features
        around = copy(tokens * width // ranks) if exchanged else Work()
        stages.append(_stage(sent, around, behind.get((sent.of, sent.backward, row), Work())))
    return stages


def fsdp_stages(layer: Layer, alone: Group, num_ranks: int) -> list[Stage]:
    """Forward and backward of a dense layer on own tokens, whose weights are gathered for each."""
    forward, backward = exact_stages(layer, False, alone)
    if num_ranks == 1:
        return [forward, backward]
    sent = (num_ranks - 1) * layer.dense_weights * alone.element_bytes // num_ranks
    gathered = Stage(hidden_behind=forward.work, sent_bytes=sent, calls=1)
    return [forward, backward, gathered, Stage(Work(), backward.work, 2 * sent, 2, True)]


def _weights_alone(weights: int, num_ranks: int, element_bytes: int) -> Stage:
    """What FSDP sends of weights that are of no linear layer."""
    calls = 3 * (weights > 0) * (num_ranks > 1)
    return Stage(sent_bytes=3 * ((num_ranks - 1) * weights * element_bytes // num_ranks), calls=calls)


def phantom_stages(layer: Layer, num_blocks: int, group: Group) -> list[Stage]:
    """Forward and backward of a phantom layer, whose width is resolved, in the words of `layers.operator`."""
    p, q, tokens = num_blocks, num_blocks // group.num_ranks, group.tokens
    m_in, m_out, latents = layer.in_features // p, layer.out_features // p, latents_of(layer, num_blocks)
    m_of, made = latents.in_features // p, latents.made
    local = product(q, tokens, m_in, m_out)  # L x
    forward = product(q, tokens, m_of, made) + local
    forward += copy(tokens * p * made) + copy(tokens * q * m_out)
    backward = product(q, made, tokens, m_of) + copy(tokens * q * m_out)  # dC and db
    if latents.needs_grad:
        backward += product(q, tokens, made, m_of)  # C^T h
    factors = product(q, m_out, tokens, m_in)  # dL
    if layer.needs_input_grad:
        factors += product(q, tokens, m_out, m_in)  # L^T d
    for others in ((p - 1) * width for width in (latents.width, latents.before) if width):
        forward += product(q, tokens, others, m_out) + copy(q * tokens * others)
        backward += product(q, tokens, m_out, others) + copy(q * tokens * others) + copy(tokens * p * made)  # h
        factors += product(q, m_out, tokens, others)  # dD
    stages = [Stage(forward), Stage(backward + factors, backward=True)]
    beside = {False: local, True: factors}
    if layer.latents == "previous" and layer.predecessor is not None:
        theirs = layer.predecessor.in_features // p, layer.predecessor.out_features // p
        beside[False] = Work() if latents.with_others else local + product(q, tokens, *theirs)
        beside[True] += product(q, theirs[1], tokens, theirs[0])
    for sent in phantom_collectives(layer, group, p):
        if sent.of == "latents":
            stages.append(_stage(sent, Work(), beside[sent.backward]))
        else:
            width = layer.in_features if sent.of == "input" else layer.out_features
            stages.append(_stage(sent, copy(tokens * width // group.num_ranks), Work()))
    return stages


def _stage(sent: Collective, work: Work, behind: Work) -> Stage:
    return Stage(work, behind, sent.sent_bytes, sent.calls, sent.backward)
