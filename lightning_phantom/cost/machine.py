"""What a machine can do in a second, and how long it takes over stretches of work and collectives.

A product takes `flops / flops_per_s + bytes / memory_bytes_per_s` and a fixed time to start, where bytes counts its
operands and its result once; a copy takes the same without FLOPs. A collective takes its bytes at the link's rate and a
fixed time; of what runs beside it, the machine hides the share that it can (`overlap`: on CPUs the exchange of bytes is
work of the same cores), and only the remainder is waited for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """What one rank can do while the others are as busy.

    Attributes:
        flops_per_s: rate of large matrix products.
        memory_bytes_per_s: rate at which operands and results are read and written.
        op_s: time to start one operation, backward's bookkeeping included.
        link_bytes_per_s: rate at which one rank sends where values are gathered and exchanged.
        latency_s: time of a collective that sends next to nothing.
        all_reduce_bytes_per_s: rate of torch's all-reduce, by a ring's bytes; None: the link's.
        reduce_scatter_bytes_per_s: rate of torch's reduce-scatter, which gloo makes of an all-reduce; None: the link's.
        overlap: how much of a collective can run beside products: 1, all of it; 0, nothing.
    """

    flops_per_s: float
    memory_bytes_per_s: float
    op_s: float
    link_bytes_per_s: float
    latency_s: float
    all_reduce_bytes_per_s: float | None = None
    reduce_scatter_bytes_per_s: float | None = None
    overlap: float = 1.0

    def sending_s(self, sent_bytes: float, kind: str) -> float:
        """Time of so many bytes in a collective of this kind: `"exchange"`, `"all_reduce"` or `"reduce_scatter"`."""
        rates = {"all_reduce": self.all_reduce_bytes_per_s, "reduce_scatter": self.reduce_scatter_bytes_per_s}
        return sent_bytes / (rates.get(kind) or self.link_bytes_per_s)


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
        kind: of the collective, as `Machine.sending_s` names it.
    """

    work: Work = Work()
    hidden_behind: Work = Work()
    sent_bytes: int = 0
    calls: int = 0
    backward: bool = False
    kind: str = "exchange"


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


def step_time(stages: Iterable[Stage], machine: Machine, element_bytes: int) -> StepTime:
    """Add up the stages."""
    compute = communication = waited = 0.0
    for stage in stages:
        takes = machine.sending_s(stage.sent_bytes, stage.kind) + stage.calls * machine.latency_s
        hidden = stage.hidden_behind.seconds(machine, element_bytes)
        compute += stage.work.seconds(machine, element_bytes)
        communication += takes
        waited += takes - machine.overlap * min(takes, hidden)
    return StepTime(compute, communication, waited)
