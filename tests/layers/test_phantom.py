"""The operator against the dense oracle, on one rank and on several; its collectives counted and placed.

Start here: a new layer's test begins as a copy of this one, with its own dense weight in tests/helpers/reference.py.
"""

import itertools
from collections import Counter
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from reference import dense_weight, oracle
from torch import nn

from lightning_phantom.config import PhantomConfig
from lightning_phantom.cost.count import estimate_cost
from lightning_phantom.distributed import comm
from lightning_phantom.distributed.agreement import agreement_of
from lightning_phantom.errors import PhantomError
from lightning_phantom.layers.activation import ShardedActivation
from lightning_phantom.layers.phantom import PhantomLinear
from lightning_phantom.layers.split import split_layers
from lightning_phantom.swap import phantomize_

SHAPES = [(5,), (2, 3), (2, 3, 2)]
CASES = list(itertools.product((2, 4, 8), (True, False), SHAPES))
N_IN, N_OUT, K = 16, 24, 2


def global_factors(p, bias, generator):
    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    return [draw(N_OUT, N_IN // p), draw(p * K, N_IN // p), draw(N_OUT, (p - 1) * K), draw(N_OUT) if bias else None]


def shard(tensor, rank, size):
    return tensor.chunk(size)[rank]


def rows_of(lead, rank):
    """The rows of a rank: other numbers on each, and none on the third."""
    return (lead[0] + rank if rank != 2 else 0, *lead[1:])


def union_of(width, lead, size, generator):
    """What all ranks bring together, [rows, width], and the rows of each."""
    counts = [torch.Size(rows_of(lead, rank)).numel() for rank in range(size)]
    return torch.randn(sum(counts), width, dtype=torch.float64, generator=generator), counts


def largest_error(ranks_group, size, rank):
    """The largest difference from the oracle of all ranks' rows, over every case and gradient, in the value's size."""
    worst = 0.0
    for p, bias, lead in CASES:
        if p % size:
            continue
        generator = torch.Generator().manual_seed(p)
        factors = global_factors(p, bias, generator)
        x, counts = union_of(N_IN, lead, size, generator)
        grad = torch.randn(len(x), N_OUT, dtype=torch.float64, generator=generator)
        # The gradient of what a layer holds is that of the ranks' mean loss.
        z, expected = oracle(factors, x, grad / size, p)

        layer = PhantomLinear(N_IN, N_OUT, p, K, bias, process_group=ranks_group, dtype=torch.float64)
        with torch.no_grad():
            for parameter, value in zip(layer.factors(), (*factors, None), strict=True):
                if parameter is not None:
                    parameter.copy_(shard(value, rank, size))
        mine = x.split(counts)[rank].view(*rows_of(lead, rank), N_IN).clone().requires_grad_()
        out = layer(mine)
        assert isinstance(out, ShardedActivation) is (size > 1) and out.shape == (*mine.shape[:-1], N_OUT)
        (out * 1.0).reshape(-1, N_OUT)[:].backward(grad.split(counts)[rank])
        got = [None if f is None else f.grad for f in layer.factors()[:4]]
        wanted = [None if g is None else shard(g, rank, size) for g in expected[:4]]
        out = out.reshape(-1, N_OUT)[:]
        if counts[rank]:
            got += [out, mine.grad.reshape(-1, N_IN)]
            wanted += [z.split(counts)[rank], expected[4].split(counts)[rank] * size]
        for a, b in zip(got, wanted, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert a.shape == b.shape
                worst = max(worst, ((a - b).abs().max() / b.abs().max()).item())
        assert torch.allclose(layer.dense_weight(), dense_weight(*factors[:3], p))
    return worst


def test_one_rank_equals_the_oracle():
    assert largest_error(None, 1, 0) < 1e-10


def test_gradcheck():
    for p, bias in itertools.product((2, 4), (True, False)):
        layer = PhantomLinear(8, 12, p, 2, bias, dtype=torch.float64)
        x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
        tensors = [t for t in (x, *layer.factors()) if t is not None]
        assert torch.autograd.gradcheck(lambda x, *_, layer=layer: layer(x), tensors)


@pytest.mark.parametrize("damage", ["leave D out", "add the bias twice", "permute the blocks"])
def test_the_tolerance_catches_a_bug(damage):
    p = 4
    factors = global_factors(p, True, torch.Generator().manual_seed(0))
    x, grad = torch.randn(5, N_IN, dtype=torch.float64), torch.randn(5, N_OUT, dtype=torch.float64)
    good, _ = oracle(factors, x, grad, p)
    local, c, d, b = factors
    damaged = {
        "leave D out": [local, c, d * 0, b],
        "add the bias twice": [local, c, d, 2 * b],
        "permute the blocks": [local.roll(N_OUT // p, 0), c, d, b],
    }[damage]
    bad, _ = oracle(damaged, x, grad, p)
    assert (good - bad).abs().max() > 1e-3


def _several_ranks():
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    return {
        "error": largest_error(group, size, rank),
        "twice": _differentiated_twice(group),
        "shared": _shared_batch(group),
        "traffic": _traffic(group),
        "order": _order(group),
        "empty": PhantomLinear(8, 8, 4, 1, process_group=group)(torch.empty(0, 8)).shape,
        "dense load": _dense_load(group),
        "written into": _write_into_the_exit(group),
        "siblings": _siblings(group),
        "changed between siblings": [_changed_between(group, what) for what in ("input", "activation", "weight")],
        "checkpointed": _checkpointed(group),
    }


def _write_into_the_exit(group):
    """One token, of which transposed views need no copy, and an in-place operation on what the FFN gives."""
    module = phantomize_(_mlp(), PhantomConfig(4), group)
    x = torch.randn(1, 16, requires_grad=True)
    out = module(x)
    out += 1
    out += torch.ones(1, 8)
    out.sum().backward()
    return x.grad.isfinite().all().item()


def _mlp(dtype=torch.float32):
    return nn.Sequential(
        nn.Linear(16, 32, dtype=dtype), nn.ReLU(), nn.Linear(32, 48, dtype=dtype), nn.Linear(48, 8, dtype=dtype)
    )


class Gated(nn.Module):
    def __init__(self, dtype=None):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(n, m, dtype=dtype) for n, m in ((16, 32), (16, 32), (32, 16)))

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def both(make, group):
    """The same phantom module on the ranks of a group and, of the same seed, in one process; float64."""

    def made(group):
        torch.manual_seed(0)
        return phantomize_(make(torch.float64), PhantomConfig(4, init="random"), group)

    return made(group), made(None)


def _union(rank, width=16):
    generator = torch.Generator().manual_seed(1)
    size = dist.get_world_size()
    x, counts = union_of(width, (3,), size, generator)
    return x, x.split(counts)[rank].clone(), counts


def _shards_differ(mine, alone, group):
    """The largest difference between this rank's gradients and its share of the whole module's."""
    alone_layers = split_layers(alone)
    return max(
        (parameter.grad - layer.share_of(name, alone_layers[key].get_parameter(name).grad)).abs().max().item()
        for key, layer in split_layers(mine).items()
        for name, parameter in layer.named_parameters(recurse=False)
    )


def _differentiated_twice(group):
    """A gradient penalty: its gradients are those of one process with all rows."""
    mine, alone = both(_mlp_of_tanh, group)
    x, own, counts = _union(dist.get_rank())
    size, rank = dist.get_world_size(), dist.get_rank()
    errors = []
    for module, rows, share in ((mine, own, 1), (alone, x, size)):
        rows.requires_grad_()
        (gradient,) = torch.autograd.grad(module(rows).square().sum(), rows, create_graph=True)
        (gradient.square().sum() / share).backward()
        errors.append(gradient)
    errors = [(errors[0] - errors[1].split(counts)[rank]).abs().max().item()] if counts[rank] else []
    return max([*errors, _shards_differ(mine, alone, group)])


def _mlp_of_tanh(dtype):
    return nn.Sequential(nn.Linear(16, 32, dtype=dtype), nn.Tanh(), nn.Linear(32, 16, dtype=dtype))


def _shared_batch(group):
    """All ranks read one batch: the values and gradients of one process."""
    mine, alone = both(Gated, group)
    x, _, _ = _union(0)
    agreement_of(group).shared_batches = True
    try:
        for module in (mine, alone):
            (module(x) * x).sum().backward()
        error = (mine(x) - alone(x)).abs().max().item()
    finally:
        agreement_of(group).shared_batches = False
    return max(error, _shards_differ(mine, alone, group))


def _siblings(group):
    """Gate and up share the exchange and one collective each way; called apart, each does its own, and is right."""
    mine, alone = both(Gated, group)
    x, own, _ = _union(dist.get_rank())
    size, found = dist.get_world_size(), []

    def apart(module, x):
        gate = torch.nn.functional.silu(module.gate(x))
        return module.down(gate * module.up(x.clone()))

    for call in (lambda m, x: m(x), apart):
        mine.zero_grad()
        alone.zero_grad()
        with comm.record_traffic() as traffic:
            out = call(mine, own)
        (out * own).sum().backward()
        ((call(alone, x) * x).sum() / size).backward()
        found.append((dict(traffic.calls), _shards_differ(mine, alone, group)))
    return found


def _changed_between(group, what):
    """What gate reads, or up's weight, is written to before up is called: up sees it as it is then."""
    mine, alone = both(Gated, group)
    x, own, counts = _union(dist.get_rank())
    found = []
    with torch.no_grad():
        for module, rows in ((mine, own), (alone, x)):
            h = module.down(torch.tanh(module.gate(rows))) if what == "activation" else rows.clone()
            gate = torch.tanh(module.gate(h))
            (module.up.weight if what == "weight" else h).mul_(2)
            found.append((gate * module.up(h)).flatten(0))
    start = sum(counts[: dist.get_rank()]) * (found[1].numel() // len(x))
    difference = found[0] - found[1][start : start + found[0].numel()]
    return difference.abs().max().item() if len(own) else 0.0


def _checkpointed(group):
    """Activation checkpointing of either kind computes the same gradients."""
    from torch.utils.checkpoint import checkpoint

    mine, _ = both(Gated, group)
    _, own, _ = _union(dist.get_rank())
    found = []
    for call in (lambda x: mine(x), *(partial(checkpoint, mine, use_reentrant=kind) for kind in (True, False))):
        mine.zero_grad()
        x = own.clone().requires_grad_()
        (call(x) * own).sum().backward()
        found.append([x.grad, *(p.grad.clone() for p in mine.parameters())])
    return all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def _traffic(group):
    """Traffic of each case, forward and backward."""
    seen = {}
    for name, needs_grad in itertools.product(("mlp", "gated", "lone"), (True, False)):
        config = PhantomConfig(4, plan={"0": "phantom"} if name == "lone" else None)
        module = {"mlp": _mlp, "gated": Gated, "lone": lambda: nn.Sequential(nn.Linear(32, 16))}[name]()
        module = phantomize_(module, config, group)
        x = torch.randn(2, 5, 32 if name == "lone" else 16, requires_grad=needs_grad)
        module(x.detach().requires_grad_(needs_grad)).sum().backward()  # from now on the ranks ask at the entry only
        with count_every_collective() as issued, comm.record_traffic() as forward:
            loss = module(x).sum()
        assert sum(issued.values()) == forward.total_calls + 1, issued
        with count_every_collective() as issued, comm.record_traffic() as backward:
            loss.backward()
        assert sum(issued.values()) == backward.total_calls, issued
        seen[name, needs_grad] = (forward, backward)
    return seen


@contextmanager
def count_every_collective():
    """Count what reaches the process group, whether or not the package's own counter hears of it."""
    counts = Counter()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace in ("c10d", "_c10d_functional"):
                counts[func.name()] += 1
            return func(*args, **(kwargs or {}))

    with Watch():
        yield counts


def _order(group):
    """The order in which collectives and local products happen, on one layer."""
    events = []
    layer = PhantomLinear(16, 16, dist.get_world_size(), 2, process_group=group)
    ranks = layer.ranks

    def note(kind, real):
        def start(*args):
            events.append(f"start {kind}")
            wait = real(*args)

            def waited():
                events.append(f"wait {kind}")
                return wait()

            waited.tensor = getattr(wait, "tensor", None)
            return waited

        return start

    ranks.all_gather, ranks.reduce_scatter = (note(k, getattr(ranks, k)) for k in ("all_gather", "reduce_scatter"))

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "bmm" in func.name():
                events.append("product")
            return func(*args, **(kwargs or {}))

    x = torch.randn(4, 16, requires_grad=True)
    with Products():
        layer(x).sum().backward()
    return events


def _dense_load(group):
    """A dense state dict arriving in a swapped layer: k at its largest, so the layer holds it exactly."""
    dense = nn.Linear(16, 24)
    dist.broadcast(dense.weight.data, 0)
    dist.broadcast(dense.bias.data, 0)
    layer = PhantomLinear(16, 24, 4, 4, process_group=group)
    layer.load_state_dict(dense.state_dict())
    x = torch.randn(3, 16)
    dist.broadcast(x, 0)
    return (layer(x) - dense(x)).abs().max().item()


@pytest.mark.parametrize("size", [2, 4])
def test_several_ranks(size):
    for result in run_ranks(size, _several_ranks):
        assert result["error"] < 1e-10 and result["twice"] < 1e-10 and result["shared"] < 1e-10
        assert result["dense load"] < 1e-5
        assert result["empty"] == (0, 8) and result["written into"] and result["checkpointed"]
        together, apart = result["siblings"]
        assert together[0] == {"all_to_all": 1, "all_gather": 2} and together[1] < 1e-10
        assert apart[0] == {"all_to_all": 2, "all_gather": 3} and apart[1] < 1e-10
        assert max(result["changed between siblings"]) < 1e-10, result["changed between siblings"]
        assert result["order"] == [
            "product",  # C x
            "start all_gather",
            "product",  # L x
            "wait all_gather",
            "product",  # D g
            "product",  # D^T d
            "start reduce_scatter",
            "product",  # dL
            "product",  # dD
            "product",  # L^T d
            "wait reduce_scatter",
            "product",  # dC
            "product",  # C^T h
        ]
        _check_traffic(result["traffic"], size)


def _check_traffic(traffic, size):
    """Per rank: latents (R-1) q k b s each way, entry and exit (R-1)/R^2 b w s each way; b: the group's tokens."""
    b, s, q = 10 * size, 4, 4 // size
    k = {"mlp": [1, 2, 1], "gated": [2, 1], "lone": [1]}  # 0.25 * min(in, out) / p of each layer, or pair, together
    k["gated"] = [2 * 1, 1]
    ends = {"mlp": (16, 8), "gated": (16, 16), "lone": (32, 16)}
    for (name, needs_grad), (forward, backward) in traffic.items():
        latents = [(size - 1) * q * width * b * s for width in k[name]]
        entry, exit = ((size - 1) * width * b * s // size**2 for width in ends[name])
        assert forward.calls == {"all_to_all": 2, "all_gather": len(latents)}
        assert forward.sent_bytes == {"all_to_all": entry + exit, "all_gather": sum(latents)}
        assert backward.calls == {"all_to_all": 1 + needs_grad, "reduce_scatter": len(latents)}
        assert backward.sent_bytes == {"all_to_all": exit + needs_grad * entry, "reduce_scatter": sum(latents)}


def test_one_rank_communicates_nothing():
    with comm.record_traffic() as traffic:
        phantomize_(_mlp(), PhantomConfig(4))(torch.randn(3, 16)).sum().backward()
    assert traffic.total_calls == traffic.total_bytes == 0


def test_transforms_and_other_derivatives_on_one_rank():
    """torch.func knows the operations; all of it equals the dense layer."""
    layer = PhantomLinear(8, 12, 4, 2, dtype=torch.float64)
    dense = partial(nn.functional.linear, weight=layer.dense_weight(), bias=layer.bias.detach())
    x, v = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    for transform in (
        lambda f: torch.func.grad(lambda x: f(x).square().sum())(x),
        lambda f: torch.func.vmap(f)(x),
        lambda f: torch.func.jvp(f, (x,), (v,))[1],
        lambda f: torch.func.jacrev(f)(x),
        lambda f: torch.func.hessian(lambda x: f(x).tanh().sum())(x[0]),
        lambda f: torch.autograd.functional.jvp(f, x, v)[1],
    ):
        assert torch.allclose(transform(layer), transform(dense), rtol=1e-12)
    assert torch.autograd.gradgradcheck(layer, x.requires_grad_())
    with torch.autograd.forward_ad.dual_level():
        out = layer(torch.autograd.forward_ad.make_dual(x.detach(), v))
        assert torch.allclose(torch.autograd.forward_ad.unpack_dual(out).tangent, v @ layer.dense_weight().mT)


def test_flops_and_weights_equal_the_cost_model():
    from torch.utils.flop_counter import FlopCounterMode

    for needs_grad in (True, False):
        module = phantomize_(_mlp(), PhantomConfig(4))
        x = torch.randn(10, 16, requires_grad=needs_grad)
        cost = estimate_cost([(16, 32), (32, 48), (48, 8)], 4, 0.25, 1, 10, entry_needs_grad=needs_grad).phantom
        with FlopCounterMode(display=False) as counter:
            loss = module(x).sum()
        assert counter.get_total_flops() == cost.flops_forward
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        assert counter.get_total_flops() == cost.flops_backward
        assert sum(p.numel() for p in module.parameters()) == cost.weights


def test_autocast_casts_before_the_autograd_function():
    layer = PhantomLinear(16, 16, 4, 2)
    x = torch.randn(3, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype is torch.bfloat16
    out.sum().backward()
    assert layer.weight.grad.dtype is torch.float32 and x.grad.dtype is torch.float32


def test_a_frozen_factor_gets_no_gradient():
    layer = PhantomLinear(16, 16, 4, 2)
    layer.decompressor_weight.requires_grad_(False)
    layer(torch.randn(3, 16)).sum().backward()
    assert layer.decompressor_weight.grad is None and layer.compressor_weight.grad is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((15, 16, 4, 1), "15 -> 16 features does not divide into num_blocks=4"),
        ((16, 16, 1, 1), "num_blocks=1: needs an int of at least 2"),
        ((16, 16, 4, 0), "k must be at least 1"),
        ((16, 16, 4, float("nan")), r"must lie in \(0, 1\]"),
        ((16, 16, 4, float("inf")), r"must lie in \(0, 1\]"),
        ((16, 16, 4, "2"), "needs an int"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(PhantomError, match=message):
        PhantomLinear(*arguments)


def test_a_wrong_width_names_the_layer():
    with pytest.raises(PhantomError, match="its last size must be in_features=16"):
        PhantomLinear(16, 16, 4, 1)(torch.randn(3, 8))
