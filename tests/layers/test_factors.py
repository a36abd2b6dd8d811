"""Dense weights to factors and back: optimal, exact where it can be, the same for every number of ranks."""

import resource
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn

from lightning_phantom.config import PhantomConfig
from lightning_phantom.distributed.ranks import Ranks
from lightning_phantom.layers.factors import Blocks, block_diagonal, from_dense, random_factors, to_dense
from lightning_phantom.layers.phantom import PhantomLinear
from lightning_phantom.swap import phantomize_

ALONE = Ranks(None)


def test_from_dense_is_exact_at_the_largest_width():
    for n_in, n_out, p in ((16, 24, 4), (24, 8, 2), (8, 64, 8)):
        weight = torch.randn(n_out, n_in, dtype=torch.float64)
        k_max = min(n_in // p, (p - 1) * n_out // p)
        factors = from_dense(weight, Blocks(n_in, n_out, p, k_max, 0, ""), ALONE)
        assert torch.allclose(to_dense(factors, p), weight, atol=1e-12)


@pytest.mark.parametrize(("n_in", "n_out", "p"), [(32, 32, 4), (64, 16, 4), (96, 8, 2)])
def test_from_dense_is_the_best_of_its_width(n_in, n_out, p):
    """The error of each block column, tall or wide, equals the singular values that were left out (Eckart-Young)."""
    k, m, weight = 2, n_in // p, torch.randn(n_out, n_in, dtype=torch.float64)
    error = to_dense(from_dense(weight, Blocks(n_in, n_out, p, k, 0, ""), ALONE), p) - weight
    for j in range(p):
        column = torch.cat([b for i, b in enumerate(weight[:, j * m : (j + 1) * m].chunk(p)) if i != j])
        left_out = torch.linalg.svdvals(column)[k:].square().sum()
        assert torch.allclose(error[:, j * m : (j + 1) * m].square().sum(), left_out)


@pytest.mark.parametrize(("n_in", "n_out", "p"), [(32, 32, 4), (64, 16, 4), (96, 8, 2)])
def test_private_from_dense_is_the_best_of_each_pair_of_blocks(n_in, n_out, p):
    weight = torch.randn(n_out, n_in, dtype=torch.float64)
    full = min(n_in, n_out) // p
    for k in (1, 2, full):
        factors = from_dense(weight, Blocks(n_in, n_out, p, k, 0, "", "private"), ALONE)
        assert factors.compressor.shape == (p * (p - 1) * k, n_in // p) and factors.decompressor_before is None
        assert (factors.compressor.gather(1, factors.compressor.abs().argmax(1, keepdim=True)) > 0).all()
        error = weight - to_dense(factors, p, "private")
        for i, (rows, wrong) in enumerate(zip(weight.chunk(p), error.chunk(p), strict=True)):
            for j, (block, missing) in enumerate(zip(rows.chunk(p, 1), wrong.chunk(p, 1), strict=True)):
                left_out = torch.linalg.svdvals(block)[k:].square().sum() if i != j else torch.zeros(())
                assert torch.allclose(missing.square().sum(), left_out.double(), atol=1e-20)


def test_private_components_that_are_dead_learn():
    factors = from_dense(torch.zeros(16, 16), Blocks(16, 16, 4, 2, 0, "", "private"), ALONE)
    assert not factors.decompressor.any() and (factors.compressor.norm(dim=1) > 0.1).all()
    first, second = factors.compressor[:2], factors.compressor[2:4]  # of one block, for two others
    assert not torch.equal(first, second)


def test_signs_are_settled_and_factors_balanced():
    weight = torch.randn(32, 32, dtype=torch.float64)
    factors = from_dense(weight, Blocks(32, 32, 4, 2, 0, ""), ALONE)
    largest = factors.compressor.gather(1, factors.compressor.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    compressors, decompressors = factors.compressor.chunk(4), factors.decompressor.chunk(4)
    for j in range(4):  # |C_j row|^2 = singular value = |D_j column|^2
        rows = [decompressors[i][:, 2 * (j - (j > i)) : 2 * (j - (j > i)) + 2] for i in range(4) if i != j]
        assert torch.allclose(compressors[j].square().sum(1), torch.cat(rows).square().sum(0))


@pytest.mark.parametrize("weight", ["zero", "diagonal", "low"])
def test_a_dead_component_stays_zero_but_learns(weight):
    dense = nn.Linear(16, 16)
    with torch.no_grad():
        dense.weight.zero_()
        if weight == "diagonal":
            for i in range(4):
                dense.weight[4 * i : 4 * i + 4, 4 * i : 4 * i + 4].normal_()
        if weight == "low":  # rank one: the second component of every column is dead
            dense.weight += torch.outer(torch.randn(16), torch.randn(16))
    before = nn.Sequential(dense)
    x = torch.randn(64, 16)
    expected = before(x).detach()
    config = PhantomConfig(4, phantom_width=2, plan={"0": "phantom"})
    module = phantomize_(before, config)
    assert torch.allclose(module(x), expected, atol=1e-5)
    layer = module[0]
    start = {name: p.detach().clone() for name, p in layer.named_parameters()}
    assert (start["compressor_weight"].abs().sum(1) > 0.1).all()  # no row of zeros, which could never learn
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (module(x) - torch.randn(64, 16)).square().mean().backward()
        if _ == 0:
            first = {name: p.grad.clone() for name, p in layer.named_parameters()}
        optimizer.step()
    assert (first["decompressor_weight"].abs().sum(0) > 0).all()  # D learns in the first step
    assert all(not torch.equal(start[name], p) for name, p in layer.named_parameters())


def test_a_zero_linear_is_the_same_function_and_its_factors_move_in_one_step():
    dense = nn.Linear(16, 16)
    nn.init.zeros_(dense.weight)
    nn.init.zeros_(dense.bias)
    module = phantomize_(nn.Sequential(dense), PhantomConfig(4, plan={"0": "phantom"}))
    x = torch.randn(8, 16)
    assert torch.equal(module(x), torch.zeros(8, 16))
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    (module(x) - torch.randn(8, 16)).square().mean().backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    moved = {name for name, p in module.named_parameters() if not torch.equal(start[name], p)}
    # C's gradient passes through D, which is zero until this step has moved it.
    assert moved == {"0.weight", "0.decompressor_weight", "0.bias"}


def test_random_has_the_variances_of_the_design():
    p, k, n = 4, 16, 512
    factors = random_factors(Blocks(n, n, p, k, 0, "layer"), ALONE, torch.float64)
    for got, expected in zip(factors[:3], (1 / (3 * n), p / n, 1 / (3 * p * k)), strict=True):
        assert abs(got.var().item() / expected - 1) < 0.05
    layer = PhantomLinear(n, n, p, k, bias=False)
    assert abs(layer(torch.randn(512, n)).var().item() * 3 - 1) < 0.05  # nn.Linear's output variance, 1/3


@pytest.mark.parametrize("mixing", ["pairwise", "private"])
def test_random_siblings_have_the_variances_of_the_design(mixing):
    p, k, n = 4, 16, 512
    both = random_factors(Blocks(n, n, p, k, 0, "layer", mixing, width_before=8), ALONE, torch.float64)
    for got, expected in zip(both, (1 / (3 * n), p / n, 1 / (6 * p * k), 1 / (6 * p * 8)), strict=True):
        assert abs(got.var().item() / expected - 1) < 0.05
    assert both.decompressor_before.shape == (n, (p - 1) * 8)
    previous = random_factors(Blocks(n, n, p, k, 0, "layer", mixing, in_before=2 * n), ALONE, torch.float64)
    for got, expected in zip(previous[:3], (1 / (3 * n), p / (2 * n), 1 / (3 * p * k)), strict=True):
        assert abs(got.var().item() / expected - 1) < 0.05
    for latents in ("both", "previous"):  # nn.Linear's output variance, 1/3
        first = PhantomLinear(n, n, p, k, mixing=mixing, bias=False)
        second = PhantomLinear(n, n, p, k, mixing=mixing, latents=latents, predecessor=first, bias=False)
        first(torch.randn(512, n))
        assert abs(second(torch.randn(512, n)).var().item() * 3 - 1) < 0.05


def test_random_depends_on_seed_name_and_block_and_the_layer_on_torchs_seed():
    def draw(seed, name):
        return random_factors(Blocks(16, 16, 4, 2, seed, name), ALONE, torch.float32).weight

    assert torch.equal(draw(0, "a"), draw(0, "a"))
    assert not torch.equal(draw(0, "a"), draw(1, "a"))
    assert not torch.equal(draw(0, "a"), draw(0, "b"))
    assert not torch.equal(draw(0, "a")[:4], draw(0, "a")[4:8])
    torch.manual_seed(1)
    first, second = PhantomLinear(16, 16, 4, 2), PhantomLinear(16, 16, 4, 2)
    torch.manual_seed(1)
    again = PhantomLinear(16, 16, 4, 2)
    assert torch.equal(first.weight, again.weight) and not torch.equal(first.weight, second.weight)


def test_block_diagonal():
    weight = torch.randn(16, 16)
    dense = to_dense(block_diagonal(weight, Blocks(16, 16, 4, 2, 0, ""), ALONE), 4)
    for i in range(4):
        block = slice(4 * i, 4 * i + 4)
        assert torch.allclose(dense[block, block], 2 * weight[block, block])
    assert dense.count_nonzero() == 4 * 16


def _swapped(init, **how):
    """Every factor of a swapped model, whole; the ranks start from different weights and only rank 0's count."""
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 32))
    phantomize_(model, PhantomConfig(4, init=init, **how), group)
    return {n: model.get_submodule(n.split(".")[0]).global_tensor(n.split(".")[1]) for n in model.state_dict()}


def _all_inits():
    inits = ("from_dense", "random", "block_diagonal")
    found = {init: _swapped(init) for init in inits}
    for how in ({"mixing": "private", "latents": "both"}, {"latents": "previous"}):
        found |= {f"{init}, {how}": _swapped(init, **how) for init in inits}
    return found


def test_the_model_does_not_depend_on_the_number_of_ranks():
    (alone,) = run_ranks(1, _all_inits)
    for size in (2, 4):
        for result in run_ranks(size, _all_inits):
            for init, factors in alone.items():
                for name, value in factors.items():
                    assert torch.allclose(result[init][name], value, rtol=0, atol=1e-6), (size, init, name)
                    if not init.startswith("from_dense"):
                        assert torch.equal(result[init][name], value), (size, init, name)


PEAK = """
import resource, torch
from torch import nn
from lightning_phantom import PhantomConfig, phantomize_
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with torch.device("meta"):
    model = nn.Sequential(nn.Linear(16384, 16384))
model = phantomize_(model, PhantomConfig(8, phantom_width=64, plan={"0": "phantom"}))
assert all(p.is_meta for p in model.parameters())
before = peak()
model[0].to_empty(device="cpu")
model[0].reset_parameters()
assert model[0].weight.isfinite().all() and model[0].weight.std() > 0
print(peak() - before, sum(p.numel() * 4 for p in model.parameters()))
"""


def test_a_huge_meta_layer_never_allocates_the_dense_matrix():
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    grown, held = map(int, run.stdout.split())
    dense = 16384 * 16384 * 4
    assert held < 0.17 * dense
    assert grown < 0.5 * dense, f"{grown / dense:.2f} of the dense matrix"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
