"""Activations between ranks: whatever code does with one gives what a plain tensor gives, or one clear error."""

import copy

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, seed, settings
from ranks import run_ranks
from torch import nn
from torch._C import DisableTorchFunctionSubclass
from torch.nn import functional as F

from lightning_phantom.distributed.agreement import agreement_of
from lightning_phantom.distributed.comm import record_traffic
from lightning_phantom.distributed.ranks import Ranks
from lightning_phantom.errors import LayoutError
from lightning_phantom.layers.activation import Place, ShardedActivation, watch_gathers
from lightning_phantom.layers.elementwise import IN_PLACE, TABLE

LEAD, WIDTH = ((2, 3), (1, 5), (4,), (0, 3)), 8  # of each rank: other numbers of rows, one with none


def places():
    """This rank's ranks, and a way to make activations of the rows above."""
    ranks = Ranks(dist.group.WORLD)
    lead = LEAD[: ranks.size][ranks.rank]
    rows = agreement_of(dist.group.WORLD).enter("made up", torch.Size(lead).numel(), "for tests")
    return Place(ranks, rows, "up"), lead


def pair(place, lead, seed=0, dtype=torch.float64, requires_grad=True, positive=False):
    """The same values as an activation and as a plain tensor, with a leaf in front of each."""
    generator = torch.Generator().manual_seed(100 * seed + place.ranks.rank)
    values = torch.randn(*lead, WIDTH, generator=generator, dtype=torch.float64)
    values = (values.abs() + 0.1 if positive else values).to(dtype)
    if not requires_grad:
        return values, values, ShardedActivation.wrap(place.features(values), values.shape, place), values
    leaf, plain_leaf = values.clone().requires_grad_(), values.clone().requires_grad_()
    local = place.features(leaf, place.gradient_scale and 1.0)
    return leaf, plain_leaf, ShardedActivation.wrap(local, leaf.shape, place), plain_leaf * 1


def same(mine, expected):
    if isinstance(mine, ShardedActivation):
        mine = mine.whole("test")
    if not isinstance(expected, torch.Tensor):
        return mine == expected
    return (
        mine.shape == expected.shape
        and mine.dtype == expected.dtype
        and torch.allclose(mine.detach(), expected.detach(), rtol=1e-12, atol=1e-12, equal_nan=True)
    )


# The table, entry by entry

ARGUMENTS = {
    "threshold": (0.1, 20.0),
    "clamp": (-0.5, 0.5),
    "clip": (-0.5, 0.5),
    "clamp_min": (0.1,),
    "clamp_max": (0.1,),
    "hardtanh": (-0.5, 0.5),
    "nan_to_num": (0.0,),
    "pow": (2,),
    "float_power": (2,),
    "__pow__": (2,),
    "__rpow__": (2,),
    "__ipow__": (2,),
    "masked_fill": ("mask", 3.0),
    "where": ("mask first",),
    "lerp": ("other", 0.3),
    "addcmul": ("other", "other"),
    "addcdiv": ("other", "other"),
    "fill_": (2.0,),
    "full_like": (2.0,),
    "to": (torch.float32,),
    "type_as": ("other",),
    "xlogy": ("other",),
}
OF_TWO = set(
    "add sub subtract rsub mul multiply div divide true_divide floor_divide remainder fmod maximum minimum fmax fmin "
    "hypot copysign atan2 gt greater ge greater_equal lt less le less_equal eq ne not_equal logical_and logical_or "
    "logical_xor __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __div__ __rdiv__ __truediv__ __rtruediv__ "
    "__floordiv__ __rfloordiv__ __mod__ __rmod__ __gt__ __ge__ __lt__ __le__ __eq__ __ne__ __iadd__ __isub__ __imul__ "
    "__idiv__ __itruediv__ __imod__ __ifloordiv__".split()
)
RANDOM = {"dropout", "alpha_dropout"}


