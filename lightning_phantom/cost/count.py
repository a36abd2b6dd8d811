"""What a step costs under tensor parallelism and under phantom parallelism, counted, not measured.

Everything is per rank and per step: FLOPs count a multiply and an add as two and leave biases out, as torch's
FlopCounter does; bytes are those that one rank sends in a ring. With R ranks,
q = p/R blocks each, b tokens and s bytes an element:

| square n x n layer | tensor parallel | phantom |
|---|---|---|
| weights | n^2/R | q (n^2/p^2 + k n) |
| FLOPs forward | 2 b n^2/R | 2 b q (n^2/p^2 + k n) |
| collective forward, and again backward | (R-1)/R b n s | (R-1) q b k s |
| chain exit, forward | (R-1)/R b out s | the same |
| chain entry, backward, if the input needs a gradient | (R-1)/R b in s | the same |

The table's tensor parallelism is the layer-wise one: an all-gather of the input forward (none at a chain's entry, where
every rank has it already) and a reduce-scatter of its gradient backward (at the entry, together with the gathering of
the sum, an all-reduce: one call). Megatron's pairs of a column- and a row-parallel layer spend one all-reduce per pair
each way instead, and a last gather when the number of layers is odd. Both are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_phantom.config import check_phantom_width, is_int, resolve_phantom_width
from lightning_phantom.errors import PhantomError

# Bytes per element, by the names torch gives its types.
ELEMENT_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Layer:
    """A linear layer as the cost model sees it.

    Attributes:
        in_features: width of the input, all ranks together.
        out_features: width of the output, all ranks together.
        bias: whether it has one.
        input_layout: `"replicated"` at the entry of a chain, `"sharded"` inside.
        output_layout: `"replicated"` at the exit of a chain, `"sharded"` inside.
        needs_input_grad: whether its input needs a gradient; False at the first layer of a model fed with data.
        shares_input: whether it rides on the collectives of a sibling before it that reads the same value.
        phantom_width: k of this layer alone; None takes the one given to `estimate_cost`.
        in_pairs: input and output layout in Megatron's pairs, and whether it rides on a sibling's collectives there;
            None alternates along the chain, which is right where no value inside it is written twice.
    """

    in_features: int
    out_features: int
    bias: bool = True
    input_layout: str = "sharded"
    output_layout: str = "sharded"
    needs_input_grad: bool = True
    shares_input: bool = False
    phantom_width: int | None = None
    in_pairs: tuple[str, str, bool] | None = None


@dataclass(frozen=True)
class Cost:
    """What one rank holds, computes and sends in a training step.

    Attributes:
        weights: parameters held, biases included.
        flops_forward: floating-point operations of the forward.
        flops_backward: floating-point operations of the backward.
        layer_bytes: bytes sent in the layers' own collectives, forward and backward.
        boundary_bytes: bytes sent where chains begin and end, forward and backward.
        calls: collectives issued.
    """

    weights: int
    flops_forward: int
    flops_backward: int
    layer_bytes: int
    boundary_bytes: int
    calls: int

    @property
    def flops(self) -> int:
        """Floating-point operations of forward and backward."""
        return self.flops_forward + self.flops_backward

    @property
    def sent_bytes(self) -> int:
        """Bytes sent, layers and boundaries together."""
        return self.layer_bytes + self.boundary_bytes

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class CostEstimate:
    """The costs side by side, per rank and step.

    Attributes:
        phantom: phantom parallelism.
        tensor_parallel: tensor parallelism in Megatron's column and row pairs.
        tensor_parallel_layerwise: tensor parallelism with collectives at every layer.
    """

    phantom: Cost
    tensor_parallel: Cost
    tensor_parallel_layerwise: Cost


def phantom_weights(in_features: int, out_features: int, num_blocks: int, phantom_width: int, bias: bool) -> int:
    """Parameters of a phantom layer, all ranks together: in*out/p + k*in + (p-1)*k*out, and out for the bias."""
    p, k = num_blocks, phantom_width
    return in_features * out_features // p + k * in_features + (p - 1) * k * out_features + bias * out_features


def estimate_cost(
    layers: Sequence[Layer | tuple[int, int]],
    num_blocks: int,
    phantom_width: int | float,
    num_ranks: int,
    tokens: int,
    dtype: object = "float32",
    entry_needs_grad: bool = True,
) -> CostEstimate:
    """Count weights, FLOPs, bytes and calls of a training step, per rank, for phantom and for tensor parallelism.

    Args:
        layers: `(in_features, out_features)` pairs, which form one chain from first to last, or `Layer` records,
            chain by chain and in the order of the forward.
        num_blocks: p.
        phantom_width: k, an int or a fraction of the block width (see `PhantomConfig`).
        num_ranks: R, which divides p.
        tokens: rows of the activations of one step on this group of ranks (batch times sequence length).
        dtype: type of the activations that travel: a torch dtype or its name.
        entry_needs_grad: for pairs: whether the chain's input needs a gradient.

    Returns:
        The record of the three costs.

    Raises:
        PhantomError: sizes that do not divide, an empty list, an unknown dtype.

    Example:
        >>> cost = estimate_cost([(4096, 4096)] * 4, num_blocks=4, phantom_width=64, num_ranks=4, tokens=512)
        >>> cost.phantom.flops / cost.tensor_parallel.flops
        0.3125
    """
    check_phantom_width(phantom_width)
    for name, value, least in (("num_blocks", num_blocks, 2), ("num_ranks", num_ranks, 1), ("tokens", tokens, 0)):
        if not is_int(value) or value < least:
            raise PhantomError(f"{name}={value!r}: needs an int of at least {least}.")
    if num_blocks % num_ranks:
        raise PhantomError(f"num_ranks={num_ranks} does not divide num_blocks={num_blocks}.")
    element_bytes = ELEMENT_BYTES.get(str(dtype).removeprefix("torch."))
    if element_bytes is None:
        raise PhantomError(f"dtype={dtype!r}: choose one of {', '.join(ELEMENT_BYTES)}.")
    phantom = megatron = layerwise = Cost(0, 0, 0, 0, 0, 0)
    chain = _as_layers(layers, entry_needs_grad)
    for layer, in_pairs in zip(chain, layouts_in_pairs(chain), strict=True):
        if layer.in_features % num_blocks or layer.out_features % num_blocks:
            raise PhantomError(
                f"a layer of {layer.in_features} -> {layer.out_features} features does not divide into "
                f"num_blocks={num_blocks} blocks."
            )
        width = phantom_width if layer.phantom_width is None else layer.phantom_width
        k = resolve_phantom_width(width, layer.in_features, layer.out_features, num_blocks)
        group = Group(num_ranks, tokens, element_bytes)
        phantom += _phantom(layer, group, num_blocks, k)
        megatron += _megatron(layer, group, in_pairs)
        layerwise += _layerwise(layer, group)
    return CostEstimate(phantom, megatron, layerwise)


def _as_layers(layers: Sequence[Layer | tuple[int, int]], entry_needs_grad: bool) -> list[Layer]:
    if not layers:
        raise PhantomError("layers is empty: give (in_features, out_features) pairs or Layer records.")
    last = len(layers) - 1
    return [
        layer
        if isinstance(layer, Layer)
        else Layer(
            *layer,
            input_layout="replicated" if n == 0 else "sharded",
            output_layout="replicated" if n == last else "sharded",
            needs_input_grad=n > 0 or entry_needs_grad,
        )
        for n, layer in enumerate(layers)
    ]


@dataclass(frozen=True)
class Group:
    """R ranks and the activations they exchange."""

    num_ranks: int
    tokens: int
    element_bytes: int

    def collectives(self, width: int, count: int) -> tuple[int, int]:
        """Bytes and calls of `count` all-gathers or reduce-scatters of activations with `width` features in all."""
        sent = (self.num_ranks - 1) * width * self.tokens * self.element_bytes // self.num_ranks
        return count * sent, count * (self.num_ranks > 1)


def _phantom(layer: Layer, group: Group, p: int, k: int) -> Cost:
    q, m_in, m_out = p // group.num_ranks, layer.in_features // p, layer.out_features // p
    local, compressor, decompressor = q * m_out * m_in, q * k * m_in, q * m_out * (p - 1) * k
    products = local + compressor + decompressor
    # Backward: a product per weight, and one per value that needs a gradient. The latents always need theirs.
    backward = products + decompressor + (local + compressor) * layer.needs_input_grad
    layer_bytes, layer_calls = group.collectives(p * k, 2)
    enter_bytes, enter_calls = group.collectives(layer.in_features, _gathers_gradient(layer))
    leave_bytes, leave_calls = group.collectives(layer.out_features, layer.output_layout == "replicated")
    return Cost(
        weights=products + layer.bias * q * m_out,
        flops_forward=2 * group.tokens * products,
        flops_backward=2 * group.tokens * backward,
        layer_bytes=layer_bytes,
        boundary_bytes=enter_bytes + leave_bytes,
        calls=layer_calls * (not layer.shares_input) + enter_calls + leave_calls,
    )


def _gathers_gradient(layer: Layer) -> bool:
    """Whether the gradient of the layer's input is made whole: at a chain's entry, once for siblings."""
    return layer.input_layout == "replicated" and layer.needs_input_grad and not layer.shares_input


def _layerwise(layer: Layer, group: Group) -> Cost:
    """An all-gather and a reduce-scatter; where every rank has the input, one all-reduce, half of it the entry's."""
    sharded = layer.input_layout == "sharded"
    moves = 0 if layer.shares_input else sharded + layer.needs_input_grad
    layer_bytes, layer_calls = group.collectives(layer.in_features, moves)
    enter_bytes, _ = group.collectives(layer.in_features, _gathers_gradient(layer))
    leave_bytes, leave_calls = group.collectives(layer.out_features, layer.output_layout == "replicated")
    boundary_bytes, calls = enter_bytes + leave_bytes, layer_calls + leave_calls
    return _exact(layer, group, layer.out_features // group.num_ranks, layer_bytes, boundary_bytes, calls)


def layouts_in_pairs(layers: Sequence[Layer]) -> list[tuple[str, str, bool]]:
    """Each layer's layouts in Megatron's pairs of column and row, and whether it rides on a sibling there."""
    found, row = [], False  # row: whether this stage of the chain is the second of a pair
    for layer in layers:
        if not layer.shares_input:
            row = layer.input_layout == "sharded" and not row
        alternating = ("sharded", "replicated") if row else ("replicated", layer.output_layout)
        found.append(layer.in_pairs or (*alternating, layer.shares_input))
    return found


def _megatron(layer: Layer, group: Group, in_pairs: tuple[str, str, bool]) -> Cost:
    """A column-parallel layer all-reduces its input's gradient, a row-parallel one its output: two gathers' bytes."""
    *layouts, rides = in_pairs
    if layouts == ["sharded", "replicated"]:
        sent, calls = group.collectives(layer.out_features, 2)
        return _exact(layer, group, layer.out_features, sent, 0, calls // 2)
    moves = 0 if rides else 1 + layer.needs_input_grad
    if layouts[0] == "sharded":  # two layers write into one value: this one gathers its input as layer-wise ones do
        sent, calls = group.collectives(layer.in_features, moves)
    else:
        sent, calls = group.collectives(layer.in_features, 2 * (moves // 2))
        calls //= 2
    leave_bytes, leave_calls = group.collectives(layer.out_features, layouts[1] == "replicated")
    return _exact(layer, group, layer.out_features // group.num_ranks, sent, leave_bytes, calls + leave_calls)


def _exact(layer: Layer, group: Group, bias: int, layer_bytes: int, boundary_bytes: int, calls: int) -> Cost:
    """The cost of a layer whose dense weight is split over the group, whichever way."""
    products = layer.in_features * layer.out_features // group.num_ranks
    return Cost(
        weights=products + layer.bias * bias,
        flops_forward=2 * group.tokens * products,
        flops_backward=2 * group.tokens * products * (1 + layer.needs_input_grad),
        layer_bytes=layer_bytes,
        boundary_bytes=boundary_bytes,
        calls=calls,
    )
