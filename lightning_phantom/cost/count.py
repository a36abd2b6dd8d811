"""What a training step costs by each method, counted, not measured.

Everything is per rank and step: FLOPs count a multiply and an add as two and leave biases out, as torch's FlopCounter
does; bytes are those that one rank sends in a ring. W ranks in groups of R, q = p/R blocks a rank, b tokens of one
group's ranks together, s bytes an element. For a square n x n linear:

| | weights held | FLOPs forward | bytes sent |
|---|---|---|---|
| DDP, dense | n^2 | 2 (b/R) n^2 | gradients 2 (W-1)/W n^2 s |
| FSDP, dense | n^2/W | 2 (b/R) n^2 | weights twice and gradients, 3 (W-1)/W n^2 s |
| TP in pairs | n^2/R | 2 b n^2/R | twice: entry (R-1)/R b in s, exit (R-1)/R b out s |
| TP, layer by layer | n^2/R | 2 b n^2/R | twice: layers (R-1)/R b in s, exit (R-1)/R^2 b out s |
| TP, torch's own | n^2/R | 2 b n^2/R | forward 2 (R-1)/R b out s, backward 2 (R-1)/R b in s |
| phantom | q (n^2/p^2 + k n) | 2 b q (n^2/p^2 + k n) | twice: layers (R-1) q k b s, entry and exit (R-1)/R^2 b w s |
| phantom, private | q (n^2/p^2 + 2 (p-1) k n/p) | 2 b times that | the same, with (R-1) q^2 k b s for each layer |

A layer that reads the latents of the one before it as well (`latents="both"`) has q (p-1) k n/p more weights, takes 2 b
times as many FLOPs more, and sends nothing for it.

Outside the layers every rank has its own tokens with all features, b/R of them; inside, the group's with its own
features. Phantom goes from one to the other and back in all-to-alls. A column-parallel layer gathers its input (tokens
at the entry, features inside) and reduce-scatters its gradient; a row-parallel one reduce-scatters its output and
gathers its gradient; a column-parallel one whose output leaves ends in an all-to-all. A norm of features that lie on
several ranks gathers its statistics and sums those of its gradient. "Twice" is forward and backward, but for an input
that needs no gradient. Torch's own TP cuts the same pairs, but all its ranks hold the same b tokens outside: nothing
enters, sums are all-reduced, and what is no such layer each rank computes for all b.

What DDP sends for the parameters of TP and phantom that every rank holds, and for shards where W > R, is not counted in
their rows: it depends on W, and on the rest of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_phantom.config import check_mixing, check_phantom_width, is_int
from lightning_phantom.cost.collectives import Collective, Cut, Group, cuts, exact_collectives, phantom_collectives
from lightning_phantom.cost.layer import Layer, as_layers, latents_of
from lightning_phantom.cost.methods import METHODS
from lightning_phantom.errors import PhantomError

# Bytes per element, by the names torch gives its types.
ELEMENT_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
TENSOR_PARALLEL = tuple(method for method in METHODS if method.startswith("tensor_parallel"))


@dataclass(frozen=True)
class Cost:
    """What one rank holds, computes and sends in a training step.

    Attributes:
        weights: parameters held, biases included.
        flops_forward: floating-point operations of the forward.
        flops_backward: floating-point operations of the backward.
        layer_bytes: bytes of activations and their gradients that layers send inside.
        boundary_bytes: bytes of activations and their gradients sent where layers read and write whole tokens.
        calls: collectives issued.
        weight_bytes: bytes of weights and of their gradients sent: what data parallelism sends.
        replicated: parameters of those held that every rank holds alike.
    """

    weights: int = 0
    flops_forward: int = 0
    flops_backward: int = 0
    layer_bytes: int = 0
    boundary_bytes: int = 0
    calls: int = 0
    weight_bytes: int = 0
    replicated: int = 0

    @property
    def flops(self) -> int:
        """Floating-point operations of forward and backward."""
        return self.flops_forward + self.flops_backward

    @property
    def sent_bytes(self) -> int:
        """Bytes sent, of whatever kind."""
        return self.layer_bytes + self.boundary_bytes + self.weight_bytes

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class CostEstimate:
    """The costs of one group of R ranks side by side, per rank and step.

    Attributes:
        phantom: phantom parallelism.
        tensor_parallel: tensor parallelism in Megatron's column and row pairs.
        tensor_parallel_layerwise: tensor parallelism in column-parallel layers alone.
        tensor_parallel_torch: torch's own tensor parallelism, in Megatron's pairs.
    """

    phantom: Cost
    tensor_parallel: Cost
    tensor_parallel_layerwise: Cost
    tensor_parallel_torch: Cost


def phantom_weights(
    in_features: int,
    out_features: int,
    num_blocks: int,
    phantom_width: int,
    bias: bool,
    mixing: str = "pairwise",
    in_before: int = 0,
    width_before: int = 0,
) -> int:
    """Parameters of a phantom layer, all ranks together: in*out/p + k*in + (p-1)*k*out, and out for the bias.

    In private mixing it is (p-1)*k*in. Where the latents are made of the input of the layer before, `in_before` is that
    one's width; where that layer's latents are read, too, `width_before` is their k.
    """
    p = num_blocks
    made = (p - 1) * phantom_width if mixing == "private" else phantom_width
    read = (p - 1) * (phantom_width + width_before)
    return in_features * out_features // p + made * (in_before or in_features) + (read + bias) * out_features


def estimate_cost(
    layers: Sequence[Layer | tuple[int, int]],
    num_blocks: int,
    phantom_width: int | float,
    num_ranks: int,
    tokens: int,
    dtype: object = "float32",
    entry_needs_grad: bool = True,
    mixing: str = "pairwise",
    latents: str = "own",
) -> CostEstimate:
    """Count weights, FLOPs, bytes and calls of a training step, per rank, for phantom and for tensor parallelism.

    Args:
        layers: `(in_features, out_features)` pairs, which form one FFN from first to last, or `Layer` records, FFN by
            FFN and in the order of the forward.
        num_blocks: p.
        phantom_width: k, an int or a fraction of the block width (see `PhantomConfig`).
        num_ranks: R, which divides p.
        tokens: rows of the activations of one step on this group of ranks together (batch times sequence length). The
            bytes are exact where every rank has as many.
        dtype: type of the activations that travel: a torch dtype or its name.
        entry_needs_grad: for pairs: whether the input of the first needs a gradient.
        mixing: for pairs: how blocks mix, as in `PhantomConfig`; records have theirs.
        latents: for pairs: which latents the layers read, each but the first.

    Returns:
        The record of the four costs.

    Raises:
        PhantomError: sizes that do not divide, an empty list, an unknown dtype.

    Examples:
        >>> cost = estimate_cost([(4096, 4096)] * 4, num_blocks=4, phantom_width=64, num_ranks=4, tokens=512)
        >>> cost.phantom.flops / cost.tensor_parallel.flops
        0.3125
    """
    check_phantom_width(phantom_width)
    check_mixing(mixing, latents)
    check_ints(("num_blocks", num_blocks, 2), ("num_ranks", num_ranks, 1), ("tokens", tokens, 0))
    if num_blocks % num_ranks:
        raise PhantomError(f"num_ranks={num_ranks} does not divide num_blocks={num_blocks}.")
    group = Group(num_ranks, tokens, element_bytes_of(dtype))
    given, phantom = as_layers(layers, entry_needs_grad, mixing, latents), Cost()
    for layer in given:
        if layer.in_features % num_blocks or layer.out_features % num_blocks:
            raise PhantomError(
                f"a layer of {layer.in_features} -> {layer.out_features} features does not divide into "
                f"num_blocks={num_blocks} blocks."
            )
        phantom += _phantom(layer.with_width(phantom_width, num_blocks), group, num_blocks)
    return CostEstimate(phantom, *(exact_cost(given, method, group) for method in TENSOR_PARALLEL))


def exact_cost(layers: Sequence[Layer], method: str, group: Group) -> Cost:
    """What tensor parallelism takes of these layers, in one of its ways (`TENSOR_PARALLEL`)."""
    return sum((_exact(layer, group, cut) for layer, cut in cuts(layers, method)), Cost())


# One layer


def _phantom(layer: Layer, group: Group, p: int) -> Cost:
    latents = latents_of(layer, p)
    q, m_in, m_out = p // group.num_ranks, layer.in_features // p, layer.out_features // p
    local, compressor = q * m_out * m_in, q * latents.made * latents.in_features // p
    decompressor = q * m_out * (p - 1) * (latents.width + latents.before)
    products = local + compressor + decompressor
    # Backward: a product per weight, and one per value that needs a gradient. The latents always need theirs.
    backward = products + decompressor + local * layer.needs_input_grad + compressor * latents.needs_grad
    weights = products + layer.bias * q * m_out
    return _cost(weights, products, backward, group, phantom_collectives(layer, group, p))


def _exact(layer: Layer, group: Group, cut: Cut) -> Cost:
    products = layer.in_features * layer.out_features // group.num_ranks
    weights = products + layer.bias * (layer.out_features if cut.row else layer.out_features // group.num_ranks)
    backward = products * (1 + layer.needs_input_grad)
    cost = _cost(weights, products, backward, group, exact_collectives(layer, group, cut))
    return replace(cost, replicated=layer.bias * cut.row * layer.out_features)


def _cost(weights: int, forward: int, backward: int, group: Group, collectives: Sequence[Collective]) -> Cost:
    """`forward` and `backward` are multiplications of one token."""
    return Cost(
        weights=weights,
        flops_forward=2 * group.tokens * forward,
        flops_backward=2 * group.tokens * backward,
        layer_bytes=sum(c.sent_bytes for c in collectives if not c.boundary),
        boundary_bytes=sum(c.sent_bytes for c in collectives if c.boundary),
        calls=sum(c.calls for c in collectives),
    )


def check_ints(*given: tuple[str, int, int]) -> None:
    """Raise PhantomError unless each (name, value, least) holds an int of at least so much."""
    for name, value, least in given:
        if not is_int(value) or value < least:
            raise PhantomError(f"{name}={value!r}: needs an int of at least {least}.")


def element_bytes_of(dtype: object) -> int:
    """Bytes per element of a torch dtype or its name; raises PhantomError for others."""
    size = ELEMENT_BYTES.get(str(dtype).removeprefix("torch."))
    if size is None:
        raise PhantomError(f"dtype={dtype!r}: choose one of {', '.join(ELEMENT_BYTES)}.")
    return size
