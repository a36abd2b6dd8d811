"""A linear layer as the cost model sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lightning_phantom.config import resolve_phantom_width
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
        gates: whether its output is a gate and what it gates, side by side. In phantom layout both stay inside; tensor
            parallelism goes back to whole tokens there, and in again.
        gated: whether its input is the product of such two.
        needs_input_grad: whether its input needs a gradient; False at the first layer of a model fed with data.
        shares_input: whether it rides on the collectives of a sibling before it that reads the same value.
        phantom_width: k of this layer alone; None takes the one given to `estimate_cost`.
        depth: how many linears lie before it in its FFN: in Megatron's pairs even ones are cut by column, odd ones by
            row. None: one more than the layer before it in the list, or 0 where it enters. Where linears of both
            write into one value (a residual inside), Megatron's pairs send more than is counted.
        norms: the norms of its output where that stays inside: how many numbers a token each rank tells the others, 2
            of a layer norm and 1 of an RMS norm.
        mixing: how its blocks mix in phantom layout, as in `PhantomConfig`.
        latents: which latents it reads there: `"own"`; `"both"` or `"previous"` with a predecessor.
        predecessor: the layer before it in its chain, itself without one.
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
    mixing: str = "pairwise"
    latents: str = "own"
    predecessor: Layer | None = None
    gates: bool = False
    gated: bool = False

    @property
    def dense_weights(self) -> int:
        """Parameters of the dense layer."""
        return (self.in_features + self.bias) * self.out_features

    def after(self, predecessor: Layer, latents: str) -> Layer:
        """The same layer, reading latents of what comes before it."""
        return replace(self, latents=latents, predecessor=replace(predecessor, predecessor=None))

    def as_exact(self) -> Layer:
        """The same layer in tensor parallelism, where a norm behind a gate finds whole tokens."""
        enters, leaves = self.enters or self.gated, self.leaves or self.gates
        norms = () if self.gates else self.norms
        return replace(self, enters=enters, leaves=leaves, norms=norms, gates=False, gated=False)

    def with_width(self, phantom_width: int | float, num_blocks: int) -> Layer:
        """The same layer with its k, its own or that of `phantom_width`, resolved; and its predecessor so."""
        width = phantom_width if self.phantom_width is None else self.phantom_width
        k = resolve_phantom_width(width, self.in_features, self.out_features, num_blocks, self.mixing)
        before = self.predecessor and self.predecessor.with_width(phantom_width, num_blocks)
        return replace(self, phantom_width=k, predecessor=before)

    def without_width(self) -> Layer:
        """The same layer, of no width of its own."""
        return replace(self, phantom_width=None, predecessor=self.predecessor and self.predecessor.without_width())


class Latents(NamedTuple):
    """The latents of a phantom layer.

    Attributes:
        width: k, what each block reads of each other block.
        made: what each block makes.
        in_features: the width of what they are made of, all blocks together.
        before: what each block reads of each other block's in the layer before, beside them.
        needs_grad: whether what they are made of needs a gradient.
        with_others: whether they travel in the collective of those that the layer before makes for itself.
    """

    width: int
    made: int
    in_features: int
    before: int
    needs_grad: bool
    with_others: bool


def latents_of(layer: Layer, num_blocks: int) -> Latents:
    """The latents of a layer whose k is resolved (`Layer.with_width`)."""
    k = layer.phantom_width or 0
    made = (num_blocks - 1) * k if layer.mixing == "private" else k
    before = layer.predecessor
    if before is None or layer.latents == "own":
        return Latents(k, made, layer.in_features, 0, layer.needs_input_grad, False)
    if layer.latents == "both":
        return Latents(k, made, layer.in_features, before.phantom_width or 0, layer.needs_input_grad, False)
    return Latents(k, made, before.in_features, 0, before.needs_input_grad, before.latents == "own")


def as_layers(
    layers: Sequence[Layer | tuple[int, int]],
    entry_needs_grad: bool = True,
    mixing: str = "pairwise",
    latents: str = "own",
) -> list[Layer]:
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
            layer = replace(layer, mixing=mixing)
            if n and latents != "own":
                layer = layer.after(found[-1], latents)
        if layer.depth is not None:
            depth = layer.depth
        elif not layer.shares_input:
            depth = 0 if layer.enters else depth + 1
        found.append(replace(layer, depth=depth))
    return found


def is_row(layer: Layer) -> bool:
    """Whether a layer, of those that `as_layers` gives, is cut by row in Megatron's pairs."""
    return (layer.depth or 0) % 2 == 1