def arguments_of(name, other, mask):
    base = name.rstrip("_") if not name.startswith("__") else name
    given = ARGUMENTS.get(name, ARGUMENTS.get(base))
    if given is None:
        given = ("other",) if base in OF_TWO else ()
    return [{"other": other, "mask": mask}.get(a, a) if isinstance(a, str) else a for a in given]


def table():
    place, lead = places()
    checked, skipped = set(), set()
    for function, name in TABLE.items():
        if name.rstrip("_") in RANDOM:
            continue
        dtype = torch.bool if name in ("__invert__",) else torch.float64
        leaf, plain_leaf, z, plain = pair(place, lead, 1, dtype, dtype is torch.float64, positive=True)
        _, _, other, plain_other = pair(place, lead, 2, requires_grad=False, positive=True)
        mask, plain_mask = (other > 0.8), (plain_other > 0.8)
        mine, theirs = arguments_of(name, other, mask), arguments_of(name, plain_other, plain_mask)
        if name.rstrip("_") == "where":
            mine, theirs = [mask, z, other], [plain_mask, plain, plain_other]
        else:
            mine, theirs = [z, *mine], [plain, *theirs]
        if name.rstrip("_") in ("erfinv", "logit", "acos", "asin", "atanh"):
            mine[0], theirs[0] = mine[0] * 0.1, theirs[0] * 0.1
        try:
            expected = function(*theirs)
        except Exception:  # no such overload, or in place on what it cannot be
            skipped.add(name)
            continue
        with watch_gathers() as seen:
            result = function(*mine)
        assert not seen, (name, seen)
        if isinstance(expected, torch.Tensor) and name not in IN_PLACE:
            assert isinstance(result, ShardedActivation), name
        if name in IN_PLACE:
            assert result is mine[0], name
        assert same(result, expected), name
        if isinstance(expected, torch.Tensor) and expected.requires_grad:
            try:
                expected.sum().backward()
            except RuntimeError:  # it has no derivative
                continue
            result.sum().backward()
            assert torch.allclose(leaf.grad, plain_leaf.grad, rtol=1e-10, atol=1e-10, equal_nan=True), name
        checked.add(name)
    return sorted(checked), sorted(skipped - checked)


@pytest.mark.parametrize("n", [2])
def test_every_operation_of_the_table(n):
    checked, skipped = run_ranks(n, table)[0]
    assert not {name for name in skipped if not name.endswith("_") and not name.startswith("__")}, skipped
    assert len(checked) > 130


def dropouts():
    place, lead = places()
    out = {}
    for inplace in (False, True):
        torch.manual_seed(place.ranks.rank)
        leaf, _, z, _ = pair(place, lead, requires_grad=True)
        kept = F.dropout(z * 1, 0.5, True, inplace)
        assert isinstance(kept, ShardedActivation)
        kept.sum().backward()
        out[inplace] = (leaf.grad, kept.whole("test").detach(), leaf.detach())
    return out


def test_dropout_falls_on_features_and_scales_them():
    for rank in run_ranks(2, dropouts):
        for grad, kept, x in rank.values():
            assert set(grad.unique().tolist()) <= {0.0, 2.0}
            assert torch.allclose(kept, x * grad)


# Chains of operations, at random

