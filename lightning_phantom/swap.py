"""Carries a plan out: puts phantom layers where linears were, and takes them out again."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_phantom import fused
from lightning_phantom.chain import Chain, ShardedDropout
from lightning_phantom.comm import Ranks, broadcast
from lightning_phantom.config import PhantomConfig
from lightning_phantom.convert import block_diagonal
from lightning_phantom.errors import PhantomError, PlanError
from lightning_phantom.ffn import Plan, PlannedLayer, plan_phantom
from lightning_phantom.layers import PhantomLinear
from lightning_phantom.linears import features, make_linear, oriented


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
    """The error for a module that phantom parallelism would leave as it is."""
    return PlanError(
        f"nothing in {type(module).__name__} qualifies for phantom parallelism, so training would be dense. Train it "
        f"with another strategy, or name layers with plan={{'glob': 'phantom'}}. Linear by linear:\n{plan}"
    )


def carry_out(
    module: nn.Module,
    plan: Plan,
    process_group: dist.ProcessGroup | None,
    source_group: dist.ProcessGroup | None,
) -> None:
    """Swap the layers of `plan`, starting from the weights of the first rank of `source_group`."""
    config, ranks = plan.config, Ranks(process_group)
    if config.num_blocks % ranks.size:
        raise PhantomError(
            f"num_blocks={config.num_blocks} on {ranks.size} ranks: the number of ranks must divide the number of "
            f"blocks."
        )
    _check_weights(module, plan)
    swapped: dict[str, PhantomLinear] = {}
    for layer in plan.swapped:
        linear = module.get_submodule(layer.name)
        swapped[layer.name] = _phantom_layer(linear, layer, config, process_group, source_group)
        _replace(module, linear, swapped[layer.name])
    dropouts: dict[nn.Dropout, list[tuple[Chain, tuple[bool, ...]]]] = {}
    for proven in plan.chains:
        chain = Chain(proven.owner, proven.members)
        opaque = [module.get_submodule(name) for name in proven.opaque]
        chain.attach(module.get_submodule(proven.owner), opaque)
        for name in proven.members:
            swapped[name].chain = chain
        for group in proven.siblings:
            for name in group:
                others = tuple(swapped[other] for other in group if other != name)
                swapped[name].siblings = (swapped[name], *others)
        for name, calls in proven.dropouts:
            dropout = module.get_submodule(name)
            assert isinstance(dropout, nn.Dropout)
            dropouts.setdefault(dropout, []).append((chain, calls))
    for dropout, uses in dropouts.items():
        _replace(module, dropout, ShardedDropout(dropout, uses, config.num_blocks, ranks))
    fused.switch_off(module, PhantomLinear)


def _check_weights(module: nn.Module, plan: Plan) -> None:
    """Raise PlanError for weights that no phantom layer can start from, before the first layer is swapped."""
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
def _phantom_layer(
    linear: nn.Module,
    planned: PlannedLayer,
    config: PhantomConfig,
    process_group: dist.ProcessGroup | None,
    source_group: dist.ProcessGroup | None,
) -> PhantomLinear:
    assert planned.phantom_width is not None
    weight, bias = oriented(linear.weight, type(linear)), linear.bias  # type: ignore[arg-type]
    in_features, out_features = features(linear)
    input_layout, output_layout = planned.layouts
    phantom = PhantomLinear(
        in_features,
        out_features,
        config.num_blocks,
        planned.phantom_width,
        bias is not None,
        process_group=process_group,
        input_layout=input_layout,
        output_layout=output_layout,
        device="meta",
        dtype=weight.dtype,
    )
    phantom.name, phantom.init_seed, phantom.dense_class = planned.name, config.seed, type(linear)
    phantom.train(linear.training)
    if not weight.is_meta:
        phantom.to_empty(device=weight.device)
        _fill(phantom, weight, bias, config.init, source_group)
    for factor in (phantom.weight, phantom.compressor_weight, phantom.decompressor_weight):
        factor.requires_grad_(weight.requires_grad)
    if bias is not None:
        phantom.bias.requires_grad_(bias.requires_grad)
    return phantom


def _fill(
    phantom: PhantomLinear, weight: Tensor, bias: Tensor | None, init: str, source_group: dist.ProcessGroup | None
) -> None:
    """Initialise a layer from the dense one of the source group's first rank: unseeded ranks hold different weights."""
    bias = None if bias is None else broadcast(bias.detach(), source_group)
    if init == "random":
        phantom.reset_parameters()
        phantom.load_dense(None, bias)
        return
    weight = broadcast(weight.detach(), source_group)
    if init == "block_diagonal":
        phantom.load_factors(block_diagonal(weight, phantom.blocks, phantom.ranks))
        phantom.load_dense(None, bias)
    else:
        phantom.load_dense(weight, bias)


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` under every name that `old` has in `root`."""
    for module in list(root.modules()):
        for name in [name for name, child in module._modules.items() if child is old]:
            setattr(module, name, new)


def densify(module: nn.Module) -> nn.Module:
    """Return a copy of `module` with plain layers again: the same function, the original classes and dtypes.

    A phantom layer becomes what it was put in the place of (`nn.Linear`, or GPT-2's `Conv1D`), with its dense weight.
    Collective when layers are shared between ranks; every rank gets the whole module.
    """
    dense = copy.deepcopy(module)
    chains = {id(m.chain): m.chain for m in dense.modules() if isinstance(m, PhantomLinear) and m.chain is not None}
    for chain in chains.values():
        chain.detach()
    for name, layer in list(dense.named_modules()):
        if isinstance(layer, PhantomLinear):
            plain: nn.Module = _dense_layer(layer)
        elif isinstance(layer, ShardedDropout):
            plain = nn.Dropout(layer.p, layer.inplace)
        else:
            continue
        plain.train(layer.training)
        if not name:
            return plain
        _replace(dense, layer, plain)
    fused.restore(dense)
    return dense


@torch.no_grad()
def _dense_layer(layer: PhantomLinear) -> nn.Module:
    bias = None if layer.bias is None else layer.global_tensor("bias")
    linear = make_linear(layer.dense_class, layer.dense_weight(), bias)
    for name, parameter in linear.named_parameters():
        parameter.requires_grad_(layer.get_parameter(name).requires_grad)
    return linear
