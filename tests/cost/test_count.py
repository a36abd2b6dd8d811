"""The cost model is what the layers do: weights, FLOPs, bytes and calls, to the last one."""

import itertools
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from lightning_phantom.commands.compare.methods import torch_plan
from lightning_phantom.config import PhantomConfig, TensorParallelConfig
from lightning_phantom.cost.count import Cost, estimate_cost
from lightning_phantom.cost.data_parallel import estimate_data_parallel
from lightning_phantom.cost.layer import Layer
from lightning_phantom.distributed.comm import record_traffic
from lightning_phantom.errors import PhantomError
from lightning_phantom.layers.split import split_layers
from lightning_phantom.measure.counted import Counted
from lightning_phantom.plan.finder import plan_phantom, plan_tensor_parallel
from lightning_phantom.swap import carry_out

METHODS = ("phantom", "tensor_parallel", "tensor_parallel_layerwise")
SIBLINGS = {  # of the phantom operator
    "phantom": {},
    "private": {"mixing": "private"},
    "both": {"latents": "both"},
    "previous": {"latents": "previous"},
    "private previous": {"mixing": "private", "latents": "previous"},
}
BLOCKS, WIDTH = 4, 0.25
TOKENS = 6  # of each rank


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32, bias=False), nn.Linear(32, 24)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Fused(nn.Module):
    """A gate and what it gates in one linear, cut apart by hand."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(32, 24)

    def forward(self, x):
        gate, up = self.up(x).chunk(2, -1)
        return self.down(nn.functional.silu(gate) * up)


class Heads(nn.Module):
    """Two linears that read one value inside, and of which both leave."""

    def __init__(self):
        super().__init__()
        self.trunk, self.mean, self.spread = nn.Linear(16, 32), nn.Linear(32, 8), nn.Linear(32, 16)

    def forward(self, x):
        h = torch.relu(self.trunk(x))
        return torch.cat([self.mean(h), self.spread(h)], -1)


class Tapped(nn.Module):
    """What the first linear returns is read by the second and, whole, outside."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        h = self.up(x)
        return torch.cat([self.down(torch.relu(h)), h.softmax(-1)], -1)


class Residual(nn.Module):
    """Values that linears of odd and of even depth write into together."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        first, *others = self.layers
        h = first(x)
        for layer in others:
            h = h + layer(torch.relu(h))
        return h


def chain(*widths, between=nn.GELU):
    layers = [m for n, width in enumerate(widths[1:]) for m in (nn.Linear(widths[n], width), between())]
    return nn.Sequential(*layers[:-1])


MODULES = {
    "pair": partial(chain, 16, 32, 16),
    "three": partial(chain, 16, 32, 48, 8),
    "four": partial(chain, 16, 32, 48, 24, 16),
    "norms": partial(chain, 32, 32, 32, 32, between=partial(nn.LayerNorm, 32)),
    "gated": Gated,
    "fused": Fused,
    "GLU": lambda: nn.Sequential(nn.Linear(16, 64), nn.GLU(), nn.Linear(32, 24)),
    "heads": Heads,
    "residual": Residual,
    "alone": partial(chain, 32, 16),
}


def swapped(name, method, blocks, group):
    """A module of `MODULES` in the layout of a method, and the cost model's records of its layers."""
    module = MODULES[name]()
    words = {"0": "phantom"} if name == "alone" else None
    if method in SIBLINGS:
        plan = plan_phantom(module, PhantomConfig(blocks, WIDTH, plan=words, **SIBLINGS[method]))
    else:
        style = "megatron" if method == "tensor_parallel" else "layerwise"
        size = 1 if group is None else dist.get_world_size(group)
        plan = plan_tensor_parallel(module, TensorParallelConfig(size, plan=words, style=style))
    assert len(plan.swapped) == len(plan.layers)
    carry_out(module, plan, group, None)
    return module, plan.cost_layers()


@contextmanager
def every_collective():
    """Count what reaches the process group but questions, whether or not the package's own counter hears of it."""
    counts = Counter()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace in ("c10d", "_c10d_functional"):
                given = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
                counts[func.name()] += any(x.is_floating_point() for x in given)
            return func(*args, **(kwargs or {}))

    with Watch():
        yield counts


