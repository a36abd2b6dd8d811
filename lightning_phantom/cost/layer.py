"""A linear layer as the cost model sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_phantom.errors import PhantomError


@dataclass(frozen=True)
class Layer:
    """A linear layer as the cost model sees it.

    Attributes:
        in_features: width of the input, all ranks together.
        out_features: width of the output, all ranks together.
        bias: whether it has one.
        enters: whether its input is whole tokens: from outside the feed-forward network (FFN), or of a norm that
            needs them.
        leaves: whether something that needs whole tokens reads its output.
        needs_input_grad: whether its input needs a gradient; False at the first layer of a model fed with data.
        shares_input: whether it rides on the collectives of a sibling before it that reads the same value.
        phantom_width: k of this layer alone; None takes the one given to `estimate_cost`.
        depth: how many linears lie before it in its FFN: in Megatron's pairs even ones are cut by column, odd ones by
            row. None: one more than the layer before it in the list, or 0 where it enters. Where linears of both
            write into one value (a residual inside), Megatron's pairs send more than is counted.
        norms: the norms of its output where that stays inside: how many numbers a token each rank tells the others, 2
            of a layer norm and 1 of an RMS norm.
    """

    in_features: int
    out_features: int
    bias: bool = True
    enters: bool = False
    leaves: bool = False
    needs_input_grad: bool = True
    shares_input: bool = False
    phantom_width: int | None = None
    depth: int | None = None
    norms: tuple[int, ...] = ()

    @property
    def dense_weights(self) -> int:
        """Parameters of the dense layer."""
        return (self.in_features + self.bias) * self.out_features


def as_layers(layers: Sequence[Layer | tuple[int, int]], entry_needs_grad: bool = True) -> list[Layer]:
    """`Layer` records, each with its depth, of what `estimate_cost` is given.

    Raises:
        PhantomError: there is none.
    """
    if not layers:
        raise PhantomError("layers is empty: give (in_features, out_features) pairs or Layer records.")
    found: list[Layer] = []
    last, depth = len(layers) - 1, -1
    for n, layer in enumerate(layers):
        if not isinstance(layer, Layer):
            layer = Layer(*layer, enters=n == 0, leaves=n == last, needs_input_grad=n > 0 or entry_needs_grad)
        if layer.depth is not None:
            depth = layer.depth
        elif not layer.shares_input:
            depth = 0 if layer.enters else depth + 1
        found.append(replace(layer, depth=depth))
    return found


def is_row(layer: Layer) -> bool:
    """Whether a layer, of those that `as_layers` gives, is cut by row in Megatron's pairs."""
    return (layer.depth or 0) % 2 == 1
