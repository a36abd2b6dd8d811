"""What a step of the dense layers costs under data parallelism, DDP or FSDP: the first two rows of `count`'s table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from lightning_phantom.cost.count import Cost, check_ints, element_bytes_of
from lightning_phantom.cost.layer import Layer, as_layers, is_row

FIRST_BUCKET_BYTES, BUCKET_BYTES = 2**20, 25 * 2**20  # of gradients at which DDP averages them, as torch has it


@dataclass(frozen=True)
class DataParallelEstimate:
    """The costs of the dense layers on W ranks side by side, per rank and step.

    Attributes:
        ddp: every rank holds all weights, and their gradients are averaged.
        fsdp: every rank holds a share of each weight, gathered for the forward and again for the backward.
    """

    ddp: Cost
    fsdp: Cost


@dataclass(frozen=True)
class Dense:
    """What every rank holds as under DDP: what a model has beside the layers that are split, or a whole dense model.

    Attributes:
        layers: linears.
        weights: parameters of what is no linear.
    """

    layers: tuple[Layer, ...] = ()
    weights: int = 0

    def cost(self, num_ranks: int, tokens: int, dtype: object = "float32") -> Cost:
        """What it costs a rank: products of its linears alone, and the averaging of all gradients."""
        return ddp_cost(self.layers, num_ranks, tokens, dtype, self.weights)

    @property
    def outputs(self) -> int:
        """Features that its linears return, all together."""
        return sum(layer.out_features for layer in self.layers)


NOTHING = Dense()


@dataclass(frozen=True)
class Divided:
    """A model of which ranks hold some layers between them.

    Attributes:
        layers: these, as `Plan.cost_layers` gives them.
        rest: what else it has, which every rank holds.
    """

    layers: tuple[Layer, ...]
    rest: Dense = NOTHING

    @property
    def dense(self) -> Dense:
        """The same model where every rank holds all of it."""
        return replace(self.rest, layers=(*self.layers, *self.rest.layers))

    def averaged(self, cut_by_row: bool, num_ranks: int, tokens: int, dtype: object = "float32") -> Cost:
        """What the rest costs a rank, with the averaging of biases that row-parallel layers hold."""
        biases = sum(
            layer.bias * layer.out_features for layer in as_layers(self.layers) if cut_by_row and is_row(layer)
        )
        cost = replace(self.rest, weights=self.rest.weights + biases).cost(num_ranks, tokens, dtype)
        return replace(cost, weights=cost.weights - biases, replicated=cost.replicated - biases)

    def divides_by(self, num_ranks: int) -> bool:
        """Whether so many ranks can hold the layers in equal parts."""
        return not any(layer.in_features % num_ranks or layer.out_features % num_ranks for layer in self.layers)


def estimate_data_parallel(
    layers: Sequence[Layer | tuple[int, int]],
    num_ranks: int,
    tokens: int,
    dtype: object = "float32",
    entry_needs_grad: bool = True,
) -> DataParallelEstimate:
    """Count weights, FLOPs, bytes and calls of the dense layers, which W ranks train with DDP or with FSDP.

    Args:
        layers: as for `estimate_cost`.
        num_ranks: W.
        tokens: rows of the activations of one step on all ranks together.
        dtype: type of weights and gradients: a torch dtype or its name.
        entry_needs_grad: for pairs: whether the input of the first needs a gradient.

    Returns:
        The record of the two costs. DDP's calls are its buckets of gradients; under FSDP each layer is wrapped by
        itself and cut by output feature.

    Raises:
        PhantomError: an empty list, an unknown dtype, numbers that cannot be.
    """
    dense = as_layers(layers, entry_needs_grad)
    return DataParallelEstimate(ddp_cost(dense, num_ranks, tokens, dtype), fsdp_cost(dense, num_ranks, tokens, dtype))


def ddp_cost(layers: Sequence[Layer], num_ranks: int, tokens: int, dtype: object, other_weights: int = 0) -> Cost:
    """The same under DDP alone, with `other_weights` parameters that are of no linear layer."""
    check_ints(("num_ranks", num_ranks, 1), ("tokens", tokens, 0))
    products = [2 * tokens * layer.in_features * layer.out_features // num_ranks for layer in layers]
    weights = sum(layer.dense_weights for layer in layers) + other_weights
    held_bytes = weights * element_bytes_of(dtype)
    return Cost(
        weights=weights,
        flops_forward=sum(products),
        flops_backward=sum(n * (1 + layer.needs_input_grad) for n, layer in zip(products, layers, strict=True)),
        calls=_buckets(layers, other_weights, element_bytes_of(dtype)) * (num_ranks > 1),
        weight_bytes=2 * ((num_ranks - 1) * held_bytes // num_ranks),
        replicated=weights,
    )


def _buckets(layers: Sequence[Layer], other_weights: int, element_bytes: int) -> int:
    """Calls in which DDP averages gradients: parameters from last to first, none cut; what is no linear at the end."""
    of_layers = ((one.bias * one.out_features, one.in_features * one.out_features) for one in reversed(layers))
    calls, filled, full = 0, 0, FIRST_BUCKET_BYTES
    for weights in (*chain.from_iterable(of_layers), other_weights):
        filled += weights * element_bytes
        if filled >= full:
            calls, filled, full = calls + 1, 0, BUCKET_BYTES
    return calls + (filled > 0)


def fsdp_cost(layers: Sequence[Layer], num_ranks: int, tokens: int, dtype: object, other_weights: int = 0) -> Cost:
    """The same under FSDP: every layer, and the `other_weights` together, gathered twice and their gradients summed."""
    ddp = ddp_cost(layers, num_ranks, tokens, dtype, other_weights)
    shares = sum(-(-layer.out_features // num_ranks) * (layer.in_features + layer.bias) for layer in layers)
    return replace(
        ddp,
        weights=shares + -(-other_weights // num_ranks),
        weight_bytes=ddp.weight_bytes * 3 // 2,
        calls=3 * (len(layers) + (other_weights > 0)) * (num_ranks > 1),
        replicated=0,
    )