UNARY = [
    lambda z: z.relu(),
    lambda z: F.gelu(z),
    lambda z: F.gelu(z, approximate="tanh"),
    lambda z: z * 0.5 + 1,
    lambda z: 2 / (z.abs() + 1),
    lambda z: z * torch.sigmoid(z),
    lambda z: 0.5 * z * (1 + torch.tanh(0.79 * (z + 0.04 * z**3))),
    lambda z: torch.where(z > 0, z, z * 0.1),
    lambda z: z.float().double(),
    lambda z: z.clone(),
    lambda z: z.contiguous(),
    lambda z: z.detach() + z,
    lambda z: z.flatten(),
    lambda z: z.flatten().view(z.shape),
    lambda z: z[..., :4],
    lambda z: z.chunk(2, -1)[1],
    lambda z: F.glu(z, -1) if z.shape[-1] % 2 == 0 else z,
    lambda z: torch.cat([z, z], -1)[..., ::2],
    lambda z: z.softmax(-1),
    lambda z: z.transpose(0, -1),
    lambda z: z - z.mean(),
    lambda z: z / z.sum(-1, keepdim=True).abs().clamp(min=0.1),
    lambda z: F.layer_norm(z, z.shape[-1:]),
    lambda z: z + torch.ones(z.shape, dtype=z.dtype),
    lambda z: z + torch.arange(z.shape[-1], dtype=z.dtype),
    lambda z: z.masked_fill(z < 0, 0.3),
    lambda z: z + torch.tensor(0.25, dtype=z.dtype),
    lambda z: torch.addcmul(z, z, z, value=0.1),
    lambda z: torch.stack([z, z * 2]).sum(0),
    lambda z: z.unsqueeze(0)[0],
    lambda z: F.linear(z, torch.ones(3, z.shape[-1], dtype=z.dtype)),
    lambda z: torch.einsum("...i->...", z),
    lambda z: z.sort(-1).values,
    lambda z: torch.maximum(z, z * 0.5),
    lambda z: torch.lerp(z, z * 2, 0.5),
]


def relu_(z):
    return F.relu(z, inplace=True)


def add_(z):
    z += 1
    return z


def residual_(z):
    z += torch.ones(z.shape, dtype=z.dtype)
    return z


def set_(z):
    z[..., 0] = 3.0
    return z


def view_then_write(z):
    view = z.view(-1)
    z.mul_(2)
    return view.reshape(z.shape) + z


def detach_then_write(z):
    other = z.detach()
    z.mul_(2)
    return other + z


def write_through_a_view(z):
    z.view(-1)[:2] = 0.5
    return z * 1


def view_then_relu(z):
    view = z.view(-1)
    F.relu(z, inplace=True)
    return view.reshape(z.shape) + z


def relu_by_keyword(z):
    F.relu(input=z, inplace=True)
    return z


def sum_then_relu_by_keyword(z):
    z = z + z.sum()
    F.relu(input=z, inplace=True)
    return z


def half_then_write(z):
    half = z * 0.5
    z.add_(1)
    return half + z


IN_PLACES = [
    relu_,
    add_,
    residual_,
    set_,
    view_then_write,
    detach_then_write,
    write_through_a_view,
    half_then_write,
    view_then_relu,
    relu_by_keyword,
    sum_then_relu_by_keyword,
    lambda z: z.mul_(3),
    lambda z: z.clamp_(-1, 1),
    lambda z: z.copy_(z * 2),
    lambda z: torch.sigmoid_(z),
    lambda z: z.masked_fill_(z > 0.5, 0.1),
]
PROGRAMS = [*((f"u{n}", f) for n, f in enumerate(UNARY)), *((f"i{n}", f) for n, f in enumerate(IN_PLACES))]


def run_chain(chain, z):
    for _, function in chain:
        z = function(z * 1 if z.is_leaf else z)
    return z


def chains(examples):
    place, lead = places()
    ran = {"equal": 0, "refused": 0, "plain fails": 0}

    # Every rank draws the same chains.
    @seed(1)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.sampled_from(range(len(PROGRAMS))), min_size=1, max_size=6))
    def check(indices):
        chain = [PROGRAMS[i] for i in indices]
        leaf, plain_leaf, z, plain = pair(place, lead)
        try:
            expected = run_chain(chain, plain)
            failed = None
            (expected * expected).sum().backward()
        except Exception as error:
            failed = error
        votes = [None] * dist.get_world_size()
        dist.all_gather_object(votes, failed is not None)
        if any(votes):  # a shape that is none for one of the ranks
            ran["plain fails"] += 1
            return
        try:
            result = run_chain(chain, z)
        except LayoutError:
            ran["refused"] += 1
            return
        assert same(result, expected), chain
        (result * result).sum().backward()
        assert torch.allclose(leaf.grad, plain_leaf.grad, rtol=1e-8, atol=1e-8), chain
        ran["equal"] += 1

    check()
    return ran


