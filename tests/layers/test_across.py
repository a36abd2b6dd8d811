"""Operations that know how features lie between ranks: outputs and every gradient are those of the dense model."""

import copy
import itertools
from functools import cache

import pytest
import torch
import torch.distributed as dist
from ranks import mean_over_ranks, run_ranks
from reference import dense_weight
from test_activation import Cube
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lightning_phantom import PhantomConfig, phantomize_
from lightning_phantom.config import TensorParallelConfig
from lightning_phantom.distributed.mesh import Sizes, make_mesh
from lightning_phantom.errors import LayoutError
from lightning_phantom.layers.activation import watch_gathers
from lightning_phantom.layers.norms import epsilon
from lightning_phantom.layers.split import sharded_parameters, split_layers
from lightning_phantom.plan.finder import plan_tensor_parallel
from lightning_phantom.strategies.agree import average_shards
from lightning_phantom.swap import carry_out

D, WIDTH, BLOCKS = 8, 16, 4
TOKENS = (3, 5, 0, 2)  # of each rank
IN_BLOCKS = PhantomConfig(BLOCKS, 1, plan={"up": "phantom", "down": "phantom"}, init="random")
WAYS = ("ddp", "shared", "twice")
TYPES = (torch.bfloat16, torch.float16, torch.float32)


class Calls(nn.Module):
    """A function with parameters."""

    def __init__(self, function, *parameters):
        super().__init__()
        self.function, self.parameters_ = function, nn.ParameterList(parameters)

    def forward(self, h):
        return self.function(h, *self.parameters_)


def learned(*shape):
    return nn.Parameter(1 + torch.rand(shape))


def frozen(module):
    return module.requires_grad_(False)


