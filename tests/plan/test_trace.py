"""Which linears a trace of a forward connects, and that it leaves nothing behind."""

import gc
import random
import weakref
from itertools import pairwise

import pytest
import torch
from test_structure import ALONE, IN_ONE_BLOCK, TRACED, Block, Gated, groups_of, plan_of, reasons
from torch import nn
from torch.nn import functional as F

from lightning_phantom.plan.structure import FFN, Group


def gelu_by_hand(h):
    return 0.5 * h * (1.0 + torch.tanh(0.8 * (h + 0.04 * torch.pow(h, 3))))


class SquareActivation(nn.Module):
    def forward(self, h):
        return h * h if h.sum() > 0 else -h


class LearnedActivation(SquareActivation):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(24, 24))


ELEMENTWISE = [
    torch.relu,
    F.silu,
    lambda h: h.sigmoid() * 2.0,
    lambda h: h * torch.sigmoid(h),
    lambda h: F.dropout(F.gelu(h, approximate="tanh"), 0.1),
    lambda h: -(h + 1) / 3,
    lambda h: F.leaky_relu(h, 0.2, inplace=True),
    lambda h: h.to(torch.float32).masked_fill(h < 0, 0.0),
    gelu_by_hand,
    nn.Hardswish(),
    nn.Sequential(nn.Tanh(), nn.Dropout(0.1)),
    nn.Sequential(nn.LayerNorm(24), nn.PReLU()),
    nn.BatchNorm1d(24),
    SquareActivation(),
]
OTHERS = [
    nn.Softmax(-1),
    LearnedActivation(),
    lambda h: F.softmax(h, -1),
    lambda h: h.flip(-1),
    lambda h: h.roll(2, -1),
    lambda h: h.chunk(2, 0)[0],
    lambda h: h[0],
    lambda h: h - h.mean(-1, keepdim=True),
    lambda h: h * torch.ones(24),
    nn.Linear(24, 24, bias=False).weight.matmul,
]


@pytest.mark.parametrize("between", ELEMENTWISE)
def test_a_trace_connects_linears_whatever_their_sizes(between):
    module = Block(between, sizes=(16, 24, 8))
    assert groups_of(module) == [[("fc1",), ("fc2",)]]
    assert set(reasons(module).values()) == {TRACED}


@pytest.mark.parametrize("between", OTHERS)
def test_what_mixes_features_connects_nothing_and_only_sizes_tell_then(between):
    assert set(reasons(Block(between, sizes=(16, 24, 8))).values()) == {ALONE}
    assert set(reasons(Block(between, sizes=(16, 24, 16))).values()) == {IN_ONE_BLOCK}


def test_a_sequential_is_one_network_of_any_length():
    module = nn.Sequential(
        *(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.5)), *(nn.Linear(32, 32), nn.GELU()), nn.Linear(32, 8)
    )
    assert plan_of(module).ffns == (
        FFN(
            (
                Group(("0",), 0, True, False, False),
                Group(("3",), 1, False, False, False, after="0"),
                Group(("5",), 2, False, True, True, after="3"),
            ),
            "a trace connects its linears",
        ),
    )


def test_what_reads_one_value_is_one_group():
    (ffn,) = plan_of(Gated()).ffns
    assert ffn.groups == (Group(("gate", "up"), 0, True, False, False), Group(("down",), 1, False, True, True))
    assert plan_of(Gated()).siblings() == [("gate", "up")]

    class Heads(Block):  # of an encoder: the mean and the variance
        def forward(self, x):
            h = torch.relu(self.fc1(x))
            return self.fc2(h), self.other(h), h.sum()

    (ffn,) = plan_of(Heads(other=nn.Linear(32, 8))).ffns
    assert ffn.groups == (
        Group(("fc1",), 0, True, True, True),
        Group(("fc2", "other"), 1, False, True, True, after="fc1"),
    )


def test_a_question_about_a_value_is_no_reader_of_it():
    class Asks(Block):
        def forward(self, x):
            h = self.fc1(x)
            return self.fc2(h.to(h.dtype) * (1 / h.shape[0])).view(h.size(0), -1)

    (ffn,) = plan_of(Asks(sizes=(16, 24, 8))).ffns
    assert ffn.groups == (Group(("fc1",), 0, True, False, False), Group(("fc2",), 1, False, True, True, after="fc1"))


