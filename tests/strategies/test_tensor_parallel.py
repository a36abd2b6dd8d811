"""Exact tensor parallelism against the dense model, and against torch's own; its collectives and FLOPs counted."""

import copy
import itertools
import tempfile

import lightning as L
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_phantom import Gated, count_every_collective
from test_resume import SaveAt
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler
from torch.utils.flop_counter import FlopCounterMode
from training import Net, data, loader, trainer

from lightning_phantom import PhantomStrategy, TensorParallelStrategy, densify
from lightning_phantom.config import TensorParallelConfig
from lightning_phantom.cost.count import Layer, estimate_cost
from lightning_phantom.distributed import comm
from lightning_phantom.errors import CheckpointError, LayoutError, PhantomError, PlanError
from lightning_phantom.layers.split import split_layers
from lightning_phantom.layers.tensor_parallel import ParallelLinear
from lightning_phantom.plan.finder import plan_tensor_parallel
from lightning_phantom.swap import carry_out

STYLES = ("megatron", "layerwise")


def chain(*widths, bias=True):
    layers = [nn.Linear(a, b, bias) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*(m for layer in layers for m in (layer, nn.Tanh())))[:-1]


class TwoWriters(nn.Module):
    """Values that two layers write and that two layers read: what alternating along the chain gets wrong."""

    def __init__(self, swapped):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))
        self.e, self.f, self.g = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8)
        self.swapped = swapped

    def forward(self, x):
        long, short = (self.b, self.a), self.c
        first = short(x) if self.swapped else None
        y = long[0](torch.tanh(long[1](x)))
        z = torch.tanh(y * (first if self.swapped else short(x)))
        return self.g(torch.tanh(self.d(z)) * self.f(torch.tanh(self.e(z))))


class MixedSiblings(nn.Module):
    """Two layers that read one sharded value, of which Megatron's style cuts one by row and the other by column."""

    def __init__(self):
        super().__init__()
        self.p, self.q, self.e, self.f, self.g, self.k = (nn.Linear(16, 16) for _ in range(6))
        self.r = nn.Linear(16, 8)

    def forward(self, x):
        q, h = self.q(x), torch.tanh(self.p(x))
        e, f = self.e(h), self.f(h)
        return self.r(torch.tanh(self.g(torch.tanh(e * q)) * self.k(torch.tanh(f))))


MODULES = {
    "mixed siblings": MixedSiblings,
    "pair": lambda: chain(16, 32, 8),
    "odd": lambda: chain(16, 32, 48, 24),
    "long": lambda: chain(8, 16, 24, 16, 40, bias=False),
    "gated": Gated,
    "two writers": lambda: TwoWriters(False),
    "two writers, swapped": lambda: TwoWriters(True),
    "encoder": lambda: nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True),
}


def parallel(module, style, group=None, **kwargs):
    """A copy of `module` in tensor-parallel layout, from this rank's weights."""
    module = copy.deepcopy(module)
    size = 1 if group is None else dist.get_world_size(group)
    plan = plan_tensor_parallel(module, TensorParallelConfig(size, style=style, **kwargs))
    carry_out(module, plan, group, None)
    return module, plan


def whole(module, kind="data"):
    """Every parameter, or every gradient, of all ranks together."""
    layers, found = split_layers(module), {}
    for name, parameter in module.named_parameters():
        owner, _, key = name.rpartition(".")
        split = layers[owner].split_of(key) if owner in layers else None
        value = getattr(parameter, kind).detach()
        found[name] = value.clone() if split is None else split.gather(value)
    return found


def same(dense, split, kind, error):
    expected = {n: getattr(p, kind) for n, p in dense.named_parameters()}
    for name, value in whole(split, kind).items():
        assert value.shape == expected[name].shape, name
        assert torch.allclose(value, expected[name], atol=error, rtol=error), (name, kind)