def test_chains_of_operations_equal_those_on_plain_tensors():
    ran = run_ranks(2, chains, 300)[0]
    assert ran["equal"] >= 200 and ran["refused"] <= ran["equal"] / 4, ran


# What bypasses __torch_function__


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 3 * x * x


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return torch.add(x * torch.sigmoid(1.702 * x), x, alpha=0.5)


@torch.jit.script
def scripted_write(x: torch.Tensor) -> torch.Tensor:
    return x.add_(1)


def bypasses():
    place, lead = places()
    out = {}
    for name, function in {"autograd.Function": Cube.apply, "script": scripted}.items():
        leaf, plain_leaf, z, plain = pair(place, lead)
        result, expected = function(z), function(plain)
        (result * expected.detach()).sum().backward()
        (expected * expected.detach()).sum().backward()
        out[name] = same(result, expected) and torch.allclose(leaf.grad, plain_leaf.grad, rtol=1e-10)
    _, _, z, _ = pair(place, lead)
    for name, function in {
        "data_ptr": lambda: z.data_ptr(),
        "storage": lambda: z.untyped_storage(),
        "dlpack": lambda: torch.from_dlpack(z.detach()),
        "t_": lambda: z.transpose_(0, -1),
        "out": lambda: torch.add(1, 1, out=z.detach()),
        "set": lambda: setattr(z, "data", torch.ones(z.shape).double()),
        "after a write": lambda: Cube.apply((z * 1).relu_()),
    }.items():
        with pytest.raises(LayoutError, match="'up'") as caught:
            function()
        out[name] = str(caught.value)
    with pytest.raises(LayoutError, match="writes into an activation of 'up'"), DisableTorchFunctionSubclass():
        torch.ops.aten.add_.Tensor(z, 1.0)
    with pytest.raises(LayoutError, match="writes into an activation of 'up'"), DisableTorchFunctionSubclass():
        torch.ops.aten._foreach_add_.Scalar([z, z], 1.0)
    with pytest.raises(RuntimeError, match="in the TorchScript interpreter"):
        scripted_write(z * 1)
    written = z * 1
    torch.ops.aten.add_.Tensor(written, 1.0)
    out["operator"] = same(written, z.whole("test") + 1)
    return out


def test_custom_functions_are_right_and_raw_memory_is_refused():
    for out in run_ranks(2, bypasses):
        assert out["autograd.Function"] is True and out["script"] is True and out["operator"] is True
        assert "data_ptr reads or replaces the memory" in out["data_ptr"]
        assert "skip" in out["data_ptr"]


def gradients():
    place, lead = places()
    out = {}
    leaf, plain_leaf, z, plain = pair(place, lead)
    y, plain_y = torch.tanh(z), torch.tanh(plain)
    (mine,) = torch.autograd.grad((y * y).sum(), y, retain_graph=True)
    (theirs,) = torch.autograd.grad((plain_y * plain_y).sum(), plain_y, retain_graph=True)
    out["grad"] = torch.allclose(mine, theirs)
    seen, plain_seen = [], []
    y.register_hook(lambda g: seen.append(g.clone()) or g * 2)
    plain_y.register_hook(lambda g: plain_seen.append(g.clone()) or g * 2)
    y.retain_grad()
    plain_y.retain_grad()
    (y * y).sum().backward()
    (plain_y * plain_y).sum().backward()
    out["hook"] = torch.allclose(seen[0], plain_seen[0])
    out["retained"] = torch.allclose(y.grad, plain_y.grad)
    out["leaf"] = torch.allclose(leaf.grad, plain_leaf.grad)

    x, plain_x = z.detach().requires_grad_(), plain.detach().requires_grad_()
    (Cube.apply(x) + x * 2).sum().backward()
    (Cube.apply(plain_x) + plain_x * 2).sum().backward()
    out["of a leaf"] = torch.allclose(x.grad, plain_x.grad)

    scale, plain_scale = (nn.Parameter(torch.tensor(0.7, dtype=torch.float64)) for _ in range(2))
    _, _, z, plain = pair(place, lead)
    with watch_gathers() as gathered:
        made = z * scale
    assert not gathered
    made.square().sum().backward()
    (plain * plain_scale).square().sum().backward()
    totals = []
    for p in (scale, plain_scale):
        total = p.grad.clone()
        dist.all_reduce(total)
        totals.append(total)
    out["a scalar parameter"] = torch.allclose(*totals)
    return out


