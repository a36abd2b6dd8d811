"""The siblings of the operator, `mixing` and `latents`, against dense matrices, on one rank and on several."""

import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from reference import chain_oracle, off_diagonal
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_phantom.config import LATENTS, MIXINGS, PhantomConfig
from lightning_phantom.distributed.agreement import agreement_of
from lightning_phantom.errors import LayoutError
from lightning_phantom.layers.split import split_layers
from lightning_phantom.swap import phantomize_

KINDS = list(itertools.product(MIXINGS, LATENTS))
WIDTHS = (16, 32, 24, 40, 8)
ACTIVATIONS = (torch.tanh, nn.functional.silu, torch.nn.functional.softplus, lambda z: z)


class Chain(nn.Module):
    """Linears that elementwise operations join."""

    def __init__(self):
        super().__init__()
        sizes = enumerate(itertools.pairwise(WIDTHS))
        self.fcs = nn.ModuleList(nn.Linear(a, b, bias=n != 1, dtype=torch.float64) for n, (a, b) in sizes)

    def forward(self, x):
        for fc, activation in zip(self.fcs, ACTIVATIONS, strict=True):
            x = activation(fc(x))
        return x


def chain(mixing, latents, p, group=None):
    """A chain in phantom layout, and the global factors of its layers by name, the same on every rank."""
    config = PhantomConfig(p, 0.7, {"*": "phantom"}, init="random", mixing=mixing, latents=latents)
    module = phantomize_(Chain(), config, group)
    generator = torch.Generator().manual_seed(p)
    layers = list(split_layers(module).values())
    assert [layer.latents for layer in layers] == ["own", *[latents] * 3]
    factors = []
    for layer in layers:
        whole = {}
        for name, parameter in layer.named_parameters(recurse=False):
            shape = (parameter.shape[0] * layer.ranks.size, *parameter.shape[1:])
            whole[name] = torch.randn(shape, dtype=torch.float64, generator=generator) / 4
            with torch.no_grad():
                parameter.copy_(layer.share_of(name, whole[name]))
            whole[name].requires_grad_()
        factors.append(whole)
    return module, layers, factors