def exactness(group):
    """Outputs, every gradient, and the weights after some steps, beside the dense module's."""
    for (name, make), style, dtype in itertools.product(MODULES.items(), STYLES, (torch.float64, torch.float32)):
        if dtype == torch.float32 and name not in ("odd", "gated"):
            continue
        torch.manual_seed(1)
        error = 1e-10 if dtype == torch.float64 else 1e-5
        dense = make().to(dtype).train()
        split, _ = parallel(dense, style, group)
        assert len(split_layers(split)) == sum(type(m) is nn.Linear for m in dense.modules()), name
        same(dense, densify(split), "data", 0)
        width = next(m for m in dense.modules() if type(m) is nn.Linear).in_features
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1) for m in (dense, split)]
        for _ in range(4):
            x = torch.randn(3, 5, width, dtype=dtype)
            xs = [x.clone().requires_grad_() for _ in range(2)]
            zs = [m(x) for m, x in zip((dense, split), xs, strict=True)]
            weight = torch.randn_like(zs[0])
            for z, optimizer in zip(zs, optimizers, strict=True):
                optimizer.zero_grad()
                (z * weight).sum().backward()
            assert torch.allclose(*zs, atol=error, rtol=error), (name, style)
            assert torch.allclose(xs[0].grad, xs[1].grad, atol=error, rtol=error), (name, style)
            same(dense, split, "grad", error)
            for optimizer in optimizers:
                optimizer.step()
        same(dense, split, "data", error)
        x = torch.randn(1, 5, width, dtype=dtype)
        with torch.no_grad():
            assert torch.allclose(dense.eval()(x), split.eval()(x), atol=error, rtol=error)
            assert torch.allclose(densify(split)(x), dense(x), atol=error, rtol=error)


def test_one_rank_is_the_dense_model():
    exactness(None)


def layers_hold():
    group = dist.group.WORLD
    for check in (exactness, traffic, torchs_own, overlaps, dropout, details):
        check(group)
    return True


# Ranks are slow to start: everything that runs on two of them, and on four, does so in one start.


def on_two_ranks(folder):
    teacher()
    return {"layers": layers_hold(), "trained": [trained({})], "saved": formats(folder)}