@pytest.mark.parametrize(
    ("between", "exits", "norms"),
    [
        (nn.LayerNorm(24), False, (2,)),
        (nn.Sequential(nn.RMSNorm(24), nn.PReLU(24)), False, (1, 0)),
        (nn.BatchNorm1d(24), False, (0,)),
        (lambda h: F.rms_norm(F.layer_norm(h, (24,)), h.shape[-1:]), False, (2, 1)),
        (lambda h: F.layer_norm(h, (24,)).relu(), False, (2,)),
        (nn.GroupNorm(2, 24), True, ()),
        (nn.Sequential(nn.GroupNorm(2, 24), nn.LayerNorm(24)), True, ()),
        (nn.LayerNorm((5, 24)), True, ()),
    ],
)
def test_norms_that_know_how_features_lie_keep_them_inside(between, exits, norms):
    (ffn,) = plan_of(Block(between, sizes=(16, 24, 8))).ffns
    expected = Group(("fc1",), 0, True, False, exits, False, norms), Group(("fc2",), 1, exits, True, True, bool(norms))
    assert ffn.groups == expected
    assert [layer.norms for layer in plan_of(Block(between, sizes=(16, 24, 8))).cost_layers()] == [norms, ()]


def chunk_it(h):
    gate, up = h.relu().chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize(
    "gate",
    [
        nn.GLU(),
        nn.Sequential(nn.Dropout(0.1), nn.GLU()),
        lambda h: F.glu(h.tanh()),
        chunk_it,
        lambda h: torch.mul(*(torch.chunk(h, 2, -1)[n] for n in (0, 1))),
    ],
)
def test_a_gated_linear_unit_reads_two_parts_of_one_linear(gate):
    class Cut(Block):
        def __init__(self, between):
            super().__init__(between)
            self.fc2 = nn.Linear(16, 24)

    plan = plan_of(Cut(gate))
    (ffn,) = plan.ffns
    assert ffn.known_by == "a trace connects its linears" and [group.parts for group in ffn.groups] == [2, 1]
    ways = [(g.enters, g.exits, g.gated) for g in ffn.groups]
    assert ways == [(True, False, False), (False, True, True)]  # their product stays inside
    assert [g.after for g in ffn.groups] == [None, None]  # and is of another width than what the first has written
    ways = [(layer.enters, layer.leaves, layer.gates, layer.gated) for layer in plan.cost_layers()]
    assert ways == [(True, False, True, False), (False, True, False, True)]


@pytest.mark.parametrize(
    ("between", "sizes", "exits", "gated", "norms"),
    [
        (nn.Sequential(nn.GLU(), nn.LayerNorm(16)), (24, 32, 16), False, True, (2,)),
        (nn.Sequential(nn.GLU(), nn.GroupNorm(2, 16)), (24, 32, 16), True, False, ()),
        (nn.Sequential(nn.GroupNorm(2, 32), nn.GLU()), (24, 32, 16), True, False, ()),
        (lambda h: F.glu(F.glu(h)), (24, 64, 16), True, False, ()),  # whose halves lie elsewhere
    ],
)
def test_what_stands_beside_a_gated_linear_unit(between, sizes, exits, gated, norms):
    first, second, third = sizes

    class Beside(Block):
        def __init__(self):
            super().__init__(between)
            self.fc1, self.fc2 = nn.Linear(first, second), nn.Linear(third, first)

    before, after = next(iter(plan_of(Beside()).ffns)).groups
    assert (before.exits, after.enters, after.gated, before.norms) == (exits, exits, gated, norms)


def test_a_gated_linear_unit_cuts_no_sum_of_two_linears():
    class Sum(Block):
        def forward(self, x):
            return self.fc2(F.glu(self.fc1(x) + self.other(x)))

    module = Sum(other=nn.Linear(16, 32))
    module.fc2 = nn.Linear(16, 24)
    before, after = next(iter(plan_of(module).ffns)).groups
    assert before.names == ("fc1", "other") and (before.parts, before.exits, after.enters) == (1, True, True)


