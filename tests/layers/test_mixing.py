"""The siblings of the operator, `mixing` and `latents`, against dense matrices, on one rank and on several."""

import itertools

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from reference import chain_oracle
from torch import nn

from lightning_phantom.config import LATENTS, MIXINGS, PhantomConfig
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


def largest_error(kind, p, group=None, num_groups=1):
    """The largest difference of outputs and gradients from the oracle, in the value's size.

    Every rank of every group has its own rows, the third of four none; shards' gradients are averaged over the groups.
    """
    mixing, latents = kind
    world, me = (dist.get_world_size(), dist.get_rank()) if group else (1, 0)
    counts = [3 + rank if rank != 2 or num_groups > 1 else 0 for rank in range(world)]
    module, layers, factors = chain(mixing, latents, p, group)
    x, grad = batch(p, counts)
    whole = x.clone().requires_grad_()
    z = chain_oracle(factors, ACTIVATIONS, whole, mixing, latents, p)
    z.backward(grad / world)
    mine = x.split(counts)[me].clone().requires_grad_()
    out = module(mine)
    (out * grad.split(counts)[me]).sum().backward()
    pairs = []
    if counts[me]:
        pairs += [(out * 1.0, z.split(counts)[me]), (mine.grad, whole.grad.split(counts)[me] * world)]
    for layer, wanted in zip(layers, factors, strict=True):
        for name, parameter in layer.named_parameters(recurse=False):
            if num_groups > 1:
                dist.all_reduce(parameter.grad)
                # Of the ranks of a group each has its own share of the sum.
                continue
            pairs.append((parameter.grad, layer.share_of(name, wanted[name].grad)))
    return max(difference(a.reshape(b.shape), b) for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_equals_the_oracle(kind):
    assert max(largest_error(kind, p) for p in (2, 4, 8)) < 1e-10
