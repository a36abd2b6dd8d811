"""The operator of phantom layers: products with the blocks of a rank, and what they read of other blocks.

For one or more layers that read the same x [T, in/R], with any mixing (`cut.Mixing`):

    z_i = L_i x_i + D_i (latents of the others) + E_i (latents of the others, from the layer before) + b_i

Each of the three terms but the first may be missing. The latents that x itself makes (C x) are those of the layers
here, and those that layers further on have asked for: they come out beside z, and go into the operator again there.

Everything lies in feature layout: activations [T, q*w] are seen as [q, T, w], factors [q*rows, w] as [q, rows, w], so
that the q blocks of this rank are the batch dimension of every product. The latents of all layers travel side by side
in one collective, while the products with L, which need nothing from elsewhere, are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_phantom.distributed.agreement import Rows
from lightning_phantom.distributed.ranks import Waiting
from lightning_phantom.layers.cut import Cut, Mixing
from lightning_phantom.layers.split import of_those_read
from lightning_phantom.layers.twice import differentiate


class Part(NamedTuple):
    """The tensors of one layer.

    Attributes:
        weight: L [q*m_out, m_in].
        compressor: C [q*r, m_in]; None where it reads no latents of x.
        decompressor: D [q*m_out, (p-1)*k], with C.
        bias: b [q*m_out], or None.
        decompressor_before: E [q*m_out, (p-1)*k]; None where it reads no latents of the layer before.
        before: those latents as they arrive, [R, T, w], with E.
    """

    weight: Any
    compressor: Any
    decompressor: Any
    bias: Any
    decompressor_before: Any = None
    before: Any = None


EACH = len(Part._fields)
_C, _D, _B, _E, _BEFORE = range(1, EACH)


class Message:
    """Latents on their way from one layer's call to the next one's, and their gradient on its way back.

    Attributes:
        arriving: waits for the latents; None: they are there.
        returning: waits for the gradient, once that is on its way; until then None.
    """

    def __init__(self, arriving: Waiting | None) -> None:
        self.arriving = arriving
        self.returning: Waiting | None = None

    def taken(self) -> Waiting | None:
        """What waits for the gradient, which only one can take."""
        waiting, self.returning = self.returning, None
        return waiting


class Call(NamedTuple):
    """Where layers are computed, and how.

    Attributes:
        cut: the blocks and their ranks.
        mixing: how the blocks mix.
        rows: the tokens of each rank; None in one process.
        what: what the ranks call their exchange.
        num_layers: how many layers read x.
        messages: of each of those, how its latents of the layer before travel; None: they are there.
        asked: of each compressor of layers further on, how what it makes travels.
    """

    cut: Cut
    mixing: Mixing
    rows: Rows | None
    what: str
    num_layers: int
    messages: tuple[Message | None, ...]
    asked: tuple[Message, ...]

    def parts(self, tensors: Sequence[Any]) -> tuple[list[Part], list[int]]:
        """The tensors of each layer, and the places of all compressors: the layers' own, then those asked for."""
        layers = [Part(*tensors[n * EACH : (n + 1) * EACH]) for n in range(self.num_layers)]
        own = [n * EACH + _C for n, layer in enumerate(layers) if layer.compressor is not None]
        return layers, [*own, *range(self.num_layers * EACH, len(tensors))]

    def start_back(self, parts: Sequence[Tensor]) -> list[Waiting]:
        """Send gradients of latents back to who made them, side by side."""
        if not parts:
            return []
        what = f"gradient: {self.what}"
        widths = [part.shape[-1] for part in parts]
        together = once(self.mixing.start_back(self.cut.ranks, _beside(parts), self.rows, what))
        return [lambda m=m: together().split(widths, -1)[m] for m in range(len(parts))]  # type: ignore[misc]


