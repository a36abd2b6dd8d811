"""Before a run: fills weights that have no storage yet, and refuses what would go wrong without a word."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelPruning, ThroughputMonitor
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_phantom.comm import Ranks
from lightning_phantom.errors import PhantomError
from lightning_phantom.gradients import not_elementwise, over_all_parameters


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


def check_trainer(trainer: L.Trainer, ranks: int, swapped_late: bool) -> None:
    """Look for callbacks and loggers that do not go with phantom layers.

    Args:
        trainer: the trainer of the run.
        ranks: how many hold each layer between them.
        swapped_late: whether layers were swapped after the callbacks' setup hooks.

    Raises:
        PhantomError: naming the one that would give wrong weights, or wait for ranks that never come.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelPruning):
            raise PhantomError(
                "ModelPruning would prune each rank's share of a layer as if it were the whole weight. Leave it out, "
                "and prune the dense module after training (densify)."
            )
        if swapped_late and getattr(callback, "_average_model", None) is not None:
            raise PhantomError(
                f"{type(callback).__name__} copied the model before the layers that configure_model makes were "
                f"swapped. Make them in __init__, or leave the callback out."
            )
        if isinstance(callback, ThroughputMonitor) and ranks > 1:
            rank_zero_warn(
                f"ThroughputMonitor multiplies by trainer.world_size, but the {ranks} ranks of one replica share "
                f"their batches: divide its global samples, batches and items per second by {ranks}. What it logs "
                f"under 'device' is right."
            )
    for logger in trainer.loggers:
        if ranks > 1 and getattr(logger, "_log_graph", False):
            raise PhantomError(
                f"{type(logger).__name__}(log_graph=True) runs the model on rank 0 only, which would wait for the "
                f"other {ranks - 1} ranks of its replica; leave log_graph out."
            )


def check_update_rules(optimizers: Sequence[Optimizer], ranks: int) -> None:
    """Look for optimizers whose rule is not elementwise, where `ranks` ranks hold a share of each layer.

    Raises:
        PhantomError: a rule draws on all parameters at once, so the ranks' replicated parameters would drift apart.
    """
    if ranks == 1:
        return
    if names := over_all_parameters(optimizers):
        raise PhantomError(
            f"{', '.join(names)}: this optimizer decides by sums over all its parameters, of which each of the {ranks} "
            f"ranks of a replica holds others, so the ranks would take different steps. Use one rank per replica "
            f"(data_parallel_size=number of ranks), or an elementwise optimizer such as AdamW or SGD."
        )
    if names := not_elementwise(optimizers):
        rank_zero_warn(
            f"{', '.join(names)}: the rule of this optimizer is not elementwise, so it treats each rank's share of a "
            f"split layer as a tensor of its own, and training depends on the number of ranks. AdamW and SGD are "
            f"exact."
        )