def test_gradients_of_activations_and_of_scalars():
    for out in run_ranks(2, gradients):
        assert all(out.values()), out


def numbers(kind):
    place, lead = places()
    _, _, z, _ = pair(place, lead)
    own = float(place.ranks.rank + 1)
    if kind == "number":
        y = z * own
    elif kind == "tensor":
        y = z * torch.tensor(own, dtype=torch.float64)
    else:  # one that cannot be seen through: it goes to tokens, and is right
        weight = torch.tensor(own, dtype=torch.float64, requires_grad=True) * 1
        return torch.equal((z * weight).detach(), z.whole("test").detach() * own)
    with pytest.raises(LayoutError, match="different numbers"):
        place.ranks.agreement.enter("next", 1, "")
    return isinstance(y, ShardedActivation)


@pytest.mark.parametrize("kind", ["number", "tensor", "with a gradient"])
def test_numbers_that_differ_between_ranks_are_found(kind):
    assert all(run_ranks(2, numbers, kind))


def looks():
    place, lead = places()
    _, _, z, plain = pair(place, lead)
    assert z.shape == plain.shape and z.size(-1) == WIDTH and z.dim() == plain.dim() and len(z) == len(plain)
    assert z.dtype == plain.dtype and z.device == plain.device and z.requires_grad and not z.is_leaf
    assert z.numel() == plain.numel() and z.is_floating_point() and z.grad_fn is not None
    assert isinstance(z, torch.Tensor) and repr(z).startswith("tensor(")
    assert torch.equal(copy.deepcopy(z.detach()), plain.detach())
    assert z.tolist() == plain.tolist()
    with watch_gathers() as seen:
        z.sum()
        z.mean()  # what has been brought back is kept
        z.relu()
    return [(g.layer, g.operation, "test_activation.py" in g.line) for g in seen]


def test_questions_are_answered_and_gathers_are_named():
    for seen in run_ranks(2, looks):
        assert seen == []  # repr and tolist had brought it back already


def stays():
    place, lead = places()
    _, _, z, plain = pair(place, lead)
    with watch_gathers() as seen:
        assert z.contiguous() is z and z.double() is z and z.to(z.device) is z  # as of a plain tensor
        assert isinstance(z.clone(memory_format=torch.preserve_format), ShardedActivation)
        assert isinstance(torch.clamp(z, None, 0.5), ShardedActivation)
        assert isinstance(torch.div(z, 2.0, rounding_mode="floor"), ShardedActivation)
    assert not seen and (z == None) is False and (z != None) is True  # noqa: E711
    learned = (z * 1).relu_()
    with torch.no_grad():
        assert isinstance(z.relu(), ShardedActivation) and learned.sum() == plain.relu().sum()
        rewritten = (z * 1).relu_()
        assert rewritten.sum() == plain.relu().sum() and same(rewritten * 1, plain.relu())
    cloned = z.clone()
    cloned[..., 0] = 3.0
    shared = z.detach()
    with pytest.raises(LayoutError, match="shares its memory"):
        z[..., 0] = 3.0
    assert same(shared, plain.detach())
    _, _, z, plain = pair(place, lead, requires_grad=False)
    total = torch.zeros(z.shape).double()
    assert torch.equal(total.add_(z.detach()), plain)
    ones = torch.ones(z.shape).double()
    for write in (
        lambda z: z.add_(ones),
        lambda z: z.__iadd__(ones),
        lambda z: z.__ipow__(ones),
        lambda z: z.__ifloordiv__(ones),
        lambda z: z.__imod__(ones),
        lambda z: z.copy_(ones),
        lambda z: F.relu(z, inplace=True),
    ):
        changed = z * 1
        changed.sum()
        assert write(changed) is changed
    version = changed._version
    changed[..., 0] = 3.0
    assert changed._version > version
    expected = plain.clone()
    expected[..., 0] = 1.0
    z[..., 0] = torch.ones((), dtype=z.dtype, requires_grad=True)
    assert z.requires_grad and not z.is_leaf and "CopySlices" in repr(z.grad_fn)  # as a plain tensor's
    return same(z, expected)