def batch(p, counts):
    generator = torch.Generator().manual_seed(100 + p)
    x = torch.randn(sum(counts), WIDTHS[0], dtype=torch.float64, generator=generator)
    return x, torch.randn(sum(counts), WIDTHS[-1], dtype=torch.float64, generator=generator)


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def largest_error(kind, p, group=None, across=None):
    """The largest difference of outputs and gradients from the oracle, in the value's size.

    Every rank has its own rows, the third of four none. Shards' gradients are averaged over the groups, `across`.
    """
    mixing, latents = kind
    world, me = (dist.get_world_size(), dist.get_rank()) if group else (1, 0)
    counts = [3 + rank if rank != 2 else 0 for rank in range(max(world, 1))]
    module, layers, factors = chain(mixing, latents, p, group)
    x, grad = batch(p, counts)
    whole = x.clone().requires_grad_()
    z = chain_oracle(factors, ACTIVATIONS, whole, mixing, latents, p)
    z.backward(grad / world)
    mine = x.split(counts)[me].clone().requires_grad_()
    out = module(mine).reshape(-1, WIDTHS[-1])
    (out * grad.split(counts)[me]).sum().backward()
    with torch.no_grad():
        again = module(mine).reshape(-1, WIDTHS[-1])
    pairs = []
    if counts[me]:
        pairs += [(again, out)]
        pairs += [(out, z.split(counts)[me]), (mine.grad, whole.grad.split(counts)[me] * world)]
    for layer, wanted in zip(layers, factors, strict=True):
        for name, parameter in layer.named_parameters(recurse=False):
            if across is not None:
                dist.all_reduce(parameter.grad, group=across)
                parameter.grad /= dist.get_world_size(across)
            pairs.append((parameter.grad, layer.share_of(name, wanted[name].grad)))
    return max(difference(a.reshape(b.shape), b) for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_equals_the_oracle(kind):
    assert max(largest_error(kind, p) for p in (2, 4, 8)) < 1e-10


def _several_ranks():
    group, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    found = {(kind, p): largest_error(kind, p, group) for kind in KINDS for p in (4, 8)}
    if size == 4:
        groups, pairs = ([dist.new_group(ranks) for ranks in two] for two in ([[0, 1], [2, 3]], [[0, 2], [1, 3]]))
        own = groups[rank // 2], pairs[rank % 2]
        found |= {(kind, "2 x 2"): largest_error(kind, 4, *own) for kind in KINDS}
    return {
        "errors": found,
        "twice": max(_differentiated_twice(kind, group) for kind in KINDS),
        "checkpointed": [_checkpointed(kind, group) for kind in KINDS],
        "shared": max(_shared_batch(kind, group) for kind in KINDS),
        "order": {kind: _order(kind, group) for kind in (("pairwise", "previous"), ("private", "own"))},
        "apart": [_called_apart(latents, group) for latents in ("both", "previous")],
    }


def _differentiated_twice(kind, group):
    """A gradient penalty: its gradients are those of the oracle."""
    world, me = (dist.get_world_size(), dist.get_rank()) if group else (1, 0)
    counts = [2 + rank for rank in range(world)]
    module, layers, factors = chain(*kind, 4, group)
    x, _ = batch(4, counts)
    mine, whole = x.split(counts)[me].clone().requires_grad_(), x.clone().requires_grad_()
    outputs = module(mine), chain_oracle(factors, ACTIVATIONS, whole, *kind, 4)
    for out, rows, share in zip(outputs, (mine, whole), (1, world), strict=True):
        (gradient,) = torch.autograd.grad(out.square().sum(), rows, create_graph=True)
        (gradient.square().sum() / share).backward()
    return max(
        difference(parameter.grad, layer.share_of(name, wanted[name].grad))
        for layer, wanted in zip(layers, factors, strict=True)
        for name, parameter in layer.named_parameters(recurse=False)
    )


def _shared_batch(kind, group):
    """All ranks read one batch, as in prediction."""
    module, _, factors = chain(*kind, 4, group)
    x, _ = batch(4, [3])
    agreement_of(group).shared_batches = True
    try:
        with torch.no_grad():
            return difference(module(x) * 1.0, chain_oracle(factors, ACTIVATIONS, x, *kind, 4))
    finally:
        agreement_of(group).shared_batches = False


def _checkpointed(kind, group):
    """Activation checkpointing of the whole chain computes the same gradients, of either kind."""
    module, *_ = chain(*kind, 4, group)
    x, _ = batch(4, [3])
    found = []
    for call in (module, *(partial(checkpoint, module, use_reentrant=way) for way in (True, False))):
        module.zero_grad()
        rows = x.clone().requires_grad_()
        call(rows).square().sum().backward()
        found.append([rows.grad, *(p.grad.clone() for p in module.parameters())])
    return all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def _called_apart(latents, group):
    """The messages where the layers of a chain are not called one after the other on the same tokens."""
    module, *_ = chain("pairwise", latents, 4, group)
    first, second, *_ = module.fcs
    x, h = batch(4, [3])[0], torch.zeros(3, WIDTHS[1], dtype=torch.float64)

    def checkpointed():
        out = checkpoint(second, checkpoint(first, x.clone().requires_grad_(), use_reentrant=True), use_reentrant=True)
        return out.sum().backward()

    def without_gradient():
        with torch.no_grad():
            h = first(x)
        return second(h)

    cases = {
        "first alone": lambda: second(h),
        "twice": lambda: (second(first(x)), second(h)),
        "other rows": lambda: (first(x), second(h[:2])),
        "other dtype": lambda: (first(x), second.float()(h.float())),
        "without gradient": without_gradient,
        "checkpointed apart": checkpointed,
    }
    found = {}
    for name, call in cases.items():
        try:
            call()
        except LayoutError as error:
            found[name] = str(error)
        second.double()
    return found


def _order(kind, group):
    """The order in which collectives and products happen, in a chain of three."""
    events = []
    module, layers, _ = chain(*kind, 4, group)
    ranks = layers[0].ranks

    def note(what, real):
        def start(*args):
            number = sum(event.startswith(f"start {what}") for event in events)
            events.append(f"start {what} {number}")
            arriving = real(*args)

            def waited():
                events.append(f"wait {what} {number}")
                return arriving()

            waited.tensor = getattr(arriving, "tensor", None)
            return waited

        return start

    for layer in layers:
        assert layer.ranks.process_group is ranks.process_group
        for what in ("all_gather", "reduce_scatter", "transpose"):
            setattr(layer.ranks, what, note(what, getattr(type(ranks), what).__get__(layer.ranks)))

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "bmm" in func.name():
                events.append("product")
            return func(*args, **(kwargs or {}))

    with Products():
        module(batch(4, [3])[0]).sum().backward()
    return events


def _check_order(events, kind):
    """Between the start of an exchange and the wait for it there are products that need nothing of it."""
    between = {}
    for n, event in enumerate(events):
        word, _, what = event.partition(" ")
        if word == "wait":
            between[what] = events[events.index(f"start {what}") : n].count("product")
    if kind == ("private", "own"):  # the product with L; dL, dD and L^T d (which the first layer's input needs not)
        assert between == {f"transpose {n}": 1 if n < 4 else 3 if n < 7 else 2 for n in range(8)}, events
        return
    # Forward: the first layer waits for its own and the second's, after its L. Beside the third's are L and D of the
    # second, C of the fourth and L of the third; beside the fourth's L and D of the third and its own L.
    assert {n: between[f"all_gather {n}"] for n in range(3)} == {0: 1, 1: 4, 2: 3}, events
    # Backward: dL, dD and L^T d of two layers, of the first no L^T d; D^T d of the layer before, and dC and C^T h of
    # the one behind. The first's own: dL and dD, and dC of the second.
    assert {n: between[f"reduce_scatter {n}"] for n in range(4)} == {0: 7, 1: 9, 2: 8, 3: 3}, events


@pytest.mark.parametrize("size", [2, 4])
def test_several_ranks(size):
    for result in run_ranks(size, _several_ranks):
        assert max(result["errors"].values()) < 1e-10, result["errors"]
        assert result["twice"] < 1e-10 and result["shared"] < 1e-10 and all(result["checkpointed"])
        for kind, events in result["order"].items():
            _check_order(events, kind)
        for messages in result["apart"]:
            _check_messages(messages)


def test_one_rank_differentiated_twice_and_checkpointed():
    for kind in KINDS:
        assert _differentiated_twice(kind, None) < 1e-10
        assert _checkpointed(kind, None)


def _check_messages(messages):
    alone = "'fcs.1' reads latents of 'fcs.0', which has not been called since 'fcs.1' was last"
    assert alone in messages["first alone"] and alone in messages["twice"]
    assert "was given 2 rows" in messages["other rows"] or "was given [2" in messages["other rows"]
    assert "of torch.float32 where 'fcs.0' was last called with" in messages["other dtype"]
    assert "gradients on or off" in messages["without gradient"]
    assert "set latents='own'" in messages["checkpointed apart"]


def test_layers_called_apart_are_refused():
    for latents in ("both", "previous"):
        _check_messages(_called_apart(latents, None))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[1] != "own"])
