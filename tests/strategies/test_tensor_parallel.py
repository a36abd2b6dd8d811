"""Exact tensor parallelism against the dense model of all ranks' rows, and torch's own; training and checkpoints."""

import copy
import itertools
import tempfile

import lightning as L
import pytest
import torch
import torch.distributed as dist
from ranks import mean_over_ranks, run_ranks
from test_phantom import Gated, union_of
from test_resume import SaveAt
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from training import Net, loader, own, trainer

from lightning_phantom import PhantomStrategy, TensorParallelStrategy, densify
from lightning_phantom.config import TensorParallelConfig
from lightning_phantom.distributed.agreement import agreement_of
from lightning_phantom.distributed.comm import record_traffic
from lightning_phantom.distributed.ranks import Ranks
from lightning_phantom.errors import CheckpointError, PhantomError, PlanError
from lightning_phantom.layers.split import split_layers
from lightning_phantom.layers.tensor_parallel import ParallelLinear
from lightning_phantom.plan.finder import plan_tensor_parallel
from lightning_phantom.swap import carry_out

STYLES = ("megatron", "layerwise")


def chain(*widths, bias=True):
    layers = [nn.Linear(a, b, bias) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*(m for layer in layers for m in (layer, nn.Tanh())))[:-1]


class TwoWriters(nn.Module):
    """Values that two layers write and that two layers read, in an order that is not that of the registration."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))
        self.e, self.f, self.g = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x):
        first = self.c(x)
        z = torch.tanh(self.b(torch.tanh(self.a(x))) * first)
        return self.g(torch.tanh(self.d(z)) * self.f(torch.tanh(self.e(z))))


class Looks(nn.Module):
    """Its loss reads what is inside; one linear is called twice, and alone."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        h = self.up(x)
        return self.down(torch.tanh(h)) + h.softmax(-1) + self.up(x + 1)


MODULES = {
    "pair": lambda: chain(16, 32, 8),
    "odd": lambda: chain(16, 32, 48, 24),
    "long": lambda: chain(8, 16, 24, 16, 40, bias=False),
    "gated": Gated,
    "two writers": TwoWriters,
    "looks": Looks,
    "encoder": lambda: nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True),
}


def parallel(module, style, group=None):
    """A copy of `module` in tensor-parallel layout, from this rank's weights."""
    module, size = copy.deepcopy(module), 1 if group is None else dist.get_world_size(group)
    carry_out(module, plan_tensor_parallel(module, TensorParallelConfig(size, style=style)), group, None)
    return module


def whole(module, kind):
    """Every parameter, or every gradient as DistributedDataParallel leaves it, of all ranks together."""
    layers, found, alike = split_layers(module), {}, []
    for name, parameter in module.named_parameters():
        owner, _, key = name.rpartition(".")
        split, value = layers[owner].split_of(key) if owner in layers else None, getattr(parameter, kind)
        if value is None:  # the last bias, in a gradient of a gradient
            value = torch.zeros_like(parameter)
        found[name] = value.detach().clone() if split is None else split.gather(value.detach())
        alike += [name] * (split is None)
    if alike and kind == "grad" and dist.is_initialized():
        found.update(zip(alike, mean_over_ranks([found[name] for name in alike]), strict=True))
    return found


def close(a, b, what):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda said: f"{what}: {said}")