def test_what_a_plain_tensor_would_give_back_is_the_same_activation():
    assert all(run_ranks(2, stays))


class Inside(torch.autograd.Function):
    """Makes an activation, as a checkpoint that is recomputed makes what the layers in it return."""

    @staticmethod
    def forward(ctx, x, place):
        made = ShardedActivation.wrap(place.features(x), x.shape, place)
        assert isinstance(made.relu(), ShardedActivation)  # which no gradient goes through
        assert (made * 1).relu_().sum() >= 0
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            learned = ShardedActivation.wrap(place.features(inner), x.shape, place) * 2
            assert isinstance(learned, ShardedActivation) and learned.relu_().sum() >= 0
        ctx.shares = made.detach()
        return made

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def strangers():
    """Activations that lie otherwise meet as plain tensors."""
    place, lead = places()
    _, _, z, plain = pair(place, lead)
    group = dist.new_group()
    shorter = (2, 3) if place.ranks.rank == 0 else (1, 1)  # on the other rank they have the same shape
    rows = agreement_of(dist.group.WORLD).enter("shorter", torch.Size(shorter).numel(), "for tests")
    again = agreement_of(group).enter("elsewhere", torch.Size(lead).numel(), "for tests")
    other = torch.randn(*shorter, WIDTH, dtype=torch.float64)
    for x, stranger in (
        (plain[None], ShardedActivation.wrap(z.local, (1, *z.shape), place)),
        (
            other,
            ShardedActivation.wrap(place._replace(rows=rows).features(other), other.shape, place._replace(rows=rows)),
        ),
        (plain, ShardedActivation.wrap(z.local, z.shape, place._replace(parts=2))),
        (plain, ShardedActivation.wrap(z.local, z.shape, place._replace(ranks=Ranks(group), rows=again))),
    ):
        total = z + stranger
        assert not isinstance(total, ShardedActivation)
        if stranger.place.parts == 1:
            assert same(total, plain + x)
    leaf, plain_leaf, z, plain = pair(place, lead)
    with torch.no_grad():
        z.sum()
    z.sum().backward()  # what was brought back without a graph is brought back again
    plain.sum().backward()
    assert torch.equal(leaf.grad, plain_leaf.grad)
    leaf, plain_leaf, z, plain = pair(place, lead)
    with torch.no_grad():
        z.sum()
    z.add_(torch.ones(z.shape)).square().sum().backward()
    (plain + 1).square().sum().backward()
    assert torch.equal(leaf.grad, plain_leaf.grad)
    leaf, plain_leaf, _, plain = pair(place, lead)
    made = Inside.apply(leaf, place) * 1
    (Inside.apply(leaf, place) * 2).relu().sum().backward()
    returned = Inside.apply(leaf, place)
    returned.sum()
    returned.view(-1).mul_(2)  # memory of its own: what shared the function's has not been written into
    assert same(returned * 1, made.detach() * 2)
    (plain * 2).relu().sum().backward()
    assert torch.equal(leaf.grad, plain_leaf.grad)
    with torch.inference_mode():
        z = ShardedActivation.wrap(place.features(plain.detach() * 1), plain.shape, place)
        assert z.sum() == plain.sum()
        assert same(z.relu(), plain.relu())
    return True