def test_latents_that_only_the_next_layer_reads(kind):
    """The first layer's output is dropped; what the second reads of it besides still has its gradients."""
    module, layers, factors = chain(*kind, 4)
    first, second, *_ = module.fcs
    x = batch(4, [5])[0].requires_grad_()
    h = torch.tanh(first(x)).detach()
    second(h).square().sum().backward()
    grads = [x.grad, *(p.grad for layer in layers[:2] for _, p in layer.named_parameters(recurse=False))]
    whole = x.detach().clone().requires_grad_()
    ((_, latents), given) = kind, factors[:2]
    z = h @ torch.block_diag(*given[1]["weight"].chunk(4)).mT
    own = off_diagonal(given[1]["compressor_weight"], given[1]["decompressor_weight"], 4, kind[0])
    z = z + (whole if latents == "previous" else h) @ own.mT
    if latents == "both":
        made, read = given[0]["compressor_weight"], given[1]["decompressor_before_weight"]
        z = z + whole @ off_diagonal(made, read, 4, kind[0]).mT
    z.square().sum().backward()
    wanted = [
        whole.grad,
        *(given[n][name].grad for n in (0, 1) for name, _ in layers[n].named_parameters(recurse=False)),
    ]
    assert any(grad is not None for grad in wanted[1:5]) is (latents == "both")
    for got, right in zip(grads, wanted, strict=True):
        assert (got is None or not got.any()) if right is None else difference(got, right) < 1e-10