def exactness(group):
    """Outputs and every gradient, beside those of the dense module with the rows of all ranks.

    Of rows of their own, other numbers on each rank and none on the third; with a gradient penalty; of one batch for
    all, as in prediction.
    """
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    modes = ("own", "penalty") if size == 1 else ("own", "penalty", "shared")
    for (name, make), style, mode in itertools.product(MODULES.items(), STYLES, modes):
        if (name, mode) == ("encoder", "penalty"):
            continue  # torch's attention has no second derivative
        torch.manual_seed(1)
        dense = make().double()
        split, what = parallel(dense, style, group), f"{name}, {style}, {mode}"
        assert len(split_layers(split)) == sum(type(m) is nn.Linear for m in dense.modules())
        assert all(torch.equal(v, dense.get_parameter(key)) for key, v in whole(densify(split), "data").items()), what
        width = next(m for m in dense.modules() if type(m) is nn.Linear).in_features
        lead = (2, 3, 2) if name in ("odd", "gated") else (3, 4)
        x, counts = union_of(width, lead, size, torch.Generator().manual_seed(2))
        weight = torch.randn(len(x), 64, dtype=torch.float64)

        def values(module, rows, share, x=x, lead=lead, weight=weight, mode=mode):
            x = x[rows].unflatten(0, (-1, *lead[1:])).requires_grad_()
            z = module(x)
            loss = (z.flatten(0, -2) * weight[rows, : z.shape[-1]]).sum()
            if mode == "penalty":
                loss = torch.autograd.grad(loss, x, create_graph=True)[0].square().sum()
            (loss / share).backward()
            return z.detach().flatten(0, -2), x.grad.flatten(0, -2) * share

        everyone = mine = slice(None)
        if mode == "shared":
            agreement_of(group).shared_batches = True
        else:
            mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        wanted = values(dense, everyone, 1 if mode == "shared" else size)  # of the ranks' mean loss
        for got, value in zip(values(split, mine, 1), wanted, strict=True):
            close(got, value[mine], what)
        if size > 1:
            agreement_of(group).shared_batches = False
        gradients = whole(dense, "grad")
        for key, value in whole(split, "grad").items():
            close(value, gradients[key], f"{what}, gradient of {key}")


def test_one_rank_is_the_dense_model():
    exactness(None)


def layers_hold():
    group = dist.group.WORLD
    for check in (exactness, torchs_own, siblings, overlaps, details):
        check(group)
    return True


def torchs_own(group):
    """torch's parallelize_module with sequence parallelism, which knows equal rows only."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    dense = chain(16, 32, 8).double()
    split, theirs = parallel(dense, "megatron", group), copy.deepcopy(dense)
    styles = {"0": ColwiseParallel(input_layouts=Shard(0)), "2": RowwiseParallel(output_layouts=Shard(0))}
    parallelize_module(theirs, DeviceMesh.from_group(group, "cpu"), styles)
    mine = torch.randn(2 * size, 16, dtype=torch.float64).chunk(size)[rank]
    for module in (split, theirs):
        module(mine).square().sum().backward()
    close(split(mine), theirs(mine), "outputs")
    mine = whole(split, "grad")
    for name, their in theirs.named_parameters():
        assert isinstance(their, DTensor)
        close(mine[name], their.grad.full_tensor() / size, name)


def siblings(group):
    """Gate and up gather what they read once, and scatter its gradient once."""
    for style in STYLES:
        split = parallel(Gated(), style, group)
        assert split.gate.siblings == (split.gate, split.up) and split.down.siblings == (split.down,)
        x = torch.randn(2, 16, requires_grad=True)
        with record_traffic() as sent:
            (split(x) * 1).sum().backward()
        # Megatron's pair: in, out; and each way back. Layerwise the second layer gathers, too, and all-to-alls end it.
        exchanges = {"all_gather": 2, "reduce_scatter": 2}
        assert sent.calls == exchanges | ({"all_to_all": 2} if style == "layerwise" else {})
        # One that nobody reads is computed along, and has no gradient, as without siblings.
        split.zero_grad()
        split.gate(x)
        (split.down(split.up(x)) * 1).sum().backward()
        assert split.gate.weight.grad is None and split.up.weight.grad is not None


def overlaps(group):
    """What is gathered travels while a rank's own share is multiplied, what is summed while dW is computed."""
    seen, own_waiting = [], Ranks._waiting

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "mm" in func.name():
                seen.append("product")
            return func(*args, **(kwargs or {}))

    def waiting(ranks, work, what, result):
        seen.append(f"start {what.partition(' of ')[0]}")
        wait = own_waiting(ranks, work, what, result)
        return lambda: (seen.append(f"wait {what.partition(' of ')[0]}"), wait())[1]

    def order(style, n):
        split = parallel(chain(16, 16, 16), style, group)
        x = torch.randn(4, 16, requires_grad=True)
        x = split[:n](x).detach().requires_grad_() if n else x
        seen.clear()
        Ranks._waiting = waiting
        try:
            with Products():
                split[n](x).sum().backward()
        finally:
            Ranks._waiting = own_waiting
        return [event for event in seen if "exit" not in event and "entry" not in event]

    for style, n in (("megatron", 0), ("layerwise", 2)):  # a column layer that reads tokens, one that reads features
        events = order(style, n)
        assert events[:3] == ["start input", "product", "wait input"]
        assert events[-4:] == ["product", "start gradient: input", "product", "wait gradient: input"]
    events = order("megatron", 2)
    assert events[:3] == ["product", "start sum", "wait sum"]
    assert events[3:7] == ["start gradient: sum", "product", "product", "wait gradient: sum"]


