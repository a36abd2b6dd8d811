"""Carries a plan out: linears become layers split over ranks, in place, and plain ones again in a copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_phantom.config import Config, PhantomConfig
from lightning_phantom.distributed.comm import broadcast
from lightning_phantom.distributed.ranks import Ranks
from lightning_phantom.errors import PhantomError, PlanError
from lightning_phantom.layers.dense import features, make_linear, oriented
from lightning_phantom.layers.factors import block_diagonal
from lightning_phantom.layers.phantom import PhantomLinear
from lightning_phantom.layers.split import SplitLinear, split_layers
from lightning_phantom.layers.tensor_parallel import ParallelLinear
from lightning_phantom.plan import transformer
from lightning_phantom.plan.finder import plan_phantom
from lightning_phantom.plan.record import Plan, PlannedLayer

Replaced = Callable[[nn.Parameter, SplitLinear], None]


def phantomize_(module: nn.Module, config: PhantomConfig, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Put the feed-forward linears of `module` into phantom-parallel layout, in place, and return it.

    The linears stay the objects they are, and become `PhantomLinear`s: whatever refers to one runs the new layer. On
    several ranks each of them reads its own batches, and its gradients are those of its own loss (average them over the
    ranks, as DistributedDataParallel does); those of the layers are of the ranks' mean loss already.

    Args:
        module: any module; the same architecture on every rank of the group. The weights of the group's first rank
            count.
        config: what to swap and how.
        process_group: the ranks to share the layers between; their number divides `config.num_blocks`. None: this
            process holds every block and nothing is communicated.

    Raises:
        PlanError: nothing qualifies, or the plan cannot be carried out. Nothing has been changed.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        >>> model = phantomize_(model, PhantomConfig(num_blocks=4))
    """
    plan = plan_phantom(module, config)
    if not plan.swapped:
        raise nothing_qualifies(module, plan)
    carry_out(module, plan, process_group, source_group=process_group)
    return module


def nothing_qualifies(module: nn.Module, plan: Plan) -> PlanError:
    """The error for a module that a plan would leave as it is."""
    return PlanError(
        f"nothing in {type(module).__name__} qualifies as a {plan.config.layer_kind} layer, so training would be "
        f"dense. Train it with another strategy, or name layers with plan={{'glob': 'phantom'}}. Linear by linear:\n"
        f"{plan}"
    )


def carry_out(
    module: nn.Module,
    plan: Plan,
    process_group: dist.ProcessGroup | None,
    source_group: dist.ProcessGroup | None,
    on_replaced: Replaced = lambda parameter, layer: None,
) -> None:
    """Swap the layers of `plan`, starting from the weights of the first rank of `source_group`.

    `on_replaced` is told of each dense weight whose place a layer's parameters have taken.
    """
    config, ranks = plan.config, Ranks(process_group)
    if config.parts % ranks.size:
        raise PhantomError(
            f"{config.parts_name}={config.parts} on {ranks.size} ranks: the number of ranks must divide the number of "
            f"blocks."
        )
    _check_weights(module, plan)
    swapped: dict[str, SplitLinear] = {}
    for planned in _in_order_of_chains(plan):
        linear: Any = module.get_submodule(planned.name)
        dense = [p for p in (linear.weight, linear.bias) if p is not None]
        split = _split_layer(linear, planned, config, process_group, source_group, swapped.get(planned.predecessor))
        swapped[planned.name] = _become(linear, split)
        for parameter in dense:
            on_replaced(parameter, swapped[planned.name])
    for names in plan.siblings():
        group = tuple(swapped[name] for name in names)
        for layer in group:
            layer.siblings = group
    _link_chains(module, swapped)
    transformer.switch_off(module, SplitLinear)


def _in_order_of_chains(plan: Plan) -> list[PlannedLayer]:
    """The layers to swap, in the order of the module, but each after its predecessor."""
    before = {layer.name: layer.predecessor for layer in plan.swapped}

    def place(layer: PlannedLayer) -> int:
        depth, name = 0, layer.predecessor
        while name:
            depth, name = depth + 1, before[name]
        return depth

    return sorted(plan.swapped, key=place)


def _link_chains(module: nn.Module, swapped: Mapping[str, SplitLinear]) -> None:
    """Make predecessors and followers those of the module, where layers have just taken the places of others.

    In the module's order, on every rank alike: followers' latents travel in the order of the followers.
    """
    here = [layer for layer in module.modules() if isinstance(layer, PhantomLinear)]
    for layer in here:
        layer.followers = ()
    for layer in here:
        for predecessor in layer.predecessor:
            now = predecessor if predecessor in here else swapped.get(predecessor.name, predecessor)
            assert isinstance(now, PhantomLinear)
            layer.follow(now)


