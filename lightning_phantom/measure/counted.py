"""Counts what a process computes and sends through torch's own operations, one by one as they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightning_phantom.distributed.comm import Traffic


class Counted(TorchDispatchMode):
    """While it is entered, the FLOPs of products, and the collectives that carry tensors: DDP's, FSDP's, any.

    Running takes longer meanwhile.

    Args:
        num_ranks: the ranks that every collective is among.

    Attributes:
        flops: a multiply and an add are two.
        traffic: calls, and bytes that one rank of a ring sends.
    """

    def __init__(self, num_ranks: int) -> None:
        super().__init__()
        self.flops, self.traffic = 0, Traffic()
        self._num_ranks = num_ranks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count it."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # the operations that it is made of follow
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        elif (name := str(packet).removeprefix("_c10d_functional.").removeprefix("c10d.")) in _SENDS:
            kind, sent = _SENDS[name]
            self.traffic.add(kind, sent(args, self._num_ranks))
        return result


def _bytes(x: Tensor | Sequence[Tensor]) -> int:
    return x.nbytes if isinstance(x, Tensor) else sum(each.nbytes for each in x)


# By the name of the operation: what it is called elsewhere, and the bytes it sends, from its arguments.
_SENDS: dict[str, tuple[str, Callable[[Any, int], int]]] = {
    "_allgather_base_": ("all_gather", lambda args, ranks: _bytes(args[1]) * (ranks - 1)),
    "all_gather_into_tensor": ("all_gather", lambda args, ranks: _bytes(args[0]) * (ranks - 1)),
    "_reduce_scatter_base_": ("reduce_scatter", lambda args, ranks: _bytes(args[0]) * (ranks - 1)),
    "reduce_scatter_tensor": ("reduce_scatter", lambda args, ranks: _bytes(args[0]) * (ranks - 1) // ranks),
    "allreduce_": ("all_reduce", lambda args, ranks: 2 * _bytes(args[0]) * (ranks - 1) // ranks),
    "all_reduce": ("all_reduce", lambda args, ranks: 2 * _bytes(args[0]) * (ranks - 1) // ranks),
    "all_reduce_": ("all_reduce", lambda args, ranks: 2 * _bytes(args[0]) * (ranks - 1) // ranks),
    "all_to_all_single": ("all_to_all", lambda args, ranks: _bytes(args[0]) * (ranks - 1) // ranks),
}