def details(group):
    """Writes into what comes out, no rows, autocast, frozen parts, dense weights loaded, the first weights."""
    for style, cut in zip(STYLES, ("column", "row"), strict=True):
        split = parallel(chain(16, 32, 16), style, group)
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
        split = parallel(chain(16, 32, 16), style, group)
        split[0].weight.requires_grad_(False)
        split(x).sum().backward()
        assert split[0].weight.grad is None and split[0].bias.grad is not None
        dense = nn.Linear(16, 32), nn.Linear(32, 16)
        for layer, plain in zip((split[0], split[2]), dense, strict=True):
            layer.load_state_dict(plain.state_dict())
            assert torch.equal(layer.dense_weight(), plain.weight)
            assert torch.equal(layer.global_tensor("bias"), plain.bias)
        # The same random weights for every number of ranks.
        made = ParallelLinear(16, 32, cut, process_group=group), ParallelLinear(16, 32, cut)
        for each in made:
            each.name, each.init_seed = "a", 5
            each.reset_parameters()
        assert torch.equal(made[0].dense_weight(), made[1].weight) and made[1].weight.std() > 0.1
        assert torch.equal(made[0].global_tensor("bias"), made[1].bias)


# The strategy


class Seen(Net):
    """Net without dropout, which keeps the norm of each step's gradients, and shares 8 rows a step out."""

    def __init__(self, **kwargs):
        super().__init__(**{"dropout": 0.0, "optimizer": torch.optim.AdamW, "lr": 0.01, **kwargs})
        self.norms = []

    def train_dataloader(self):
        return loader(32, own(8), dtype=torch.float64)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        clip = getattr(self.trainer.strategy, "clip_grad_norm_", torch.nn.utils.clip_grad_norm_)
        self.norms.append(float(clip(self.parameters(), gradient_clip_val)))


class Random(Seen):
    def __init__(self):
        super().__init__(dropout=0.3)


def exact(size="auto", **kwargs):
    """Splits the same layers on any ranks: the tail's 5 features divide by 1 only."""
    return TensorParallelStrategy(size, plan={"net.*": "phantom"}, **kwargs)


def fit(folder, strategy, ckpt_path=None, module=None, **kwargs):
    L.seed_everything(1, verbose=False)
    module = Seen() if module is None else module
    options = {"precision": "64-true", "gradient_clip_val": 0.3, "max_epochs": 2}
    t = trainer(folder, strategy=strategy, **{**options, **kwargs})
    t.fit(module, ckpt_path=ckpt_path)
    return module, t


def mean_losses(module):
    """Of all ranks' rows."""
    losses = torch.tensor(module.losses, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(losses)
        losses /= dist.get_world_size()
    return losses.tolist()


def outcome(module):
    return {"losses": mean_losses(module), "norms": module.norms, "weights": densify(module).state_dict()}


def trained(folder, *sizes):
    seen = {}
    for size, style in itertools.product(sizes, STYLES):
        strategy = exact(size, style=style)
        module, _ = fit(folder, strategy)
        assert len(split_layers(module)) == 3
        assert strategy.tensor_parallel_size == (dist.get_world_size() if size == "auto" else size)
        seen[size, style] = outcome(module)
    return seen


def formats(folder):
    """Save after an epoch in both formats, and go on from there: on the same ranks bit for bit."""
    losses = {}
    for kind, style in itertools.product(("full", "sharded"), STYLES):
        path, options = f"{folder}/{kind}-{style}.ckpt", {"style": style, "state_dict_type": kind}
        straight, _ = fit(folder, exact(**options), module=Random(), callbacks=[SaveAt(4, path)])
        again, _ = fit(folder, exact(**options), module=Random(), ckpt_path=path)
        assert len(again.losses) == 4 and straight.losses[4:] == again.losses
        assert straight.norms[4:] == again.norms
        assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), again.parameters(), strict=True))
        save = SaveAt(4, f"{folder}/{kind}-{style}-plain.ckpt")
        losses[kind, style] = mean_losses(fit(folder, exact(**options), callbacks=[save])[0])[4:]
    for kind in ("full", "sharded"):
        strategy = PhantomStrategy(num_blocks=4, state_dict_type=kind)
        fit(folder, strategy, callbacks=[SaveAt(4, f"{folder}/phantom-{kind}.ckpt")], max_epochs=1)
    return losses


