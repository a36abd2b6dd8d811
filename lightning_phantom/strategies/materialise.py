"""Before a run: fills weights that have no storage yet, and has each replica counted once."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_phantom.distributed.ranks import Ranks
from lightning_phantom.errors import PhantomError


def materialise(module: nn.Module, device: torch.device) -> None:
    """Give storage and fresh values to what is still on the meta device.

    Raises:
        PhantomError: a module does not say how its values start.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for m in module.modules():
        for key, parameter in m._parameters.items():
            if parameter is not None and parameter.is_meta:
                places[id(parameter)].append((m, key))
    # Children first, as constructors run: a parent may start some of their values otherwise.
    for name, m in reversed(list(module.named_modules())):
        own = [*m.parameters(recurse=False), *m.buffers(recurse=False)]
        if not any(tensor.is_meta for tensor in own):
            continue
        reset = getattr(m, "reset_parameters", None) or getattr(m, "_reset_parameters", None)
        if not callable(reset):
            raise PhantomError(
                f"{name!r} ({type(m).__name__}) is on the meta device and has no reset_parameters() to fill it; "
                f"build it on a real device."
            )
        m.to_empty(device=device, recurse=False)
        reset()
    for (first, first_key), *tied in places.values():  # to_empty gave each place a tensor of its own
        for m, key in tied:
            m._parameters[key] = first._parameters[first_key]


def count_replicas_once(module: nn.Module, replicas: Ranks) -> None:
    """Have metrics and batch normalisations look at one rank of each replica; what the user has set stays.

    Lightning and users copy modules, and process groups cannot be copied: metrics get a function that can, and a
    SyncBatchNorm its group until `give_back_groups`.
    """
    for m in module.modules():
        if isinstance(m, Metric) and m.process_group is None:
            if m.dist_sync_fn is None or isinstance(m.dist_sync_fn, _GatherFrom):
                m.dist_sync_fn = _GatherFrom(replicas if replicas.size > 1 else Ranks(None))
        elif isinstance(m, nn.SyncBatchNorm) and m.process_group is None:
            m.process_group = replicas.group


def give_back_groups(module: nn.Module, replicas: Ranks) -> None:
    """Take the group out of what `count_replicas_once` gave it to."""
    for m in module.modules():
        if isinstance(m, nn.SyncBatchNorm) and m.process_group is replicas.group:
            m.process_group = None


@dataclass(frozen=True)
class _GatherFrom:
    """What torchmetrics calls to collect a metric's state."""

    replicas: Ranks

    def __call__(self, state: Tensor, group: object = None) -> list[Tensor]:
        return gather_all_tensors(state, self.replicas.group) if self.replicas.size > 1 else [state]
