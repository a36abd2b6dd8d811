"""The operator against the dense oracle, on one rank and on several; its collectives counted and placed.

Start here: a new layer's test begins as a copy of this one, with its own dense weight in tests/helpers/reference.py.
"""

import itertools
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from reference import dense_weight, oracle
from torch import nn

from lightning_phantom.config import PhantomConfig
from lightning_phantom.cost.count import Layer, estimate_cost
from lightning_phantom.distributed import comm
from lightning_phantom.errors import PhantomError
from lightning_phantom.layers.phantom import PhantomLinear
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


def largest_error(ranks_group, size, rank):
    """The largest difference from the oracle, over every case and every gradient, relative to the value's size."""
    worst = 0.0
    for p, bias, lead in CASES:
        if p % size:
            continue
        generator = torch.Generator().manual_seed(p)
        factors = global_factors(p, bias, generator)
        x = torch.randn(*lead, N_IN, dtype=torch.float64, generator=generator)
        grad = torch.randn(*lead, N_OUT, dtype=torch.float64, generator=generator)
        z, expected = oracle(factors, x, grad, p)

        layer = PhantomLinear(N_IN, N_OUT, p, K, bias, process_group=ranks_group, dtype=torch.float64)
        with torch.no_grad():
            for parameter, value in zip(layer.factors(), factors, strict=True):
                if parameter is not None:
                    parameter.copy_(shard(value, rank, size))
        x = x.clone().requires_grad_()
        out = layer(x)
        out.backward(grad)
        got = [None if f is None else f.grad for f in layer.factors()] + [x.grad]
        expected = [None if g is None else shard(g, rank, size) for g in expected[:4]] + expected[4:]
        for a, b in zip([out, *got], [z, *expected], strict=True):
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
        "traffic": _traffic(group, size),
        "order": _order(group),
        "empty": PhantomLinear(8, 8, 4, 1, process_group=group)(torch.empty(0, 8)).shape,
        "dense load": _dense_load(group),
        "dropout": dropout_twice(group),
        "written into": _write_into_the_exit(group),
    }


def _write_into_the_exit(group):
    """One token, of which transposed views need no copy, and an in-place operation on what the chain gives."""
    module = phantomize_(_mlp(), PhantomConfig(4), group)
    x = torch.randn(1, 16, requires_grad=True)
    out = module(x)
    out += 1
    out.sum().backward()
    return x.grad.isfinite().all().item()


class DropsTwice(nn.Module):
    """One nn.Dropout, called inside the chain and outside it."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.drop = nn.Linear(16, 32), nn.Linear(32, 16), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(torch.relu(self.fc1(x)))))


def dropout_twice(group):
    torch.manual_seed(0)
    module = phantomize_(DropsTwice(), PhantomConfig(4), group)
    x = torch.randn(8, 16)
    return [module(x).detach() for _ in range(3)]


def _mlp(dtype=torch.float32):
    return nn.Sequential(
        nn.Linear(16, 32, dtype=dtype), nn.ReLU(), nn.Linear(32, 48, dtype=dtype), nn.Linear(48, 8, dtype=dtype)
    )


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def _traffic(group, size):
    """Traffic of each case, forward and backward, beside what the cost model says."""
    seen = {}
    for name, needs_grad in itertools.product(("mlp", "gated", "lone"), (True, False)):
        config = PhantomConfig(4, plan={"0": "phantom"} if name == "lone" else None)
        module = {"mlp": _mlp, "gated": Gated, "lone": lambda: nn.Sequential(nn.Linear(32, 16))}[name]()
        module = phantomize_(module, config, group)
        x = torch.randn(2, 5, 32 if name == "lone" else 16, requires_grad=needs_grad)
        with count_every_collective() as issued, comm.record_traffic() as forward:
            loss = module(x).sum()
        assert sum(issued.values()) == forward.total_calls, issued
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
        def start(tensor):
            events.append(f"start {kind}")
            wait = real(tensor)

            def waited():
                events.append(f"wait {kind}")
                return wait()

            return waited

        return start

    ranks.all_gather, ranks.reduce_scatter = (note(k, getattr(ranks, k)) for k in ("all_gather", "reduce_scatter"))

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "bmm" in func.name():
                events.append("product")
            return func(*args, **(kwargs or {}))

    layer.input_layout = layer.output_layout = "sharded"
    x = torch.randn(4, 16 // ranks.size, requires_grad=True)
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
    alone = dropout_twice(None)
    for result in run_ranks(size, _several_ranks):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(alone, result["dropout"], strict=True))
        assert result["error"] < 1e-10
        assert result["dense load"] < 1e-5
        assert result["empty"] == (0, 8) and result["written into"]
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
    tokens, p, q = 10, 4, 4 // size
    sent = {  # features of all blocks, that is p*k, of each collective: 0.25 * min(in, out) / p per block
        "mlp": [p * 1, p * 2, p * 1],
        "gated": [p * 2, p * 1],
        "lone": [p * 1],
    }
    plans = {
        "mlp": [(16, 32), (32, 48), (48, 8)],
        "gated": [
            Layer(16, 32, True, "replicated", "sharded"),
            Layer(16, 32, True, "replicated", "sharded", shares_input=True),
            Layer(32, 16, True, "sharded", "replicated"),
        ],
        "lone": [(32, 16)],
    }
    for (name, needs_grad), (forward, backward) in traffic.items():
        # Per layer or gated pair: one gather of q*k*tokens elements forward, one scatter backward, and the boundaries.
        assert forward.calls == {"all_gather": len(sent[name]) + 1}
        assert backward.calls == {"reduce_scatter": len(sent[name])} | ({"all_gather": 1} if needs_grad else {})
        layer_bytes = sum((size - 1) * q * (pk // p) * tokens * 4 for pk in sent[name])
        assert backward.sent_bytes["reduce_scatter"] == layer_bytes
        layers = plans[name]
        if not needs_grad and name == "gated":
            layers = [Layer(16, 32, True, "replicated", "sharded", False), *layers[1:]]
        cost = estimate_cost(layers, p, 0.25, size, tokens, entry_needs_grad=needs_grad).phantom
        assert forward.total_bytes + backward.total_bytes == cost.sent_bytes
        assert forward.total_calls + backward.total_calls == cost.calls
        assert cost.layer_bytes == 2 * layer_bytes


def test_one_rank_communicates_nothing():
    with comm.record_traffic() as traffic:
        phantomize_(_mlp(), PhantomConfig(4))(torch.randn(3, 16)).sum().backward()
    assert traffic.total_calls == traffic.total_bytes == 0


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
    with pytest.raises(PhantomError, match=r"last size must be 16 \(in_features=16, replicated, 1 ranks\)"):
        PhantomLinear(16, 16, 4, 1)(torch.randn(3, 8))