def resumed(folder, *sizes, **kwargs):
    seen = {}
    for kind, style, size in itertools.product(("full", "sharded"), STYLES, sizes):
        path = f"{folder}/{kind}-{style}-plain.ckpt"
        module, _ = fit(folder, exact(size, style=style), ckpt_path=path, **kwargs)
        seen[kind, style, size] = mean_losses(module)
    return seen


# Ranks are slow to start: everything that runs on two of them, and on four, does so in one start.


def on_two_ranks(folder):
    teacher()
    return {"layers": layers_hold(), "trained": trained(folder, "auto"), "saved": formats(folder)}


def on_four_ranks(folder):
    return {"layers": layers_hold(), "trained": trained(folder, "auto", 2), "resumed": resumed(folder, "auto", 2)}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(2, on_two_ranks, str(folder), timeout_s=400)


@pytest.fixture(scope="module")
def four(two):
    return run_ranks(4, on_four_ranks, str(two[0]), timeout_s=400)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return outcome(fit(tmp_path_factory.mktemp("dense"), "ddp", devices=1)[0])


def test_several_ranks_are_the_dense_model(two, four):
    assert all(seen["layers"] for seen in (*two[1], *four))


def test_the_trainer_trains_the_dense_model(dense, two, four):
    for case, seen in [item for result in (*two[1], *four) for item in result["trained"].items()]:
        assert seen["losses"] == pytest.approx(dense["losses"], rel=1e-9), case
        assert seen["norms"] == pytest.approx(dense["norms"], rel=1e-6), case
        for name, value in dense["weights"].items():
            torch.testing.assert_close(seen["weights"][name], value, rtol=1e-9, atol=1e-9, msg=f"{case} {name}")


def one(folder, **kwargs):
    return trainer(folder, devices=1, **{"strategy": TensorParallelStrategy(), **kwargs})


@pytest.mark.parametrize("style", STYLES)
def test_one_device_trains_the_dense_model(dense, tmp_path, style):
    module, t = fit(tmp_path, exact(style=style), devices=1)
    assert len(split_layers(module)) == 3 and t.strategy.tensor_parallel_size == 1
    assert module.losses == pytest.approx(dense["losses"], rel=1e-12)


def test_checkpoints_resume_on_other_ranks(two, four):
    folder, results = two
    for seen in (*(result["resumed"] for result in four), resumed(folder, "auto", devices=1)):
        for (kind, style, size), losses in seen.items():
            assert len(losses) == 4, size
            assert losses == pytest.approx(results[0]["saved"][kind, style], rel=1e-9), (kind, style, size)


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
        fit(tmp_path, exact(style="layerwise"), ckpt_path=folder / "sharded-megatron.ckpt", devices=1)
    # A full one holds whole tensors, which any style can take.
    fit(tmp_path, exact(style="layerwise"), ckpt_path=folder / "full-megatron.ckpt", devices=1)

    def full_width():
        return PhantomStrategy(num_blocks=4, phantom_width=10**6, plan={"net.*": "phantom"})

    for strategy, theirs, ours in (
        (exact, "phantom-full", "tensor-parallel"),
        (full_width, "full-megatron-plain", "phantom"),
    ):
        path = folder / f"{theirs}.ckpt"
        with pytest.raises(CheckpointError, match=f"holds no optimizer state for {ours} layers"):
            fit(tmp_path, strategy(), devices=1, ckpt_path=path)
        rows = loader(dtype=torch.float64)
        options = {"verbose": False, "ckpt_path": path}
        (got,) = one(tmp_path, strategy=strategy(), precision="64-true").validate(Seen(), rows, **options)
        plain = Seen()
        plain.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        (wanted,) = one(tmp_path, strategy="auto", precision="64-true").validate(plain, rows, verbose=False)
        assert got["val_loss"] == pytest.approx(wanted["val_loss"], rel=1e-5)
    with pytest.raises(CheckpointError, match="saved by strategy='phantom' in shards"):
        fit(tmp_path, exact(), devices=1, ckpt_path=folder / "phantom-sharded.ckpt")
    with pytest.raises(CheckpointError, match="saved by strategy='tensor_parallel' in shards"):
        fit(tmp_path, full_width(), devices=1, ckpt_path=folder / "sharded-megatron.ckpt")