def mix(x: Tensor, call: Call, *tensors: Any) -> list[Tensor]:
    """What `Mix` computes, as operations that compilers and transforms know, with any gradient.

    Without gradients it also takes less time for a few tokens, as in decoding: fewer views are made.
    """
    cut, mixing = call.cut, call.mixing
    layers, compressors = call.parts(tensors)
    xs = cut.features(x)
    made = []
    for place in compressors:
        sent = mixing.sent(torch.bmm(xs, cut.rows(tensors[place]).mT).transpose(0, 1).flatten(1), cut)
        made.append(mixing.exchange(sent, cut.ranks, call.rows, call.what))
    zs, own = [], iter(made)
    for layer in layers:
        z = torch.bmm(xs, cut.rows(layer.weight).mT)
        if layer.compressor is not None:
            z = torch.baddbmm(z, mixing.of_others(next(own), cut), cut.rows(layer.decompressor).mT)
        if layer.before is not None:
            z = torch.baddbmm(z, mixing.of_others(layer.before, cut), cut.rows(layer.decompressor_before).mT)
        z = z.transpose(0, 1).flatten(1)
        zs.append(z if layer.bias is None else z + layer.bias)
    return [*zs, *made]


class Mix(torch.autograd.Function):
    """The operator of the module's docstring.

    Takes x [T, in/R], the tensors of each layer in turn (`Part`), and the compressors that are asked for. Gives z
    [T, out/R] of each layer, then the latents [R, T, w] that each compressor has made, as they arrive. Those asked for
    may still be on their way then: whoever reads them waits (`Message`).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Call, *tensors: Any) -> tuple[Tensor, ...]:
        """See the class."""
        cut, mixing = call.cut, call.mixing
        layers, compressors = call.parts(tensors)
        xs = cut.features(x)
        num_own = len(compressors) - len(call.asked)

        made = x.new_empty(x.shape[0], sum(tensors[place].shape[0] for place in compressors))
        gs = made.split([tensors[place].shape[0] for place in compressors], 1)
        for place, g in zip(compressors, gs, strict=True):
            torch.bmm(xs, cut.rows(tensors[place]).mT, out=cut.features(g))
        arrived: list[Tensor] = []
        if compressors:
            parts = [mixing.sent(g, cut) for g in gs]
            together = made if parts[0] is gs[0] else _beside(parts)
            arriving = mixing.start(cut.ranks, together, call.rows, call.what)
            # The collective may still write there when autograd has these: as views it would forbid that.
            arrived = [part.data for part in arriving.tensor.split([part.shape[-1] for part in parts], -1)]

        zs = [x.new_empty(x.shape[0], layer.weight.shape[0]) for layer in layers]
        for layer, z in zip(layers, zs, strict=True):
            torch.bmm(xs, cut.rows(layer.weight).mT, out=cut.features(z))

        if num_own:
            arriving()
        elif compressors:
            waiting = once(arriving)
            for asked in call.asked:
                asked.arriving = waiting
        own = iter(arrived)
        for layer, z, message in zip(layers, zs, call.messages, strict=True):
            z_blocks = cut.features(z)
            if layer.compressor is not None:
                read = mixing.of_others(next(own), cut)
                torch.baddbmm(z_blocks, read, cut.rows(layer.decompressor).mT, out=z_blocks)
            if layer.before is not None:
                if message is not None and message.arriving is not None:
                    message.arriving()
                read = mixing.of_others(layer.before, cut)
                torch.baddbmm(z_blocks, read, cut.rows(layer.decompressor_before).mT, out=z_blocks)
            if layer.bias is not None:
                z += layer.bias

        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *arrived[:num_own], *tensors)
        return (*zs, *arrived)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x and of all tensors, from those of each z and of the latents that others have read."""
        call: Call = ctx.call
        cut, mixing = call.cut, call.mixing
        num_made = len(grads) - call.num_layers
        num_own = num_made - len(call.asked)
        x, *saved = ctx.saved_tensors
        arrived, tensors = saved[:num_own], saved[num_own:]
        layers, compressors = call.parts(tensors)
        needs_x, _, *needed = ctx.needs_input_grad
        grads_of_z, dgs = grads[: call.num_layers], grads[call.num_layers :]
        weights = [tensor for layer in layers for tensor in layer]
        dzs, needs = of_those_read(grads_of_z, needed[: len(weights)], weights, x.shape[0])
        for place, dg in zip(compressors[:num_own], dgs, strict=False):
            needs[place] |= needed[place] and dg is not None  # of latents that only layers further on have read
        needs += needed[len(weights) :]
        if torch.is_grad_enabled():
            return Mix.differentiable_backward(call, (x, *tensors), (needs_x, *needs), dzs, dgs)
        xs, ds = cut.features(x), [cut.features(dz) for dz in dzs]

        # What has to travel leaves first: the products with L need not wait for it.
        returning: dict[int, Waiting] = {}
        sending: dict[int, Tensor] = {}
        for m, (place, dg) in enumerate(zip(compressors, dgs, strict=True)):
            if not needs_x and not needs[place]:
                continue
            if m < num_own:
                n = place // EACH
                h = mixing.to_others(torch.bmm(ds[n], cut.rows(layers[n].decompressor)), cut)
                sending[place] = h if dg is None else h + dg
            elif dg is not None:
                waiting = call.asked[m - num_own].taken()
                if waiting is None:
                    sending[place] = dg
                else:
                    returning[place] = waiting
        returning |= zip(sending, call.start_back(list(sending.values())), strict=True)
        dbefore = {
            n: mixing.to_others(torch.bmm(ds[n], cut.rows(layer.decompressor_before)), cut)
            for n, layer in enumerate(layers)
            if needs[n * EACH + _BEFORE]
        }
        travelling = [n for n in dbefore if call.messages[n] is not None]
        for n, waiting in zip(travelling, call.start_back([dbefore[n] for n in travelling]), strict=True):
            call.messages[n].returning = waiting  # type: ignore[union-attr]
            dbefore[n] = dbefore[n].new_zeros(()).expand_as(dbefore[n])  # what is on its way comes by the message

        grads_of: list[Tensor | None] = [None] * len(tensors)
        dx = torch.empty_like(x) if needs_x else None
        own = iter(arrived)
        for n, (d_z, layer) in enumerate(zip(ds, layers, strict=True)):
            first = n * EACH
            latents = next(own) if layer.compressor is not None else None
            if needs[first]:
                grads_of[first] = torch.bmm(d_z.mT, xs).view_as(layer.weight)
            for place, read in ((first + _D, latents), (first + _E, layer.before)):
                if needs[place] and read is not None:
                    grads_of[place] = torch.bmm(d_z.mT, mixing.of_others(read, cut)).view_as(tensors[place])
            if needs[first + _B]:
                grads_of[first + _B] = dzs[n].sum(0)
            grads_of[first + _BEFORE] = dbefore.get(n)
            if dx is not None:
                _accumulate(cut.features(dx), d_z, cut.rows(layer.weight), first=n == 0)

        for place, waiting in returning.items():
            h_blocks = cut.features(mixing.own(waiting(), cut))
            if needs[place]:
                grads_of[place] = torch.bmm(h_blocks.mT, xs).view_as(tensors[place])
            if dx is not None:
                _accumulate(cut.features(dx), h_blocks, cut.rows(tensors[place]))
        return (dx, None, *grads_of)

    @staticmethod
    def differentiable_backward(
        call: Call,
        inputs: Sequence[Any],
        needed: Sequence[bool],
        dzs: Sequence[Tensor],
        dgs: Sequence[Tensor | None],
    ) -> tuple[Tensor | None, ...]:
        """The same as operations that have gradients themselves."""
        grads: list[Tensor | None] = [*dzs, *dgs]

        def again(x: Tensor, *tensors: Any) -> list[Tensor]:
            return [value for value, grad in zip(mix(x, call, *tensors), grads, strict=True) if grad is not None]

        dx, *others = differentiate(again, inputs, needed, [grad for grad in grads if grad is not None])
        return (dx, None, *others)


def once(waiting: Waiting) -> Waiting:
    """Wait but once, however often asked."""
    come: list[Tensor] = []

    def wait() -> Tensor:
        if not come:
            come.append(waiting())
        return come[0]

    return wait


def _beside(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)


def _accumulate(dx: Tensor, d: Tensor, factor: Tensor, first: bool = False) -> None:
    """Add d [q, T, rows] times factor [q, rows, w] to dx [q, T, w], or store it there when it is the first."""
    if first:
        torch.bmm(d, factor, out=dx)
    else:
        torch.baddbmm(dx, d, factor, out=dx)