def features_elsewhere():
    """Norms of what has its features elsewhere than in the last dimension, in two parts, or nowhere any more."""
    ranks = Ranks(dist.group.WORLD)
    lead = (2 + ranks.rank, WIDTH)
    rows = agreement_of(dist.group.WORLD).enter("square", torch.Size(lead).numel(), "for tests")
    _, _, z, plain = pair(Place(ranks, rows, "up"), lead)
    slopes = nn.Parameter(torch.rand(WIDTH).double())
    assert same(F.prelu(z, slopes), F.prelu(plain, slopes))
    norm = nn.BatchNorm1d(WIDTH).double().eval()
    norm.running_mean.copy_(slopes.detach())
    assert same(norm(z), norm(plain))

    rows = agreement_of(dist.group.WORLD).enter("flat", lead[0], "for tests")
    place = Place(ranks, rows, "up", parts=2)
    values = torch.randn(lead[0], WIDTH, dtype=torch.float64)
    halves = ShardedActivation.wrap(place.features(values), values.shape, place)
    bare = nn.BatchNorm1d(WIDTH, affine=False).double().eval()
    bare.running_mean.copy_(slopes.detach())
    assert same(bare(halves), bare(values))
    inside = ShardedActivation.wrap(place.features(values), values.shape, place._replace(parts=1))
    with record_traffic() as traffic:
        assert isinstance(norm(inside), ShardedActivation)
    assert not traffic.calls  # its statistics stay as they are
    halves.sum()
    halves.chunk(2, -1)[0].mul_(2)  # a view of what was brought back, as of any tensor
    values.chunk(2, -1)[0].mul_(2)
    assert same(halves, values)
    halves[..., 0] = values[..., 0] = 3.0
    assert same(F.layer_norm(halves, (WIDTH,)), F.layer_norm(values, (WIDTH,)))
    assert same(nn.PReLU().double()(halves), nn.PReLU().double()(values))

    place = Place(ranks, agreement_of(dist.group.WORLD).enter("row", 1, "for tests"), "up")
    row = torch.randn(WIDTH, dtype=torch.float64)
    scale = ShardedActivation.wrap(place.features(row), row.shape, place)
    assert same(F.layer_norm(values, (WIDTH,), scale), F.layer_norm(values, (WIDTH,), row))
    return True


def test_norms_of_features_that_lie_elsewhere_are_done_on_tokens():
    assert all(run_ranks(2, features_elsewhere))


def test_activations_that_lie_otherwise_meet_as_plain_tensors():
    assert all(run_ranks(2, strangers))


def written():
    """What is asked of an activation that has been written into as a whole, beside a plain tensor."""
    place, lead = places()
    seen = []
    for z in pair(place, lead)[2:]:
        asked = [torch.ones(z.shape).double().is_same_size(z), z.grad is None]
        z[..., 0] = 3.0
        z.register_hook(lambda grad: grad * 2)
        z.retain_grad()
        (z * z).sum().backward()
        seen.append([*asked, z.grad.sum().item(), z.requires_grad_() is z])
    return seen


def test_an_activation_that_was_written_into_has_hooks_and_gradients():
    for mine, plain in run_ranks(2, written):
        assert mine == pytest.approx(plain), (mine, plain)


def once():
    place, lead = places()
    _, _, z, _ = pair(place, lead)
    with watch_gathers() as seen:
        torch.softmax(input=z, dim=-1)
        z.sum()
        assert isinstance(z.relu(), ShardedActivation)  # although the whole is there
    with watch_gathers() as named:
        _ = (z * 1).mT
    assert [g.operation for g in named] == ["mT"]
    for no_longer in (z * 1, z.detach() * 1):
        with watch_gathers() as again, torch.no_grad():
            no_longer.sum()
            no_longer.mean()
        assert len(again) == 1
    _, _, fixed, _ = pair(place, lead, requires_grad=False)
    with watch_gathers() as again:
        fixed.sum()
        fixed.mean()
    assert len(again) == 1
    return [(g.layer, g.operation, "test_activation.py" in g.line) for g in seen]


def test_it_goes_back_to_tokens_once():
    for seen in run_ranks(2, once):
        assert seen == [("up", "softmax", True)]