def test_parameters_with_a_number_a_feature_connect_but_what_is_made_of_them_does_not():
    class Scales(Block):
        def forward(self, x):
            return self.fc2(self.scale * self.fc1(x) + self.shift)

    class Transforms(Scales):
        def forward(self, x):
            return self.fc2(self.fc1(x) * self.scale.exp())

    parameters = {"scale": nn.Parameter(torch.ones(1, 24)), "shift": nn.Parameter(torch.ones(24))}

    class Scaled(Scales):
        def forward(self, x, scale):  # which is no parameter, whatever it is called
            return self.fc2(self.fc1(x) * scale)

    (ffn,) = plan_of(Scales(sizes=(16, 24, 8), **parameters)).ffns
    assert ffn.groups == (Group(("fc1",), 0, True, False, False), Group(("fc2",), 1, False, True, True, after="fc1"))
    assert groups_of(Transforms(sizes=(16, 24, 8), **parameters)) == []
    assert groups_of(Scaled(sizes=(16, 24, 8), **parameters)) == []
    matrix = {"scale": nn.Parameter(torch.ones(5, 24)), "shift": nn.Parameter(torch.ones(24))}
    assert groups_of(Scales(sizes=(16, 24, 8), **matrix)) == []


def test_a_residual_inside_connects_nothing():
    class Residual(Block):
        def forward(self, x):
            return self.fc2(self.fc1(x) + x)

    assert groups_of(Residual(sizes=(16, 16, 16))) == []


def test_a_linear_between_two_that_stay_dense_is_taken():
    module = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    assert plan_of(module).ffns == (FFN((Group(("2",), 0, True, True, True),), "a trace connects its linears"),)
    assert groups_of(nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 64))) == []
    assert groups_of(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))) == []


def test_what_a_norm_has_made_whole_stays_whole():
    class Norms(Block):
        def forward(self, x):
            return self.fc2(F.layer_norm(self.norm(self.fc1(x)), (24,)))

    (ffn,) = plan_of(Norms(sizes=(16, 24, 8), norm=nn.GroupNorm(2, 24))).ffns
    assert ffn.groups == (Group(("fc1",), 0, True, False, True), Group(("fc2",), 1, True, True, True))


def test_a_linear_may_bear_the_name_of_what_a_graph_ends_with():
    class Output(Block):
        def __init__(self):
            super().__init__()
            self.output = self.fc2
            del self.fc2

        def forward(self, x):
            return self.output(torch.relu(self.fc1(x)))

    (ffn,) = plan_of(Output()).ffns
    assert ffn.groups == (Group(("fc1",), 0, True, False, False), Group(("output",), 1, False, True, True, after="fc1"))


def test_a_linear_that_is_called_with_nothing_hides_no_other():
    class Calls(Block):
        def forward(self, x):
            return self.other(), self.fc2(torch.relu(self.fc1(x)))

    assert groups_of(Calls(other=nn.Linear(16, 16))) == [[("fc1",), ("fc2",)]]


def test_linears_that_one_reads_which_stays_dense_are_no_network():
    class Sum(Block):
        def forward(self, x):
            return self.head(torch.relu(self.fc1(x)) + torch.relu(self.fc2(x)))

    assert groups_of(Sum(sizes=(16, 16, 16), head=nn.Linear(16, 1))) == []


def test_what_comes_last_before_a_linear_is_before_it_whatever_else_is():
    class Skip(Block):
        def forward(self, x):
            first = torch.relu(self.fc1(x))
            return self.last(first + torch.relu(self.fc2(first)))

    (ffn,) = plan_of(Skip(sizes=(16, 16, 16), last=nn.Linear(16, 16))).ffns
    assert [group.after for group in ffn.groups] == [None, "fc1", "fc2"]


def test_a_linear_that_is_called_twice_is_counted_once():
    class Twice(Block):
        def forward(self, x):
            return self.fc2(torch.relu(self.fc1(torch.relu(self.fc1(x)))))

    assert groups_of(Twice(sizes=(16, 16, 16))) == [[("fc1",), ("fc2",)]]
    assert [group.after for group in plan_of(Twice(sizes=(16, 16, 16))).ffns[0].groups] == [None, None]


