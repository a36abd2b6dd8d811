"""What ranks do together to make a module ready: swap layers, align weights, average gradients; needs no Trainer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_phantom.distributed.comm import broadcast, gather_objects
from lightning_phantom.distributed.gradients import ShardAverage
from lightning_phantom.distributed.mesh import Mesh
from lightning_phantom.errors import PhantomError, PlanError
from lightning_phantom.layers.dense import is_linear
from lightning_phantom.layers.split import SplitLinear, sharded_parameters, split_layers
from lightning_phantom.plan.record import Plan
from lightning_phantom.swap import carry_out


class Swapper:
    """Swaps what qualifies in a module, in as many passes as the module is made in, and remembers what it did.

    Args:
        module: the module, the same on every rank.
        make_plan: plans it: `plan_phantom` or `plan_tensor_parallel`.

    Attributes:
        plan: what happened to each linear; None before the first pass.
    """

    def __init__(self, module: nn.Module, make_plan: Callable[[nn.Module, Any], Plan]) -> None:
        self.module = module
        self.plan: Plan | None = None
        self._make_plan = make_plan
        self._replaced: dict[int, tuple[weakref.ref[nn.Parameter], SplitLinear]] = {}

    def swap(self, config: Any, mesh: Mesh) -> None:
        """Swap what qualifies and is not swapped yet, and show the plan on rank 0; every rank calls it.

        Raises:
            PlanError: the ranks' modules differ, or the plan cannot be carried out.
        """
        linears = {name: m for name, m in self.module.named_modules() if is_linear(m)}
        swapped = () if self.plan is None else [layer.name for layer in self.plan.swapped if layer.name in linears]
        rebuilt = {name for name in swapped if not isinstance(linears[name], SplitLinear)}
        if self.plan is not None and self.plan.config == config and not rebuilt:
            if linears.keys() == {layer.name for layer in self.plan.layers}:
                return
        plan = self._make_plan(self.module, config)
        names = {layer.name for layer in plan.swapped}
        if not rebuilt <= names:  # without its neighbours a linear does not look like a part of a network
            named = dict.fromkeys([*names, *rebuilt], "phantom")
            plan = replace(self._make_plan(self.module, replace(config, plan=named)), config=config)
        if not plan.swapped:
            self.plan = self.plan or plan
            return
        if len(set(gather_objects(repr(plan)))) > 1:
            raise PlanError("the ranks built different modules, so their plans differ; build the same one on each.")
        _show(plan)
        carry_out(self.module, plan, mesh.phantom.process_group, dist.group.WORLD, self._note)
        _show_shares(plan, self.module, mesh.phantom.size)
        self.plan = plan if self.plan is None else _joined(self.plan, plan)
        layers = set(split_layers(self.module).values())
        for layer in layers:
            layer.siblings = tuple(other for other in layer.siblings if other in layers)

    def __getstate__(self) -> dict[str, Any]:
        """What can be pickled; weak references to weights that are gone mean nothing elsewhere."""
        return {**vars(self), "_replaced": {}}

    def _note(self, dense: nn.Parameter, layer: SplitLinear) -> None:
        self._replaced[id(dense)] = weakref.ref(dense), layer

    def update(self, optimizers: Iterable[Optimizer]) -> None:
        """Give a layer's parameters the places that the dense ones have in optimizers made before the swap.

        Raises:
            PhantomError: an optimizer holds a state of a dense weight, which means nothing for the new ones.
        """
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [new for old in group["params"] for new in self._successors(old, optimizer)]

    def _successors(self, old: Tensor, optimizer: Optimizer) -> list[Tensor]:
        replaced = self._replaced.get(id(old))
        if replaced is None or replaced[0]() is not old:
            return [old]
        layer = replaced[1]
        if optimizer.state.get(old):
            raise PhantomError(
                f"the optimizer has taken steps with the dense weight of {layer.name!r}, and its state fits no "
                f"{layer.kind} layer. Make it in configure_optimizers."
            )
        names = [name for name, _ in layer.named_parameters(recurse=False) if (name == "bias") == (old.dim() == 1)]
        return [layer.get_parameter(name) for name in names]


def _joined(first: Plan, second: Plan) -> Plan:
    """One plan for layers swapped in two passes; what has been rebuilt between them counts as it is now."""
    kept = {layer.name: layer for layer in first.swapped}
    names = {layer.name for layer in second.layers}
    ffns = tuple(ffn for ffn in first.ffns if names.issuperset(ffn.names))
    known = {name for ffn in ffns for name in ffn.names}
    return replace(
        second,
        layers=tuple(layer if layer.swapped else kept.get(layer.name, layer) for layer in second.layers),
        ffns=ffns + tuple(ffn for ffn in second.ffns if not known.issuperset(ffn.names)),
    )


@torch.no_grad()
def align_replicated(module: nn.Module) -> None:
    """Give every rank global rank 0's replicated parameters and buffers; shards are each rank's own."""
    sharded = sharded_parameters(module)
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) not in sharded:
            tensor.copy_(broadcast(tensor, dist.group.WORLD))


def average_shards(module: nn.Module, mesh: Mesh) -> ShardAverage | None:
    """Average the gradients of shards over the groups, where there are several, and keep DDP from doing it."""
    sharded = sharded_parameters(module)
    shards = {name: p for name, p in module.named_parameters(remove_duplicate=False) if id(p) in sharded}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(shards))
    return ShardAverage(dict.fromkeys(shards.values()), mesh.data_parallel) if mesh.data_parallel.size > 1 else None


def has_replicated(module: nn.Module) -> bool:
    """Whether anything is left for DDP to average."""
    sharded = sharded_parameters(module)
    return any(p.requires_grad and id(p) not in sharded for p in module.parameters())


@rank_zero_only
def _show(plan: Plan) -> None:
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(plan)
    else:
        print(plan, flush=True)
    for layer in plan.swapped:
        if layer.warning:
            rank_zero_warn(f"{layer.name!r}: {layer.warning}.")


@rank_zero_only
def _show_shares(plan: Plan, module: nn.Module, ranks: int) -> None:
    if ranks > 1:
        whole = sum(layer.weights_after for layer in plan.swapped)
        held = sum(p.numel() for layer in plan.swapped for p in module.get_submodule(layer.name).parameters())
        print(
            f"Each of {ranks} ranks holds {held:,} of the {whole:,} weights of the swapped layers; "
            f"Lightning's model summary counts one rank's.",
            flush=True,
        )
