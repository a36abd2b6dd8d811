"""Carries a plan out: puts layers split over ranks where linears were, and takes them out again."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_phantom.config import Config, PhantomConfig, TensorParallelConfig
from lightning_phantom.distributed.comm import Ranks, broadcast
from lightning_phantom.errors import PhantomError, PlanError
from lightning_phantom.layers.chain import Chain, ShardedDropout
from lightning_phantom.layers.dense import features, make_linear, oriented
from lightning_phantom.layers.factors import block_diagonal
from lightning_phantom.layers.phantom import PhantomLinear
from lightning_phantom.layers.split import SplitLinear
from lightning_phantom.layers.tensor_parallel import ParallelLinear
from lightning_phantom.plan import transformer
from lightning_phantom.plan.finder import plan_phantom
from lightning_phantom.plan.record import Plan, PlannedLayer


def phantomize_(module: nn.Module, config: PhantomConfig, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Put the feed-forward linears of `module` into phantom-parallel layout, in place, and return it.

    Args:
        module: any module; the same architecture on every rank of the group. The weights of the group's first rank
            count.
        config: what to swap and how.
        process_group: the ranks to share the layers between; their number divides `config.num_blocks`. None: this
            process holds every block and nothing is communicated.

    Raises:
        PlanError: nothing qualifies, or the plan cannot be carried out. Nothing has been changed.

    Example:
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
) -> None:
    """Swap the layers of `plan`, starting from the weights of the first rank of `source_group`."""
    config, ranks = plan.config, Ranks(process_group)
    if config.parts % ranks.size:
        raise PhantomError(
            f"{config.parts_name}={config.parts} on {ranks.size} ranks: the number of ranks must divide the number of "
            f"blocks."
        )
    _check_weights(module, plan)
    swapped: dict[str, SplitLinear] = {}
    for layer in plan.swapped:
        linear = module.get_submodule(layer.name)
        swapped[layer.name] = _split_layer(linear, layer, config, process_group, source_group)
        _replace(module, linear, swapped[layer.name])
    dropouts: dict[nn.Dropout, list[tuple[Chain, tuple[bool, ...]]]] = {}
    for proven in plan.chains:
        chain = Chain(proven.owner, proven.members)
        opaque = [module.get_submodule(name) for name in proven.opaque]
        chain.attach(module.get_submodule(proven.owner), opaque)
        for name in proven.members:
            swapped[name].chain = chain
        for group in plan.siblings(proven):
            for name in group:
                others = tuple(swapped[other] for other in group if other != name)
                swapped[name].siblings = (swapped[name], *others)
        whole = {None, *plan.replicated(proven)}
        for name, values in proven.dropouts:
            dropout, sharded = module.get_submodule(name), tuple(value not in whole for value in values)
            assert isinstance(dropout, nn.Dropout)
            if any(sharded) and config.parts > 1:
                dropouts.setdefault(dropout, []).append((chain, sharded))
    for dropout, uses in dropouts.items():
        _replace(module, dropout, ShardedDropout(dropout, uses, config.parts, ranks))
    transformer.switch_off(module, SplitLinear)


def _check_weights(module: nn.Module, plan: Plan) -> None:
    """Raise PlanError for weights that no phantom layer can start from, before the first layer is swapped."""
    if isinstance(plan.config, TensorParallelConfig):
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
    linear: nn.Module,
    planned: PlannedLayer,
    config: Config,
    process_group: dist.ProcessGroup | None,
    source_group: dist.ProcessGroup | None,
) -> SplitLinear:
    bias: Any = linear.bias
    weight = oriented(linear.weight, type(linear))  # type: ignore[arg-type]
    input_layout, output_layout = planned.layouts
    kind: dict[str, Any] = {
        "bias": bias is not None,
        "process_group": process_group,
        "input_layout": input_layout,
        "output_layout": output_layout,
        "dense_class": type(linear),
        "device": "meta",
        "dtype": weight.dtype,
    }
    split: SplitLinear
    if isinstance(config, TensorParallelConfig):
        split = ParallelLinear(*features(linear), config.style, **kind)
    else:
        assert planned.phantom_width is not None
        split = PhantomLinear(*features(linear), config.num_blocks, planned.phantom_width, **kind)
    split.name, split.init_seed = planned.name, config.seed
    split.train(linear.training)
    if not weight.is_meta:
        split.to_empty(device=weight.device)
        _fill(split, weight, bias, config, source_group)
    for name, parameter in split.named_parameters(recurse=False):
        parameter.requires_grad_((bias if name == "bias" else weight).requires_grad)
    return split


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
        split.load_factors(block_diagonal(weight, split.blocks, split.ranks))
        split.load_dense(None, bias)
    else:
        split.load_dense(weight, bias)


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` under every name that `old` has in `root`."""
    for module in list(root.modules()):
        for name in [name for name, child in module._modules.items() if child is old]:
            setattr(module, name, new)


def densify(module: nn.Module) -> nn.Module:
    """Return a copy of `module` with plain layers again: the same function, the original classes and dtypes.

    A phantom or tensor-parallel layer becomes what it was put in the place of (`nn.Linear`, or GPT-2's `Conv1D`), with
    its dense weight. Collective when layers are shared between ranks; every rank gets the whole module.

    Args:
        module: what `phantomize_` or a strategy has swapped layers of; it is not changed.

    Raises:
        RuntimeError: a tensor that cannot be copied, as `copy.deepcopy` has it (one with a gradient history).

    Example:
        >>> model = phantomize_(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), PhantomConfig(num_blocks=2))
        >>> type(densify(model)[0])
        <class 'torch.nn.modules.linear.Linear'>
    """
    dense = copy.deepcopy(module)
    chains = {id(m.chain): m.chain for m in dense.modules() if isinstance(m, SplitLinear) and m.chain is not None}
    for chain in chains.values():
        chain.detach()
    for name, layer in list(dense.named_modules()):
        if isinstance(layer, SplitLinear):
            plain: nn.Module = _dense_layer(layer)
        elif isinstance(layer, ShardedDropout):
            plain = nn.Dropout(layer.p, layer.inplace)
        else:
            continue
        plain.train(layer.training)
        if not name:
            return plain
        _replace(dense, layer, plain)
    transformer.restore(dense)
    return dense


@torch.no_grad()
def _dense_layer(layer: SplitLinear) -> nn.Module:
    bias = None if layer.bias is None else layer.global_tensor("bias")
    linear = make_linear(layer.dense_class, layer.dense_weight(), bias)
    for name, parameter in linear.named_parameters():
        parameter.requires_grad_(layer.get_parameter(name).requires_grad)
    return linear