class Opaque(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if float(x.sum()) > 0 else x
        return x


def test_the_outermost_forward_that_can_be_traced_counts():
    assert groups_of(nn.Sequential(Block(), nn.ReLU(), Block())) == [[("0.fc1",), ("0.fc2",), ("2.fc1",), ("2.fc2",)]]
    blocks = [Block(sizes=(16, 24, 8)), Block(sizes=(8, 24, 16))]
    assert groups_of(Opaque(*blocks)) == [[(f"layers.{n}.fc1",), (f"layers.{n}.fc2",)] for n in (0, 1)]
    apart = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), Opaque(nn.Linear(16, 16)))
    assert groups_of(apart) == []


def test_what_cannot_be_traced_does_not_hide_what_stands_beside_it():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.q(x) if x.sum() > 0 else self.k(x)

    class Adapted(nn.Linear):  # holds a linear of its own
        def __init__(self):
            super().__init__(16, 16)
            self.adapter = nn.Linear(16, 16)

        def forward(self, x):
            return super().forward(x) + self.adapter(x) * float(x.sum())

    class Layer(Block):
        def forward(self, x, mask=None):
            return self.fc2(torch.relu(self.fc1(x + self.mixer(x))))

    assert groups_of(Layer(sizes=(16, 24, 8), mixer=Attention())) == [[("fc1",), ("fc2",)]]
    assert groups_of(Layer(sizes=(16, 24, 8), mixer=Adapted())) == [[("fc1",), ("fc2",)]]
    blocks = [nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))) for _ in range(2)]
    blocks[0][0].register_forward_hook(lambda *_: None)
    found = [[("layers.0.1",), ("layers.0.2",)], [("layers.1.0",), ("layers.1.1",), ("layers.1.2",)]]
    assert groups_of(Opaque(*blocks)) == found


def test_a_trace_leaves_no_trace():
    class Remembers(Block):
        def forward(self, x):
            self.seen = x
            self.calls = self.calls + 1
            self.log.append(x)
            return self.fc2(torch.relu(self.fc1(x)) + torch.rand(()).item() + random.random())

    module = Remembers(calls=0, log=[], sizes=(16, 24, 8)).eval()
    before = {name: dict(vars(m)) for name, m in module.named_modules()}
    state, python_state = torch.get_rng_state(), random.getstate()
    assert groups_of(module) == [[("fc1",), ("fc2",)]]
    assert {name: dict(vars(m)) for name, m in module.named_modules()} == before
    assert module.log == [] and not hasattr(module, "seen") and not module.training
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python_state


class Unpacks(Block):
    """Where a forward unpacks a value, torch.fx leaves a cycle that holds its locals and its callers'."""

    def forward(self, x):
        x, rest = x.chunk(2, -1)
        return self.fc2(torch.relu(self.fc1(torch.cat([x, rest], -1))))


@pytest.mark.parametrize("collecting", [True, False])
def test_a_trace_does_not_keep_the_module_alive_and_the_collector_is_as_it_was(collecting):
    module = Unpacks()
    (gc.enable if collecting else gc.disable)()
    try:
        assert groups_of(module) == [[("fc1",), ("fc2",)]]
        assert gc.isenabled() is collecting
        gc.disable()
        kept = weakref.ref(module)
        del module
        assert kept() is None
    finally:
        gc.enable()


# Conditions on values


class Careful(nn.Module):
    """What people write: asserts, shapes, conditions on values, arguments of any number, values that are read twice."""

    def __init__(self, *sizes):
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(*pair) for pair in pairwise(sizes))

    def forward(self, x, *args, **kwargs):
        assert x.dim() == 2, f"{x.shape}"
        rows, width = x.shape
        if rows == 0:
            return x
        assert width > 1
        x = torch.relu(self.first(x))
        if x.sum() > 0:
            x = x * 2
        x = self.middle(F.dropout(x, 0.1, self.training))
        x = x * torch.sigmoid(x)
        return self.last(0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x**3))))


def test_conditions_and_asserts_hide_no_linears():
    assert groups_of(Careful(16, 32, 32, 16)) == [[("first",), ("middle",), ("last",)]]


def test_odd_ends_stay_dense_around_what_divides():
    module = Careful(13, 64, 64, 1)
    assert groups_of(module) == [[("middle",)]]
    reasons = {layer.name: layer.reason for layer in plan_of(module).layers}
    assert "13 -> 64 features do not divide" in reasons["first"] and "64 -> 1 features" in reasons["last"]