def on_four_ranks(folder):
    return {
        "layers": layers_hold(),
        "trained": [trained({}), trained({"data_parallel_size": 2})],
        "resumed": resumed(folder),
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(2, on_two_ranks, str(folder), timeout_s=400)


@pytest.fixture(scope="module")
def four(two):
    return run_ranks(4, on_four_ranks, str(two[0]), timeout_s=400)


def test_several_ranks_are_the_dense_model(two, four):
    assert all(seen["layers"] for seen in (*two[1], *four))


def traffic(group):
    """Calls, bytes, FLOPs and weights are those of the cost model, to the last one."""
    size = dist.get_world_size(group)
    for (name, make), style, needs_grad in itertools.product(MODULES.items(), STYLES, (True, False)):
        if name == "encoder":
            continue
        split, plan = parallel(make(), style, group)
        layers = plan.cost_layers()
        if not needs_grad:
            layers = [Layer(**{**vars(layer), "needs_input_grad": layer.input_layout == "sharded"}) for layer in layers]
        x = torch.randn(2, 5, layers[0].in_features, requires_grad=needs_grad)
        cost = estimate_cost(layers, 4, 0.25, size, 10)
        cost = cost.tensor_parallel if style == "megatron" else cost.tensor_parallel_layerwise
        with count_every_collective() as issued, comm.record_traffic() as sent, FlopCounterMode(display=False) as flops:
            loss = split(x).sum()
            forward = flops.get_total_flops()
            loss.backward()
        case = (name, style, needs_grad, sent)
        assert sum(issued.values()) == sent.total_calls == cost.calls, (case, issued, cost)
        assert sent.total_bytes == cost.sent_bytes, (case, cost)
        assert forward == cost.flops_forward, case
        assert flops.get_total_flops() == cost.flops, case
        assert sum(p.numel() for p in split.parameters()) == cost.weights, case


def torchs_own(group):
    """torch.distributed.tensor.parallel on the same module: outputs, gradients, and a step's weights."""
    torch.manual_seed(2)
    dense = chain(16, 32, 8).double()
    split, _ = parallel(dense, "megatron", group)
    theirs = copy.deepcopy(dense)
    mesh = DeviceMesh.from_group(group, "cpu")
    parallelize_module(theirs, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    x = torch.randn(6, 16, dtype=torch.float64)
    for module in (split, theirs):
        module(x).square().sum().backward()
        torch.optim.SGD(module.parameters(), lr=0.1).step()
    for (name, mine), their in zip(split.named_parameters(), theirs.parameters(), strict=True):
        assert isinstance(their, DTensor)
        for a, b in ((mine, their), (mine.grad, their.grad)):
            assert torch.allclose(a, b.to_local(), atol=1e-12), name


def overlaps(group):
    """Collectives start before the products that do not need them, and are waited for after."""
    events = []

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(word in func.name() for word in ("mm", "bmm")) and "comm" not in func.name():
                events.append("product")
            return func(*args, **(kwargs or {}))

    def order(style, layouts):
        layer = ParallelLinear(16, 16, style, process_group=group, input_layout=layouts[0], output_layout=layouts[1])
        ranks = layer.ranks

        def note(kind, real):
            def start(tensor):
                events.append(f"start {kind}")
                wait = real(tensor)
                return lambda: (events.append(f"wait {kind}"), wait())[1]

            return start

        for kind in ("all_gather", "reduce_scatter", "sum"):
            setattr(ranks, kind, note(kind, getattr(ranks, kind)))
        x = torch.randn(4, 16 // (ranks.size if layouts[0] == "sharded" else 1), requires_grad=True)
        events.clear()
        with Products():
            layer(x).sum().backward()
        return list(events)

    others = ["product"] * (dist.get_world_size(group) - 1)
    backward = ["product", "start reduce_scatter", "product", "wait reduce_scatter"]
    assert order("layerwise", ("sharded", "sharded")) == [
        *("start all_gather", "product", "wait all_gather", *others),
        *backward,
    ]
    backward = ["product", "start sum", "product", "wait sum"]
    assert order("megatron", ("replicated", "sharded")) == ["product", *backward]
    forward = ["product", "start sum", "wait sum"]
    assert order("megatron", ("sharded", "replicated")) == [*forward, "product", "product"]


def dropout(group):
    """Ranks draw masks of their own where a value is sharded, and the same one where it is whole."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    for style in STYLES:
        torch.manual_seed(3)
        module = nn.Sequential(
            *(nn.Linear(16, 64), nn.Dropout(0.5), nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 16))
        )
        split, _ = parallel(module, style, group)
        seen = {}
        for n in (1, 3):
            split[n].register_forward_hook(lambda m, i, o, n=n, seen=seen: seen.update({n: o == 0}))
        state = torch.get_rng_state()
        z = split(torch.ones(8, 16))
        z.sum().backward()
        whole_z = [torch.empty_like(z) for _ in range(size)]
        dist.all_gather(whole_z, z.detach(), group=group)
        assert all(torch.equal(each, z) for each in whole_z)
        for n, sharded in ((1, True), (3, style == "layerwise")):
            masks = [torch.empty_like(seen[n]) for _ in range(size)]
            dist.all_gather(masks, seen[n].contiguous(), group=group)
            assert masks[rank].shape[1] == (64 // size if sharded else 64)
            assert 0.2 < masks[0].float().mean() < 0.8
            assert torch.equal(masks[0], masks[1]) != sharded
        torch.set_rng_state(state)
        assert torch.equal(split(torch.ones(8, 16)), z)


def details(group):
    """What ends where a member is called by itself, a write into what the chain gives, empty batches, autocast."""
    for style in STYLES:
        split, _ = parallel(chain(16, 32, 16), style, group)
        for member in (split[0], split[2]):
            with pytest.raises(LayoutError, match="was called outside the forward of"):
                member(torch.randn(2, member.in_features))
        x = torch.randn(1, 16, requires_grad=True)
        out = split(x)
        out += 1
        out.sum().backward()
        assert x.grad.isfinite().all()
        assert split(torch.empty(0, 16)).shape == (0, 16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = split(x)
        assert out.dtype is torch.bfloat16
        out.sum().backward()
        assert split[2].weight.grad.dtype is torch.float32
        split, _ = parallel(chain(16, 32, 16), style, group)
        split[0].weight.requires_grad_(False)
        split(x).sum().backward()
        assert split[0].weight.grad is None and split[0].bias.grad is not None
        dense = nn.Linear(16, 32), nn.Linear(32, 16)
        split[0].load_state_dict(dense[0].state_dict())
        split[2].load_state_dict(dense[1].state_dict())
        for layer, plain in zip((split[0], split[2]), dense, strict=True):
            assert torch.equal(layer.dense_weight(), plain.weight)
            assert torch.equal(layer.global_tensor("bias"), plain.bias)
        # The same random weights for every number of ranks.
        layer = ParallelLinear(16, 32, style, process_group=group, input_layout="sharded")
        alone = ParallelLinear(16, 32, style)
        for each in (layer, alone):
            each.name, each.init_seed = "a", 5
            each.reset_parameters()
        assert torch.equal(layer.dense_weight(), alone.weight) and alone.weight.std() > 0.1
        assert torch.equal(layer.global_tensor("bias"), alone.bias)


# The strategy


class Seen(Net):
    """Net without dropout, which keeps the norm of each step's gradients, and sees data in the same order anywhere."""

    rows = 8  # of all replicas together in a step

    def __init__(self, **kwargs):
        super().__init__(**{"dropout": 0.0, "optimizer": torch.optim.AdamW, "lr": 0.01, **kwargs})
        self.norms = []

    def train_dataloader(self):
        rows = data(32, self.norm.weight.dtype)
        replicas = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        sampler = DistributedSampler(rows, shuffle=False, **replicas)
        return DataLoader(rows, self.rows // replicas["num_replicas"], sampler=sampler)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        clip = getattr(self.trainer.strategy, "clip_grad_norm_", torch.nn.utils.clip_grad_norm_)
        self.norms.append(float(clip(self.parameters(), gradient_clip_val)))


def shared_folder():
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder, 0)
    return folder[0]


def fit(folder, strategy, dtype=torch.float64, ckpt_path=None, module=None, **kwargs):
    L.seed_everything(1, verbose=False)
    module = Seen() if module is None else module
    precision = "64-true" if dtype == torch.float64 else "32-true"
    options = {"precision": precision, "gradient_clip_val": 0.3, "max_epochs": 2, "use_distributed_sampler": False}
    t = trainer(folder, strategy=strategy, **{**options, **kwargs})
    t.fit(module, ckpt_path=ckpt_path)
    return module, t


def outcome(module):
    return {"losses": module.losses, "norms": module.norms, "weights": densify(module).state_dict()}


def trained(sizes):
    seen = {}
    replicas = sizes.get("data_parallel_size", 1)
    for style, dtype in itertools.product(STYLES, (torch.float64, torch.float32)):
        strategy = TensorParallelStrategy(style=style, **sizes)
        module, _ = fit(shared_folder(), strategy, dtype)
        assert len(split_layers(module)) == 3
        assert (strategy.tensor_parallel_size, strategy.data_parallel_size) == (
            dist.get_world_size() // replicas,
            replicas,
        )
        seen[style, dtype] = outcome(module)
    return seen


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    return {d: outcome(fit(folder, "auto", d, devices=1)[0]) for d in (torch.float64, torch.float32)}


def test_the_trainer_trains_the_dense_model(dense, two, four):
    for replicas, seen in [(n, seen) for result in (*two[1], *four) for n, seen in enumerate(result["trained"], 1)]:
        for (style, dtype), result in seen.items():
            error = 1e-9 if dtype == torch.float64 else 1e-4
            expected = dense[dtype]
            for name, value in expected["weights"].items():
                assert torch.allclose(result["weights"][name], value, atol=error, rtol=error), (style, dtype, name)
            assert result["norms"] == pytest.approx(expected["norms"], rel=1e-6 if dtype == torch.float64 else 1e-4)
            if replicas == 1:
                assert result["losses"] == pytest.approx(expected["losses"], rel=error)


def one(folder, **kwargs):
    return trainer(folder, devices=1, **{"strategy": TensorParallelStrategy(), **kwargs})


@pytest.mark.parametrize("style", STYLES)
def test_one_device_trains_the_dense_model(dense, tmp_path, style):
    module, t = fit(tmp_path, TensorParallelStrategy(style=style), devices=1)
    assert len(split_layers(module)) == 3 and t.strategy.tensor_parallel_size == 1
    assert module.losses == pytest.approx(dense[torch.float64]["losses"], rel=1e-12)


class Random(Seen):
    def __init__(self):
        super().__init__(dropout=0.3)


def formats(folder):
    """Save after an epoch in both formats, and go on from there: on the same ranks bit for bit."""
    losses = {}
    for kind, style in itertools.product(("full", "sharded"), STYLES):
        path = f"{folder}/{kind}-{style}.ckpt"
        options = {"style": style, "state_dict_type": kind}
        save = SaveAt(4, path)
        straight, _ = fit(folder, TensorParallelStrategy(**options), module=Random(), callbacks=[save])
        again, _ = fit(folder, TensorParallelStrategy(**options), module=Random(), ckpt_path=path)
        assert len(again.losses) == 4 and straight.losses[4:] == again.losses
        assert straight.norms[4:] == again.norms
        for a, b in zip(straight.parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b)
        save = SaveAt(4, f"{folder}/{kind}-{style}-plain.ckpt")
        losses[kind, style] = fit(folder, TensorParallelStrategy(**options), callbacks=[save])[0].losses[4:]
    for kind in ("full", "sharded"):
        strategy = PhantomStrategy(num_blocks=4, state_dict_type=kind)
        fit(folder, strategy, callbacks=[SaveAt(4, f"{folder}/phantom-{kind}.ckpt")], max_epochs=1)
    return losses


def resumed(folder, **kwargs):
    seen = {}
    for kind, style in itertools.product(("full", "sharded"), STYLES):
        path = f"{folder}/{kind}-{style}-plain.ckpt"
        seen[kind, style] = fit(folder, TensorParallelStrategy(style=style), ckpt_path=path, **kwargs)[0].losses
    return seen


def test_checkpoints_resume_on_other_ranks(two, four):
    folder, results = two
    for seen in (*(result["resumed"] for result in four), resumed(folder, devices=1)):
        for case, losses in seen.items():
            assert len(losses) == 4 and losses == pytest.approx(results[0]["saved"][case], rel=1e-9), case


def test_a_full_checkpoint_is_a_plain_one(two):
    folder, _ = two
    for style in STYLES:
        path = folder / f"full-{style}-plain.ckpt"
        file = torch.load(path, weights_only=True)
        plain = Seen.load_from_checkpoint(path, map_location="cpu")
        assert file["state_dict"].keys() == Seen().state_dict().keys()
        assert all(type(m) is nn.Linear for m in plain.net if hasattr(m, "weight"))
        assert all(torch.equal(p, file["state_dict"][name].float()) for name, p in plain.named_parameters())
        assert file["phantom"]["method"] == "tensor_parallel" and not file["phantom"]["factors"]


def test_styles_and_methods_tell_their_checkpoints_apart(two, tmp_path):
    folder, _ = two
    with pytest.raises(CheckpointError, match=r"'net.3' is split along .* use the style it was saved with"):
        fit(tmp_path, TensorParallelStrategy(style="layerwise"), ckpt_path=folder / "sharded-megatron.ckpt", devices=1)
    # A full one holds whole tensors, which any style can take.
    fit(tmp_path, TensorParallelStrategy(style="layerwise"), ckpt_path=folder / "full-megatron.ckpt", devices=1)

    def exact():
        return PhantomStrategy(num_blocks=4, phantom_width=10**6, plan={"net.*": "phantom"})

    for strategy, theirs, ours in (
        (TensorParallelStrategy, "phantom-full", "tensor-parallel"),
        (exact, "full-megatron-plain", "phantom"),
    ):
        path = folder / f"{theirs}.ckpt"
        with pytest.raises(CheckpointError, match=f"holds no optimizer state for {ours} layers"):
            fit(tmp_path, strategy(), devices=1, ckpt_path=path)
        (got,) = one(tmp_path, strategy=strategy(), precision="64-true").validate(
            Seen(), loader(dtype=torch.float64), ckpt_path=path, verbose=False
        )
        plain = Seen()
        plain.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        (expected,) = one(tmp_path, strategy="auto", precision="64-true").validate(
            plain, loader(dtype=torch.float64), verbose=False
        )
        assert got["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
    with pytest.raises(CheckpointError, match="saved by strategy='phantom' in shards"):
        fit(tmp_path, TensorParallelStrategy(), devices=1, ckpt_path=folder / "phantom-sharded.ckpt")
    with pytest.raises(CheckpointError, match="saved by strategy='tensor_parallel' in shards"):
        fit(tmp_path, exact(), devices=1, ckpt_path=folder / "sharded-megatron.ckpt")


class Student(Seen):
    """Its teacher's first layer has the shape of one rank's share of its own."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Module()
        self.teacher.net = nn.Sequential(nn.Linear(16, 16))
        self.teacher.requires_grad_(False)


def teacher():
    """A checkpoint keeps the weights of a module whose layers are named like those that are split."""
    folder = shared_folder()
    module = Student()
    dist.broadcast(module.teacher.net[0].weight.data, 0)
    _, t = fit(folder, TensorParallelStrategy(plan={"net.*": "phantom"}), torch.float32, module=module, max_epochs=1)
    t.save_checkpoint(f"{folder}/a.ckpt")
    dist.barrier()
    state = torch.load(f"{folder}/a.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["teacher.net.0.weight"], module.teacher.net[0].weight)
    assert state["net.0.weight"].shape == (32, 16)


def test_names_and_refusals(tmp_path):
    assert one(tmp_path, strategy="tensor_parallel").strategy._request.style == "megatron"
    for arguments, message in (
        ({"style": "rows"}, "style='rows': choose one of 'megatron', 'layerwise'"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0: needs an int"),
        ({"plan": {"*": "tp"}}, "'tp' is not a word"),
        ({"start_method": "spawn"}, "TensorParallelStrategy does not take start_method"),
    ):
        with pytest.raises(PhantomError, match=message):
            TensorParallelStrategy(**arguments)
    with pytest.raises(PhantomError, match=r"tensor_parallel_size=3 x data_parallel_size=1 needs 3 ranks"):
        one(tmp_path, strategy=TensorParallelStrategy(tensor_parallel_size=3)).fit(Net(), loader())

    class Plain(Net):
        def __init__(self):
            super().__init__()
            self.net = nn.Identity()

    with pytest.raises(PlanError, match="nothing in Plain qualifies as a tensor-parallel layer"):
        one(tmp_path).fit(Plain(), loader())
    module = Net()
    one(tmp_path, max_steps=1).fit(module, loader())
    for strategy, message in (
        (PhantomStrategy(num_blocks=4), "'net.0' is a tensor-parallel layer already"),
        (TensorParallelStrategy(style="layerwise"), "on 1 ranks in style='megatron' already"),
    ):
        with pytest.raises(PhantomError, match=message):
            one(tmp_path, strategy=strategy).fit(module, loader())
    assert not split_layers(densify(module))
    one(tmp_path, strategy=PhantomStrategy(num_blocks=4), max_steps=1).fit(densify(module), loader())


def test_the_plan_prints_as_a_table():
    plan = plan_tensor_parallel(chain(16, 32, 48, 24), TensorParallelConfig(4))
    text = str(plan)
    assert "Tensor-parallel plan: 3 of 3 linears, num_ranks=4, style=megatron" in text
    assert [layer.decision for layer in plan.layers] == ["colwise", "rowwise", "gathered"]
    odd = plan_tensor_parallel(chain(16, 30, 16, 32, 16), TensorParallelConfig(4))
    assert [layer.decision for layer in odd.layers] == ["skip", "skip", "colwise", "rowwise"]
    assert "into num_ranks=4" in odd.layers[0].reason
    named = plan_tensor_parallel(nn.Sequential(nn.Linear(8, 8)), TensorParallelConfig(2, {"0": "phantom"}))
    assert named.layers[0].decision == "gathered"


def test_layers_on_the_meta_device_start_like_dense_ones(tmp_path):
    class Late(Seen):
        def __init__(self):
            super().__init__()
            self.net = None

        def configure_model(self):
            if self.net is None:
                with torch.device("meta"):
                    self.net = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 16))

    module = Late()
    one(tmp_path, max_steps=0, use_distributed_sampler=False).fit(module)
    assert list(split_layers(module)) == ["net.0", "net.2"]
    plain = nn.Linear(16, 256)
    assert module.net[0].weight.std().item() == pytest.approx(plain.weight.std().item(), rel=0.1)
    assert 0 < module.net[2].bias.abs().max() <= 1 / 16


def test_an_optimizer_may_leave_out_what_a_dense_one_may(tmp_path):
    class NoBias(Seen):
        def configure_optimizers(self):
            return torch.optim.SGD([p for n, p in self.named_parameters() if not n.endswith("bias")], lr=0.1)

    module = NoBias()
    before = module.net[0].bias.detach().clone()
    one(tmp_path, max_steps=2, gradient_clip_val=1.0, use_distributed_sampler=False).fit(module)
    assert torch.equal(module.net[0].bias, before)