class Student(Seen):
    """Its teacher's first layer has the shape of one rank's share of its own."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Module()
        self.teacher.net = nn.Sequential(nn.Linear(16, 16))
        self.teacher.requires_grad_(False)


def teacher():
    """A checkpoint keeps the weights of a module whose layers are named like those that are split."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    module = Student()
    _, t = fit(folder[0], exact(), module=module, max_epochs=1)
    t.save_checkpoint(f"{folder[0]}/a.ckpt")
    state = torch.load(f"{folder[0]}/a.ckpt", weights_only=True)["state_dict"]
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
    with pytest.raises(PhantomError, match="cut='both': choose one of 'column', 'row'"):
        ParallelLinear(16, 16, "both")
    with pytest.raises(PhantomError, match=r"tensor_parallel_size=3 does not divide the 1 ranks there are"):
        one(tmp_path, strategy=TensorParallelStrategy(tensor_parallel_size=3)).fit(Net(), loader())

    class Plain(Net):
        def __init__(self):
            super().__init__()
            self.net = nn.Identity()
            self.tail = nn.Linear(16, 5)

    with pytest.raises(PlanError, match="nothing in Plain qualifies as a tensor-parallel layer"):
        one(tmp_path).fit(Plain(), loader())
    module = Net()
    one(tmp_path, max_steps=1).fit(module, loader())
    with pytest.raises(PhantomError, match=r"'net.0' is a tensor-parallel layer already. Use densify"):
        one(tmp_path, strategy=PhantomStrategy(num_blocks=4)).fit(module, loader())
    assert not split_layers(densify(module))
    one(tmp_path, strategy=PhantomStrategy(num_blocks=4), max_steps=1).fit(densify(module), loader())


def test_the_plan_prints_as_a_table():
    plan = plan_tensor_parallel(chain(16, 32, 48, 24), TensorParallelConfig(4))
    assert "Tensor-parallel plan: 3 of 3 linears, num_ranks=4, style=megatron" in str(plan)
    assert [layer.decision for layer in plan.layers] == ["colwise", "rowwise", "colwise"]
    odd = plan_tensor_parallel(chain(16, 30, 16, 32, 16), TensorParallelConfig(4))
    assert [layer.decision for layer in odd.layers] == ["skip", "skip", "colwise", "rowwise"]
    assert "into num_ranks=4" in odd.layers[0].reason
    layerwise = plan_tensor_parallel(chain(16, 32, 16), TensorParallelConfig(2, style="layerwise"))
    named = plan_tensor_parallel(nn.Sequential(nn.Linear(8, 8)), TensorParallelConfig(2, {"0": "phantom"}))
    assert {layer.decision for layer in (*layerwise.layers, *named.layers)} == {"colwise"}


def test_layers_on_the_meta_device_start_like_dense_ones(tmp_path):
    class Late(Net):
        def __init__(self):
            super().__init__()
            self.net = None

        def configure_model(self):
            if self.net is None:
                with torch.device("meta"):
                    self.net = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 16))

    module = Late()
    one(tmp_path, max_steps=0).fit(module, loader())
    assert {"net.0", "net.2"} <= set(split_layers(module))
    plain = nn.Linear(16, 256)
    assert module.net[0].weight.std().item() == pytest.approx(plain.weight.std().item(), rel=0.1)
    assert 0 < module.net[2].bias.abs().max() <= 1 / 16


def test_an_optimizer_may_leave_out_what_a_dense_one_may(tmp_path):
    class NoBias(Net):
        def configure_optimizers(self):
            return torch.optim.SGD([p for n, p in self.named_parameters() if not n.endswith("bias")], lr=0.1)

    module = NoBias()
    before = module.net[0].bias.detach().clone()
    one(tmp_path, max_steps=2, gradient_clip_val=1.0).fit(module, loader())
    assert torch.equal(module.net[0].bias, before)
