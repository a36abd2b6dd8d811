"""Predicts how long the feed-forward part of a step takes: the matrix products one by one, then what is sent.

A product takes `flops / flops_per_s + bytes / memory_bytes_per_s` and a fixed time to start, where bytes counts its
operands and its result once; a copy takes the same without FLOPs. A collective takes `sent_bytes / link_bytes_per_s +
latency_s`. A phantom layer's runs while the products with its diagonal blocks do, and only the excess is waited for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lightning_phantom.config import resolve_phantom_width
from lightning_phantom.cost.count import ELEMENT_BYTES, Group, Layer, layouts_in_pairs

METHODS = ("dense", "tensor_parallel", "tensor_parallel_layerwise", "phantom")


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
    """

    work: Work = Work()
    hidden_behind: Work = Work()
    sent_bytes: int = 0
    calls: int = 0


def collective(group: Group, width: int, behind: Work | None = None, calls: int = 1) -> Stage:
    """An exchange of activations with `width` features in all, hidden behind some work; nothing for one rank."""
    if group.num_ranks == 1:
        return Stage()
    sent, _ = group.collectives(width, 1)
    return Stage(Work(), behind or Work(), sent, calls)


@dataclass(frozen=True)
class StepTime:
    """A predicted step of the feed-forward part, in seconds.

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
) -> dict[str, StepTime]:
    """Predict the step (forward and backward, no optimizer) of these layers, by method (`METHODS`).

    The arguments are `estimate_cost`'s; `layers` come from `Plan.cost_layers`. Dense is one rank that does all of it.
    """
    group = Group(num_ranks, tokens, ELEMENT_BYTES[dtype])
    stages: dict[str, list[Stage]] = {method: [] for method in METHODS}
    for layer, in_pairs in zip(layers, layouts_in_pairs(layers), strict=True):
        width = phantom_width if layer.phantom_width is None else layer.phantom_width
        k = resolve_phantom_width(width, layer.in_features, layer.out_features, num_blocks)
        row, as_it_is = in_pairs[:2] == ("sharded", "replicated"), in_layers(layer)
        stages["dense"] += exact_stages(layer, as_it_is, False, replace(group, num_ranks=1))
        stages["tensor_parallel"] += exact_stages(layer, in_pairs, row, group)
        stages["tensor_parallel_layerwise"] += exact_stages(layer, as_it_is, False, group)
        stages["phantom"] += phantom_stages(layer, num_blocks, k, group)
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


def in_layers(layer: Layer) -> tuple[str, str, bool]:
    """A layer's layouts, and whether it rides on a sibling, where every layer has collectives of its own."""
    return layer.input_layout, layer.output_layout, layer.shares_input


def exact_stages(layer: Layer, layouts: tuple[str, str, bool], row: bool, group: Group) -> list[Stage]:
    """Forward and backward of a dense layer cut by row or by column, in the words of `parallel_linear.py`.

    Args:
        layer: the layer.
        layouts: of its input and its output, and whether it rides on the collectives of a sibling.
        row: whether it is cut by row.
        group: the ranks.
    """
    ranks, tokens, several = group.num_ranks, group.tokens, group.num_ranks > 1
    in_here, out_here = layer.in_features, layer.out_features
    in_here, out_here = (in_here // ranks, out_here) if row else (in_here, out_here // ranks)
    forward = product(1, tokens, in_here, out_here)
    weight_grad = product(1, out_here, tokens, in_here)
    backward = weight_grad + copy(tokens * out_here)
    if layer.needs_input_grad:
        backward += product(1, tokens, out_here, in_here)
    if row:
        return [Stage(forward), collective(group, 2 * layer.out_features), Stage(backward)]
    rides = layouts[2]
    gathered = several and layouts[0] == "sharded"
    stages = [Stage(forward), Stage(backward)]
    if gathered and not rides:
        own_share = product(1, tokens, in_here // ranks, out_here)
        stages.append(collective(group, layer.in_features, behind=own_share))
    if layer.needs_input_grad and not rides:
        passes = 1 if gathered else 2
        stages.append(collective(group, passes * layer.in_features, behind=weight_grad))
    if layouts[1] == "replicated":
        stages.append(collective(group, layer.out_features))
    return stages


def phantom_stages(layer: Layer, num_blocks: int, k: int, group: Group) -> list[Stage]:
    """Forward and backward of a phantom layer, in the words of `layers.py`."""
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
    stages = [Stage(forward), Stage(latents + factors + rest)]
    calls = 0 if layer.shares_input else 1  # siblings' latents travel side by side
    stages += [collective(group, p * k, work, calls) for work in (local, factors)]
    if layer.input_layout == "replicated" and layer.needs_input_grad and not layer.shares_input:
        stages.append(collective(group, layer.in_features))
    if layer.output_layout == "replicated":
        stages.append(collective(group, layer.out_features))
    return stages