def without_gradient_at_the_entry(layer):
    before = layer.predecessor and without_gradient_at_the_entry(layer.predecessor)
    return replace(layer, needs_input_grad=layer.depth > 0, predecessor=before)


def step(name, method, needs_grad, blocks=BLOCKS, group=None):
    """What a step has taken, and the layers that it went through."""
    module, layers = swapped(name, method, blocks, group)
    if not needs_grad:
        layers = [without_gradient_at_the_entry(layer) for layer in layers]

    def forward():
        return module(torch.randn(2, TOKENS // 2, layers[0].in_features, requires_grad=needs_grad)).sum()

    with every_collective() as issued, record_traffic() as sent:
        forward().backward()
    with FlopCounterMode(display=False) as counter:  # its hooks ask for activations: it sends more
        loss = forward()
        flops_forward = counter.get_total_flops()
        loss.backward()
    weights = sum(p.numel() for layer in split_layers(module).values() for p in layer.parameters())
    taken = weights, flops_forward, counter.get_total_flops(), sent.total_bytes, sent.total_calls
    return {
        "case": (name, method, needs_grad, blocks),
        "layers": layers,
        "taken": taken,
        "issued": sum(issued.values()),
        "kinds": dict(sent.calls),
    }


CASES = [
    (name, method, needs_grad, blocks)
    for name, method, needs_grad in itertools.product(MODULES, METHODS, (True, False))
    for blocks in ((4, 8) if method == "phantom" else (4,))
    if (name, method) != ("residual", "tensor_parallel")  # see cost.layer.Layer
]
CASES += itertools.product(("four", "residual", "gated"), list(SIBLINGS)[1:], (True, False), (4,))


def cases_on(size):
    """All on two ranks; on four every module by every method, of which every other one has a gradient at the entry."""
    order = {pair: n for n, pair in enumerate(dict.fromkeys(case[:2] for case in CASES))}
    return [case for case in CASES if size == 2 or case[2] is (order[case[:2]] % 2 == 0)]


def torchs_step(name, needs_grad):
    """What a step has taken that torch's own parallelize_module has split, and the layers; None where it cannot."""
    module, size = {**MODULES, "tapped": Tapped}[name](), dist.get_world_size()
    try:
        plan, styles = torch_plan(module, size)
    except PhantomError:
        return None
    layers = [replace(layer, needs_input_grad=layer.depth > 0 or needs_grad) for layer in plan.cost_layers()]
    parallelize_module(module, init_device_mesh("cpu", (size,)), styles)
    x = torch.randn(size * TOKENS, layers[0].in_features, requires_grad=needs_grad)
    module(x).sum().backward()  # the first time torch also runs its operations without numbers, to learn their shapes
    with Counted(size) as counted:
        module(x).sum().backward()
    weights = sum(p.to_local().numel() for p in module.parameters() if hasattr(p, "to_local"))
    return layers, (weights, counted.flops, counted.traffic.total_bytes, counted.traffic.total_calls)


def every_step():
    names = [
        name for name in (*MODULES, "tapped") if name not in ("residual", "alone")
    ]  # which torch cannot, or no plan finds
    by_torch = {(name, grad): torchs_step(name, grad) for name in names for grad in (True, False)}
    return [step(*case, dist.group.WORLD) for case in cases_on(dist.get_world_size())], averaged(), by_torch


def averaged():
    """DDP's step of the dense module: what it holds, computes, and gives to be averaged, in elements."""
    module, given = chain(16, 32, 16), []
    replica = DistributedDataParallel(module)

    def give(state, bucket):
        given.append(bucket.buffer().numel())
        work = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return work.then(lambda done: done.value()[0])

    replica.register_comm_hook(None, give)
    with FlopCounterMode(display=False) as counter:
        replica(torch.randn(TOKENS, 16)).sum().backward()
    return sum(p.numel() for p in module.parameters()), counter.get_total_flops(), sum(given)


def check(seen, size):
    _, method, _, blocks = seen["case"]
    estimate = estimate_cost(seen["layers"], blocks, WIDTH, size, size * TOKENS)
    cost = getattr(estimate, "phantom" if method in SIBLINGS else method)
    counted = cost.weights, cost.flops_forward, cost.flops, cost.sent_bytes, cost.calls
    assert seen["taken"] == counted, seen
    assert seen["issued"] == seen["taken"][4], seen


@pytest.mark.parametrize("size", [2, 4])
def test_a_step_on_several_ranks_takes_what_is_counted(size):
    for steps, (weights, flops, elements), by_torch in run_ranks(size, every_step):
        assert [seen["case"] for seen in steps] == cases_on(size)
        for seen in steps:
            check(seen, size)
            name, method, needs_grad, _ = seen["case"]
            if (name, method) == ("gated", "phantom"):  # one exchange and one collective for both siblings
                assert seen["kinds"] == {"all_to_all": 3 + needs_grad, "all_gather": 2, "reduce_scatter": 2}, seen
            if (name, method) == ("pair", "tensor_parallel"):
                assert seen["kinds"] == {"all_gather": 2, "reduce_scatter": 1 + needs_grad}, seen
            if (name, method) == ("four", "previous"):  # the first layer's latents and the second's leave together
                assert seen["kinds"] == {"all_to_all": 3 + needs_grad, "all_gather": 3, "reduce_scatter": 4}, seen
            if (name, method) == ("four", "private"):
                assert seen["kinds"] == {"all_to_all": 3 + needs_grad + 8}, seen
        ddp = estimate_data_parallel([(16, 32), (32, 16)], size, size * TOKENS, entry_needs_grad=False).ddp
        assert (weights, flops) == (ddp.weights, ddp.flops)
        assert ddp.weight_bytes == ddp.sent_bytes == 2 * (size - 1) * 4 * elements // size
        assert ddp.calls == 1
        assert {name for (name, _), seen in by_torch.items() if seen is not None} >= {
            "pair",
            "four",
            "norms",
            "gated",
            "tapped",
        }
        for case, (layers, taken) in ((case, seen) for case, seen in by_torch.items() if seen is not None):
            cost = estimate_cost(layers, size, 1, size, size * TOKENS).tensor_parallel_torch
            assert taken == (cost.weights, cost.flops, cost.sent_bytes, cost.calls), case


def test_a_step_of_one_process_takes_what_is_counted():
    for case in CASES:
        seen = step(*case)
        check(seen, 1)
        assert seen["taken"][3:] == (0, 0)


def test_the_table():
    """The formulas of the module's docstring, for a square layer."""
    n, p, k, size, b, s = 64, 8, 2, 4, 48, 2
    q = p // size
    one = [Layer(n, n, bias=False, enters=True, leaves=True)]
    cost = estimate_cost(one, p, k, size, b, "bfloat16")
    entry = (size - 1) * b * n * s // size**2
    factors = q * (n * n // p**2 + k * n)
    assert cost.phantom == Cost(
        *(factors, 2 * b * factors, 4 * b * factors, 2 * (size - 1) * q * k * b * s, 4 * entry, 6)
    )
    private = estimate_cost([replace(one[0], mixing="private")], p, k, size, b, "bfloat16").phantom
    factors = q * (n * n // p**2 + 2 * (p - 1) * k * n // p)
    assert private == Cost(
        *(factors, 2 * b * factors, 4 * b * factors, 2 * (size - 1) * q * q * k * b * s, 4 * entry, 6)
    )
    pairs = [(n, n), (n, n)]
    own, both = (estimate_cost(pairs, p, k, size, b, "bfloat16", latents=which).phantom for which in ("own", "both"))
    more = q * (p - 1) * k * n // p
    assert (both.weights, both.flops, both.sent_bytes) == (own.weights + more, own.flops + 6 * b * more, own.sent_bytes)
    gathered, products = size * entry, n * n // size
    exact = Cost(products, 2 * b * products, 4 * b * products, 0, 2 * gathered + 2 * entry, 4)
    assert cost.tensor_parallel == cost.tensor_parallel_layerwise == exact
    by_torch = Cost(products, 2 * b * products, 4 * b * products, 0, gathered + 2 * gathered, 2)
    assert cost.tensor_parallel_torch == by_torch  # its end is gathered, and the gradient of its input summed
    pair = estimate_cost([(n, n), (n, n)], p, k, size, b, torch.bfloat16)
    assert (pair.tensor_parallel.sent_bytes, pair.tensor_parallel.calls) == (4 * gathered, 4)
    assert pair.tensor_parallel.replicated == pair.tensor_parallel_torch.replicated == n  # what is added to the sum
    assert (pair.tensor_parallel_torch.sent_bytes, pair.tensor_parallel_torch.calls) == (4 * gathered, 2)
    assert (pair.tensor_parallel_layerwise.layer_bytes, pair.tensor_parallel_layerwise.calls) == (2 * gathered, 6)
    both = estimate_data_parallel(one, size, b, "bfloat16")
    forward, sent = 2 * (b // size) * n * n, (size - 1) * n * n * s // size
    assert both.ddp == Cost(n * n, forward, 2 * forward, calls=1, weight_bytes=2 * sent, replicated=n * n)
    assert both.fsdp == Cost(n * n // size, forward, 2 * forward, calls=3, weight_bytes=3 * sent)


def buckets_of(module):
    """How many buckets torch makes of a module's gradients, in the order in which they are ready."""
    sizes = [p.numel() * 4 for p in reversed(list(module.parameters()))]
    parameters = [torch.empty(size // 4, device="meta") for size in sizes]
    assigned, _ = dist._compute_bucket_assignment_by_size(parameters, [dist._DEFAULT_FIRST_BUCKET_BYTES, 25 * 2**20])
    return len(assigned)


def test_data_parallel_edges():
    alone = estimate_data_parallel([(8, 8)], 1, 5, entry_needs_grad=False)
    assert alone.fsdp == Cost(72, 640, 640) and alone.ddp == replace(alone.fsdp, replicated=72)
    for width, depth in ((512, 4), (1024, 4), (2048, 2), (2048, 5)):  # a bucket closes with the parameter that fills it
        counted = estimate_data_parallel([(width, width)] * depth, 2, 8).ddp
        assert counted.calls == buckets_of(chain(*[width] * (depth + 1)))
    assert estimate_data_parallel([(4, 5)], 2, 8).fsdp.weights == 3 * 5  # rank 0's three of five rows
    with pytest.raises(PhantomError, match="layers is empty"):
        estimate_data_parallel([], 2, 8)
    with pytest.raises(PhantomError, match="num_ranks=0"):
        estimate_data_parallel([(4, 4)], 0, 8)


def test_depth_decides_what_is_cut_by_row():
    pairs = estimate_cost([(16, 16)] * 3, 4, 1, 2, 8).tensor_parallel
    records = [Layer(16, 16, enters=True), Layer(16, 16), Layer(16, 16, leaves=True)]
    assert estimate_cost(records, 4, 1, 2, 8).tensor_parallel == pairs
    again = [replace(layer, depth=depth) for layer, depth in zip(records, (0, 1, 2), strict=True)]
    assert estimate_cost(again, 4, 1, 2, 8).tensor_parallel == pairs
    columns = [replace(layer, depth=0) for layer in records]
    exact = estimate_cost(columns, 4, 1, 2, 8)
    assert exact.tensor_parallel == exact.tensor_parallel_layerwise != pairs


def test_ratios_of_known_networks():
    # A transformer's block: of Megatron's bytes 1/R of what enters and leaves, and the latents of k = a quarter.
    for size in (2, 4, 8):
        block = estimate_cost([(64, 256), (256, 64)], 8, 0.25, size, 16)
        assert block.phantom.sent_bytes / block.tensor_parallel.sent_bytes == 1 / size + 1 / 4
    # Deep and square: the layers' own traffic falls to p*k/n of tensor parallelism's.
    deep = estimate_cost([(64, 64)] * 40, 4, 4, 4, 8)
    assert deep.phantom.layer_bytes / deep.tensor_parallel_layerwise.layer_bytes == pytest.approx(4 * 4 / 64, rel=0.03)
    assert deep.phantom.flops_forward / deep.tensor_parallel.flops_forward == 1 / 4 + 4 * 4 / 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 4, 1, 2, 10), "layers is empty"),
        (([(10, 16)], 4, 1, 2, 10), "10 -> 16 features does not divide"),
        (([(16, 16)], 4, 1, 3, 10), "num_ranks=3 does not divide num_blocks=4"),
        (([(16, 16)], 4, 1, 2, -1), "tokens=-1"),
        (([(16, 16)], 4, 1, 2, 10, "int3"), "dtype='int3'"),
    ],
)
def test_bad_cost_arguments(arguments, message):
    with pytest.raises(PhantomError, match=message):
        estimate_cost(*arguments)