NORMS = {
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "layer norm, no bias": lambda: nn.LayerNorm(WIDTH, eps=0.1, bias=False),
    "layer norm, nothing learned": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
    "layer norm, frozen": lambda: frozen(nn.LayerNorm(WIDTH)),
    "layer norm, functions": lambda: Calls(
        lambda h, w, b: torch.layer_norm(F.layer_norm(h, h.shape[-1:], bias=b), [WIDTH], w),
        learned(WIDTH),
        learned(WIDTH),
    ),
    "RMS norm": lambda: nn.RMSNorm(WIDTH, eps=0.1),
    "RMS norm, epsilon of the type": lambda: nn.Sequential(
        nn.RMSNorm(WIDTH), nn.GELU(), nn.RMSNorm(WIDTH, None, False)
    ),
    "RMS norm, function": lambda: Calls(lambda h, w: torch.rms_norm(h, (WIDTH,), w), learned(WIDTH)),
}
VECTORS = {
    "PReLU, one number": nn.PReLU,
    "PReLU, frozen": lambda: frozen(nn.PReLU()),
    "scale and shift": lambda: Calls(lambda h, s, b: torch.add(s * h, b) / s, learned(WIDTH), learned(WIDTH)),
    "rows of one": lambda: Calls(lambda h, s, b: h * s - b, learned(1, 1, WIDTH), learned(1)),
    "into the activation": lambda: Calls(lambda h, s: h.clone().mul_(s), learned(WIDTH)),
    "chosen": lambda: Calls(lambda h, s: torch.where(h > 0, h, s), learned(WIDTH)),
}
OTHERS = {  # which want whole tokens
    "a parameter of its type": lambda: Calls(lambda h, s: h.exp() * s.type_as(h), learned(WIDTH)),
    "a number of its type": lambda: Calls(lambda h, s: h.exp() * s.to(h), learned()),
    "made of a parameter": lambda: Calls(lambda h, s: h * s.exp(), learned(WIDTH)),
    "a parameter of more dimensions": lambda: Calls(lambda h, s: (h * s)[0], learned(1, 1, 1, WIDTH)),
    "a parameter of positions": lambda: Calls(lambda h, s: h * s, learned(2, WIDTH)),
    "normed by what is no parameter": lambda: Calls(lambda h, s: F.layer_norm(h, (WIDTH,), s * 2), learned(WIDTH)),
    "normed with the positions": lambda: nn.LayerNorm((2, WIDTH)),
    "normed with the positions, nothing learned": lambda: nn.LayerNorm((2, WIDTH), elementwise_affine=False),
    "batch norm of positions, evaluating": lambda: nn.BatchNorm1d(2).eval(),
    "PReLU of positions": lambda: nn.PReLU(2, init=0.3),
    "a norm of groups": lambda: Calls(lambda h: F.group_norm(h.transpose(1, 2), 4).transpose(1, 2)),
}
MATRICES = {  # which read the second dimension as features
    "batch norm": lambda: nn.BatchNorm1d(WIDTH, momentum=0.3),
    "batch norm, mean of all batches": lambda: nn.BatchNorm1d(WIDTH, eps=0.1, momentum=None, affine=False),
    "batch norm, evaluating": lambda: nn.BatchNorm1d(WIDTH).eval(),
    "batch norm, frozen": lambda: frozen(nn.BatchNorm1d(WIDTH)),
    "batch norm, this batch only": lambda: nn.BatchNorm1d(WIDTH, track_running_stats=False),
    "batch norm, function": lambda: Calls(
        lambda h, w, b: torch.batch_norm(h, w, b, None, None, True, 0.1, 0.1, False), learned(WIDTH), learned(WIDTH)
    ),
    "PReLU, a number a feature": lambda: nn.PReLU(WIDTH, init=0.3),
    "PReLU, function": lambda: Calls(lambda h, w: F.prelu(h, w) + h.prelu(w), learned(WIDTH)),
}
GATES = {  # which read a gate and what it gates, one linear of twice the width
    "GLU": nn.GLU,
    "GLU, function, behind an activation": lambda: Calls(lambda h: F.glu(F.gelu(h) * 0.5)),
    "GLU, normed": lambda: nn.Sequential(nn.GLU(-1), nn.LayerNorm(WIDTH), nn.PReLU()),
    "chunk": lambda: Calls(lambda h: F.silu((parts := h.chunk(2, -1))[0]) * parts[1]),
    "torch.chunk": lambda: Calls(lambda h: torch.mul(*torch.chunk(input=h.tanh(), chunks=2, dim=h.dim() - 1))),
    "split": lambda: Calls(lambda h: torch.sub(*h.split(h.shape[-1] // 2, dim=-1)).sigmoid()),
    "torch.split": lambda: Calls(lambda h: torch.mul(*torch.split(h, [WIDTH, WIDTH], dim=-1))),
}
BACK_TO_TOKENS = {  # what does not know how the two lie finds them side by side
    "a slice": lambda: Calls(lambda h: h[..., :WIDTH] * h[..., WIDTH:]),
    "a split that is no half": lambda: Calls(lambda h: torch.cat(h.split([4, 2 * WIDTH - 4], -1)[::-1], -1)[..., ::2]),
    "a chunk of tokens": lambda: Calls(lambda h: torch.cat([*h.chunk(2, 0)])[..., WIDTH // 2 : -WIDTH // 2]),
    "both normed": lambda: Calls(lambda h, w: F.layer_norm(h, (2 * WIDTH,), w)[..., ::2], learned(2 * WIDTH)),
    "both scaled": lambda: Calls(lambda h, w: (h * w).chunk(2, -1)[0], learned(2 * WIDTH)),
    "both compared": lambda: Calls(lambda h: (h > h * 2).flip(-1)[..., :WIDTH] * h[..., WIDTH:]),
    "through a function": lambda: Calls(lambda h: Cube.apply(h)[..., WIDTH:]),
}
CASES = {**NORMS, **VECTORS, **MATRICES, **GATES, **BACK_TO_TOKENS, **OTHERS}


class Net(nn.Module):
    """What stands between two phantom linears, with dense ones around them."""

    def __init__(self, make, parts=1):
        super().__init__()
        self.first, self.up, self.between = nn.Linear(D, D), nn.Linear(D, parts * WIDTH), make()
        self.down, self.last = nn.Linear(WIDTH, D), nn.Linear(D, 3)
        for value in (*self.between.parameters(), *self.between.buffers()):
            if value.is_floating_point():
                value.data += 0.3 * torch.rand_like(value)

    def forward(self, x):
        return self.last(self.down(self.between(self.up(self.first(x)))))


class Dense(nn.Module):
    """The dense matrix that a phantom layer of one process stands for, as a function of its factors."""

    def __init__(self, layer):
        super().__init__()
        for name, value in layer.named_parameters():
            self.register_parameter(name, nn.Parameter(value.detach().clone()))
        n = layer.out_features // layer.parts // BLOCKS  # features of one part in a block
        blocks, parts = range(BLOCKS), range(layer.parts)
        self.order = [(i * len(parts) + part) * n + feature for part in parts for i in blocks for feature in range(n)]

    def forward(self, x):
        weight = dense_weight(self.weight, self.compressor_weight, self.decompressor_weight, BLOCKS)
        return F.linear(x, weight, self.bias)[..., self.order]


def nets(make, group, parts=1, exact=False):
    """The same net on the ranks of a group, in phantom or in exact layers, and dense in one process."""
    torch.manual_seed(0)
    net = Net(make, parts).double()
    if exact:
        mine = copy.deepcopy(net)
        config = TensorParallelConfig(dist.get_world_size(group), plan={"up": "phantom", "down": "phantom"})
        carry_out(mine, plan_tensor_parallel(mine, config), group, group)
        return mine, net
    return phantomize_(net, IN_BLOCKS, group), copy.deepcopy(dense_of(make, parts))


@cache
def dense_of(make, parts):
    """The net whose phantom layers are the dense matrices that they stand for."""
    torch.manual_seed(0)
    dense = phantomize_(Net(make, parts).double(), IN_BLOCKS, None)
    assert (dense.up.parts, dense.down.parts) == (parts, 1)
    for name, layer in split_layers(dense).items():
        dense.set_submodule(name, Dense(layer))
    return dense


def tokens_of(rank, lead):
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(TOKENS[rank], *lead, D, dtype=torch.float64, generator=generator)


def loss_of(out, rank):
    """Each rank's own, and another one's."""
    return ((1 + rank) * out.sin()).sum()


def penalty_of(loss, *xs):
    return sum(grad.square().sum() for grad in torch.autograd.grad(loss, xs, create_graph=True))


def expected_of(dense, xs, groups, shared, twice):
    """The outputs and buffers by rank, and the gradients of the mean loss: that of each rank's tokens.

    A group's tokens are one batch, for each group from the same buffers on.
    """
    outs, buffers, total, before = [], [], 0.0, [b.clone() for b in dense.buffers()]
    for ranks in groups:
        for buffer, value in zip(dense.buffers(), before, strict=True):
            buffer.data = value.clone()
        counts = [len(xs[r]) for r in ranks[: 1 if shared else None]]
        together = dense(torch.cat([xs[r] for r in ranks[: len(counts)]])).split(counts)
        buffers += [{name: b.data for name, b in dense.named_buffers()}] * len(ranks)
        of_group = [together[0 if shared else n] for n in range(len(ranks))]
        loss = sum(loss_of(out, ranks[0] if shared else r) for out, r in zip(of_group, ranks, strict=True))
        if twice:  # a batch norm has a token's gradient depend on the others' losses
            loss = loss + penalty_of(loss, *(xs[r] for r in ranks))
        outs, total = outs + of_group, total + loss
    (total / len(outs)).backward()
    return outs, buffers, {name: p.grad for name, p in dense.named_parameters()}


def averaged(net, mesh):
    """Every gradient as training has it, whole: replicated ones are the ranks' mean, shards the groups'."""
    sharded = sharded_parameters(net)
    grads = {name: p.grad for name, p in net.named_parameters()}
    replicated = [name for name, p in net.named_parameters() if id(p) not in sharded and p.grad is not None]
    grads.update(zip(replicated, mean_over_ranks([grads[name] for name in replicated]), strict=True))
    for name, p in net.named_parameters():
        if id(p) in sharded and p.grad is not None:
            mean = mesh.data_parallel.all_reduce(p.grad, "sum") / mesh.data_parallel.size
            grads[name] = sharded[id(p)].gather(mean)
    return grads


def check(name, make, mesh, lead, way, exact=False):
    rank, size = dist.get_rank(), dist.get_world_size()
    each = mesh.phantom.size
    groups = [list(range(n, n + each)) for n in range(0, size, each)]
    shared, twice = way == "shared", way == "twice"
    net, dense = nets(make, mesh.phantom.group, 2 if name in (*GATES, *BACK_TO_TOKENS) else 1, exact)
    xs = [tokens_of(r // each * each if shared else r, lead).requires_grad_() for r in range(size)]
    outs, buffers, expected = expected_of(dense, xs, groups, shared, twice)

    x = xs[rank].detach().clone().requires_grad_()
    run = net
    if way == "ddp":
        average = average_shards(net, mesh)
        run = DistributedDataParallel(net)
    mesh.phantom.agreement.shared_batches = shared
    try:
        with watch_gathers() as gathered:
            out = run(x)
    finally:
        mesh.phantom.agreement.shared_batches = False
    expected_back = {"up"} if name in (*BACK_TO_TOKENS, *OTHERS) else set()
    assert {g.layer for g in gathered} - {"down"} == expected_back, (name, gathered)
    loss = loss_of(out, groups[rank // each][0] if shared else rank)
    (loss + penalty_of(loss, x) if twice else loss).backward()
    if way == "ddp" and average is not None:
        average.remove()

    assert torch.allclose(out, outs[rank], rtol=1e-10, atol=1e-10), (name, "output")
    reader = groups[rank // each][0] if shared else rank
    of_x = xs[reader].grad * (size / each if shared else size)  # of the mean loss
    assert torch.allclose(x.grad, of_x, rtol=1e-9, atol=1e-10), (name, way, "input")
    for key, grad in averaged(net, mesh).items():
        wanted = expected[key]
        assert (grad is None) == (wanted is None), (name, key)
        assert grad is None or torch.allclose(grad, wanted, rtol=1e-9, atol=1e-10), (name, way, key, grad, wanted)
    for key, value in net.named_buffers():
        assert torch.allclose(value, buffers[rank][key], rtol=1e-10, atol=1e-10), (name, way, key)


def every_case(each):
    mesh = make_mesh(Sizes(each, dist.get_world_size() // each, BLOCKS), None)
    whole_world = each == dist.get_world_size()
    for (name, make), way in itertools.product(CASES.items(), WAYS if whole_world else ("ddp",)):
        if way == "ddp" or name in (*NORMS, *MATRICES) or (way == "shared" and name not in OTHERS):
            check(name, make, mesh, () if name in MATRICES else (2,), way)
    for name in ("layer norm", "RMS norm", "scale and shift", "batch norm", "PReLU, a number a feature"):
        check(name, CASES[name], mesh, () if name in MATRICES else (2,), "ddp", exact=True)
    behind_what_is_frozen(mesh)
    return parted(mesh) if whole_world else None


def behind_what_is_frozen(mesh):
    """A norm's parameters have the same gradients whether what it reads has one or not."""
    grads = []
    for frozen_ones in ((), ("first", "up")):
        net, _ = nets(NORMS["layer norm"], mesh.phantom.group)
        for name in frozen_ones:
            frozen(net.get_submodule(name))
        net(tokens_of(mesh.phantom.rank, ())).sin().sum().backward()
        grads.append([p.grad for p in net.between.parameters()])
    assert all(torch.allclose(*pair) for pair in zip(*grads, strict=True))


def parted(mesh):
    """What is said where a rank leaves a norm out, which it has been through before."""
    net, _ = nets(NORMS["layer norm"], mesh.phantom.group)
    x = tokens_of(mesh.phantom.rank, ())
    net(x)
    if mesh.phantom.rank == 1:
        net.between = nn.Identity()
    with pytest.raises(LayoutError) as said:
        net(x)
    return str(said.value)


def every_type():
    mesh = make_mesh(Sizes(2, 1, BLOCKS), None)
    up = phantomize_(nn.Sequential(nn.Linear(D, WIDTH)), PhantomConfig(BLOCKS, 1, {"0": "phantom"}), mesh.phantom.group)
    x, seen = tokens_of(mesh.phantom.rank, ()).float(), []
    for name, dtype, wide, cast in itertools.product(NORMS, TYPES, (False, True), (False, True)):
        norm = NORMS[name]().to(torch.float32 if wide else dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            h = up(x).to(dtype)
            try:
                expected = norm(h.view(h.shape))
            except RuntimeError:
                continue
            with watch_gathers() as gathered:
                got = norm(h)
        assert not gathered and got.dtype == expected.dtype, (name, dtype, wide, cast)
        rtol = max(torch.finfo(dtype).eps, torch.finfo(torch.bfloat16).eps if cast else 0) * 4
        assert torch.allclose(got.float(), expected.float(), rtol, rtol), (name, dtype, wide, cast)
        (grad,) = torch.autograd.grad(got.float().sum(), h)
        assert grad.dtype == h.dtype
        seen.append((name, dtype, wide, cast))
    return seen


def on_two_ranks():
    types = every_type()
    return every_case(2), types


def on_four_ranks():
    every_case(2)
    return every_case(4)


@pytest.fixture(scope="module")
def two():
    return run_ranks(2, on_two_ranks)


@pytest.fixture(scope="module")
def four():
    return run_ranks(4, on_four_ranks)


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_it_is_the_dense_model_and_a_rank_that_departs_is_named(ranks, request):
    for said in request.getfixturevalue(ranks):
        said = said[0] if ranks == "two" else said
        assert "rank 0 in the" in said or "rank 0: " in said
        assert "layer_norm behind 'up' 2 torch.float64" in said and "latents of 'down'" in said, said


@pytest.mark.parametrize("dtype", [*TYPES, torch.float64])
@pytest.mark.parametrize("size", [1e-3, 0.05, 1.0])
def test_the_epsilon_of_a_type_is_torchs(dtype, size):
    x = torch.full((4,), size, dtype=dtype)
    by_hand = x.double() / (x.double().square().mean() + epsilon(dtype)).sqrt()
    assert torch.allclose(torch.rms_norm(x, (4,)).double(), by_hand, rtol=4 * torch.finfo(dtype).eps)


def test_types_are_those_of_plain_tensors(two):
    for _, seen in two:
        assert len(seen) > 40
