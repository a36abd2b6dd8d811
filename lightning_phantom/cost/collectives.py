"""What one rank gives to the others in a training step, layer by layer; `count` says by which rules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lightning_phantom.cost.layer import Layer, as_layers, is_row, latents_of


@dataclass(frozen=True)
class Group:
    """R ranks and the activations they exchange.

    Attributes:
        num_ranks: R.
        tokens: b, of all ranks together.
        element_bytes: s.
    """

    num_ranks: int
    tokens: int
    element_bytes: int

    def gathered(self, width: int) -> int:
        """Bytes of an all-gather or a reduce-scatter of b tokens with `width` features in all."""
        return (self.num_ranks - 1) * width * self.tokens * self.element_bytes // self.num_ranks

    def exchanged(self, width: int) -> int:
        """Bytes of an all-to-all of the same, between own tokens and own features."""
        return (self.num_ranks - 1) * width * self.tokens * self.element_bytes // self.num_ranks**2


class Collective(NamedTuple):
    """What one rank gives to the others at one place of a step.

    Attributes:
        of: `"input"`, `"latents"` or `"output"` of a layer, `"statistics"` of a norm behind it, or of their gradient.
        backward: whether it is the gradient's.
        sent_bytes: bytes that this rank sends.
        calls: collectives issued; 0 where it travels in a sibling's.
        boundary: whether whole tokens are read or written there.
        kind: `"all_reduce"` for torch's, by a rate of its own; else `"exchange"`.
    """

    of: str
    backward: bool
    sent_bytes: int
    calls: int = 1
    boundary: bool = False
    kind: str = "exchange"


def phantom_collectives(layer: Layer, group: Group, num_blocks: int) -> list[Collective]:
    """All-to-alls at entry and exit; a gather of the latents, and a reduce-scatter of their gradients.

    In private mixing these are all-to-alls, too. The layer's width is resolved.
    """
    if group.num_ranks == 1:
        return []
    entered, left = group.exchanged(layer.in_features), group.exchanged(layer.out_features)
    ways = (False, True)
    latents = latents_of(layer, num_blocks)
    # A rank's q blocks send their k latents to every other rank, in private mixing once for each of its q blocks.
    copies = num_blocks // group.num_ranks if layer.mixing == "private" else 1
    sent = group.gathered(num_blocks * latents.width * copies)
    alone = 1 - layer.shares_input
    found = [Collective("latents", back, sent, alone and 1 - (latents.with_others and not back)) for back in ways]
    if layer.enters and not layer.shares_input:
        found += [Collective("input", back, entered, 1, True) for back in ways[: 1 + layer.needs_input_grad]]
    if layer.leaves:
        found += [Collective("output", back, left, 1, True) for back in ways]
    return found + norm_collectives(layer, group)


class Cut(NamedTuple):
    """How tensor parallelism cuts a dense layer.

    Attributes:
        row: by row, or by column.
        by_torch: whether torch's own does.
        reads_whole: whether it finds whole tokens, where torch's own cuts by row.
    """

    row: bool = False
    by_torch: bool = False
    reads_whole: bool = False


def cuts(layers: Sequence[Layer], method: str) -> Iterator[tuple[Layer, Cut]]:
    """Each layer, and how a method of `TENSOR_PARALLEL` cuts it."""
    whole = False
    for layer in (each.as_exact() for each in as_layers(layers)):
        row = method != "tensor_parallel_layerwise" and is_row(layer)
        yield layer, Cut(row, method == "tensor_parallel_torch", layer.enters or whole)
        if not row:
            whole = layer.leaves or bool(layer.norms)  # torch gathers it for all that read it


def exact_collectives(layer: Layer, group: Group, cut: Cut) -> list[Collective]:
    """Those of a dense layer that is cut so; see the module's docstring."""
    if group.num_ranks == 1:
        return []
    if cut.by_torch:
        return _torch_collectives(layer, group, cut)
    ways, row = (False, True), cut.row
    found: list[Collective] = []
    if not layer.shares_input and (layer.enters or not row):
        sent = group.exchanged(layer.in_features) if row else group.gathered(layer.in_features)
        found = [Collective("input", back, sent, 1, layer.enters) for back in ways[: 1 + layer.needs_input_grad]]
    if row:
        found += [Collective("output", back, group.gathered(layer.out_features), 1, True) for back in ways]
    elif layer.leaves:
        found += [Collective("output", back, group.exchanged(layer.out_features), 1, True) for back in ways]
    return found if row else found + norm_collectives(layer, group)


def norm_collectives(layer: Layer, group: Group) -> list[Collective]:
    """Every rank tells the others what its features say of each token; backward such numbers are added up."""
    found = []
    for numbers in filter(None, layer.norms):
        elements, size = numbers * group.tokens * (group.num_ranks - 1), max(4, group.element_bytes)
        found.append(Collective("statistics", False, elements * size))
        found.append(Collective("statistics", True, 2 * elements // group.num_ranks * size))
    return found


def _torch_collectives(layer: Layer, group: Group, cut: Cut) -> list[Collective]:
    """All-reduces of what a row-parallel layer returns and of a column-parallel one's gradient; siblings share none."""
    left, entered, found = group.gathered(layer.out_features), group.gathered(layer.in_features), []
    if cut.row:
        found.append(Collective("output", False, 2 * left, 1, True, "all_reduce"))
    elif layer.leaves or layer.norms:
        found.append(Collective("output", False, left, 1, True))
    if layer.needs_input_grad and not cut.row:
        found.append(Collective("input", True, 2 * entered, 1, True, "all_reduce"))
    elif layer.needs_input_grad and cut.reads_whole:
        found.append(Collective("input", True, entered, 1, True))
    return found