def _become(module: nn.Module, other: nn.Module) -> Any:
    """Make `module` what `other` is, so that every reference to it refers to that."""
    module.__class__ = type(other)
    vars(module).clear()
    vars(module).update(vars(other))
    if isinstance(module, SplitLinear):
        module.siblings = (module,)
    return module


def _check_weights(module: nn.Module, plan: Plan) -> None:
    """Raise PlanError for weights that no phantom layer can start from, before the first layer is swapped."""
    if plan.config.is_exact:
        return  # which copies weights, whatever they are
    for layer in plan.swapped:
        weight = module.get_submodule(layer.name).weight
        assert isinstance(weight, Tensor)
        if weight.is_meta and plan.config.init in ("from_dense", "block_diagonal"):
            raise PlanError(
                f"init={plan.config.init!r}: {layer.name!r} is on the meta device and has no weights to start from; "
                f"use init='auto' or 'random'."
            )
        if not weight.is_meta and plan.config.init != "random" and not bool(weight.isfinite().all()):
            raise PlanError(
                f"{layer.name!r} holds NaN or infinite weights; load good ones first, or use init='random'."
            )


@torch.no_grad()
def _split_layer(
    linear: Any,
    planned: PlannedLayer,
    config: Config,
    process_group: dist.ProcessGroup | None,
    source_group: dist.ProcessGroup | None,
    predecessor: SplitLinear | None,
) -> SplitLinear:
    bias: Tensor | None = linear.bias
    weight = oriented(linear.weight, type(linear))
    kind: dict[str, Any] = {
        "bias": bias is not None,
        "process_group": process_group,
        "dense_class": type(linear),
        "device": "meta",
        "dtype": weight.dtype,
    }
    split: SplitLinear
    if planned.phantom_width is None:
        split = ParallelLinear(*features(linear), CUTS[planned.decision], **kind)
    else:
        assert predecessor is None or isinstance(predecessor, PhantomLinear)
        kind |= {"mixing": config.mixing, "latents": planned.latents, "predecessor": predecessor}
        split = PhantomLinear(*features(linear), config.parts, planned.phantom_width, parts=planned.parts, **kind)
    split.name, split.init_seed = planned.name, config.seed
    split.train(linear.training)
    if not weight.is_meta:
        split.to_empty(device=weight.device)
        _fill(split, weight, bias, config, source_group)
    for name, parameter in split.named_parameters(recurse=False):
        parameter.requires_grad_((linear.bias if name == "bias" else linear.weight).requires_grad)
    return split


CUTS = {"colwise": "column", "rowwise": "row"}


def _fill(
    split: SplitLinear,
    weight: Tensor,
    bias: Tensor | None,
    config: Config,
    source_group: dist.ProcessGroup | None,
) -> None:
    """Initialise a layer from the dense one of the source group's first rank: unseeded ranks hold different weights."""
    bias = None if bias is None else broadcast(bias.detach(), source_group)
    if config.init == "random":
        split.reset_parameters()
        split.load_dense(None, bias)
        return
    weight = broadcast(weight.detach(), source_group)
    if config.init == "block_diagonal":
        assert isinstance(split, PhantomLinear)
        split.load_factors(block_diagonal(split.by_block(weight), split.blocks, split.ranks))
        split.load_dense(None, bias)
    else:
        split.load_dense(weight, bias)


def densify(module: nn.Module) -> nn.Module:
    """Return a copy of `module` with plain layers again: the same function, the original classes and dtypes.

    A phantom or tensor-parallel layer becomes what it was before (`nn.Linear`, or GPT-2's `Conv1D`), with its dense
    weight. Collective when layers are shared between ranks; every rank gets the whole module. Layers that read latents
    of others (`latents="both"` or `"previous"`) have no dense weight, so such a module cannot be densified.

    Args:
        module: what `phantomize_` or a strategy has swapped layers of; it is not changed.

    Raises:
        PhantomError: a layer has no dense weight.
        RuntimeError: a tensor that cannot be copied, as `copy.deepcopy` has it (one with a gradient history).

    Examples:
        >>> model = phantomize_(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), PhantomConfig(num_blocks=2))
        >>> type(densify(model)[0])
        <class 'torch.nn.modules.linear.Linear'>
    """
    for layer in split_layers(module).values():
        if not layer.has_dense_weight:
            layer.dense_weight()  # which says why
    dense = copy.deepcopy(module)
    for layer in [m for m in dense.modules() if isinstance(m, SplitLinear)]:
        plain = _dense_layer(layer)
        plain.train(layer.training)
        _become(layer, plain)
    transformer.restore(dense)
    return dense


@torch.no_grad()
def _dense_layer(layer: SplitLinear) -> nn.Module:
    bias = None if layer.bias is None else layer.bias_from(layer.global_tensor("bias"))
    linear = make_linear(layer.dense_class, layer.dense_weight(), bias)
    for name, parameter in linear.named_parameters():
        parameter.requires_grad_(layer.get_parameter(name).requires_grad)
    return linear
