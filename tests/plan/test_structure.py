"""Which linears form feed-forward networks: by a trace, by how they are registered, and which have other parts."""

import gc
import random
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_phantom.config import PhantomConfig
from lightning_phantom.plan.finder import plan_phantom
from lightning_phantom.plan.structure import FFN, Group

TRACED = "FFN: a trace connects its linears"
IN_ONE_BLOCK = "FFN: d -> h and h -> d in one block"
ALONE = "stands alone: no other linear makes an FFN with it"


def plan_of(module, num_blocks=4):
    return plan_phantom(module, PhantomConfig(num_blocks, phantom_width=1))


def groups_of(module):
    """The names that read the same value, in order, of each FFN."""
    return [[group.names for group in ffn.groups] for ffn in plan_of(module).ffns]


def reasons(module):
    return {layer.name: layer.reason for layer in plan_of(module).layers}


class Block(nn.Module):
    """fc2(between(fc1(x))) with whatever a test puts between."""

    def __init__(self, between=torch.relu, sizes=(16, 32, 16), **modules):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(*sizes[:2]), nn.Linear(*sizes[1:])
        for name, module in modules.items():
            setattr(self, name, module)
        self.between = between

    def forward(self, x):
        return self.fc2(self.between(self.fc1(x)))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def gelu_by_hand(h):
    return 0.5 * h * (1.0 + torch.tanh(0.8 * (h + 0.04 * torch.pow(h, 3))))


# A trace

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
]
OTHERS = [
    lambda h: F.softmax(h, -1),
    lambda h: h.flip(-1),
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
                Group(("3",), 1, False, False, False),
                Group(("5",), 2, False, True, True),
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
    assert ffn.groups == (Group(("fc1",), 0, True, True, True), Group(("fc2", "other"), 1, False, True, True))


def test_a_question_about_a_value_is_no_reader_of_it():
    class Asks(Block):
        def forward(self, x):
            h = self.fc1(x)
            return self.fc2(h.to(h.dtype) * (1 / h.shape[0])).view(h.size(0), -1)

    (ffn,) = plan_of(Asks(sizes=(16, 24, 8))).ffns
    assert ffn.groups == (Group(("fc1",), 0, True, False, False), Group(("fc2",), 1, False, True, True))


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


def test_a_linear_that_is_called_twice_is_counted_once():
    class Twice(Block):
        def forward(self, x):
            return self.fc2(torch.relu(self.fc1(torch.relu(self.fc1(x)))))

    assert groups_of(Twice(sizes=(16, 16, 16))) == [[("fc1",), ("fc2",)]]


def test_the_outermost_forward_that_can_be_traced_counts():
    class Opaque(nn.Module):
        def __init__(self, *layers):
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x) if x.sum() > 0 else x
            return x

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

    class Layer(Block):
        def forward(self, x, mask=None):
            return self.fc2(torch.relu(self.fc1(x + self.mixer(x))))

    assert groups_of(Layer(sizes=(16, 24, 8), mixer=Attention())) == [[("fc1",), ("fc2",)]]


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
    """Where a forward unpacks a value, torch.fx leaves a cycle that holds the locals of all its callers."""

    def forward(self, x):
        x, rest = x.chunk(2, -1)
        return self.fc2(torch.relu(self.fc1(torch.cat([x, rest], -1))))


@pytest.mark.parametrize("collecting", [True, False])
def test_a_trace_keeps_nothing_of_its_callers_alive_and_the_collector_is_as_it_was(collecting):
    def caller():
        mine = Block()
        assert groups_of(Unpacks()) == [[("fc1",), ("fc2",)]]
        return weakref.ref(mine)

    (gc.enable if collecting else gc.disable)()
    try:
        mine = caller()
        assert gc.isenabled() is collecting and mine() is None
    finally:
        gc.enable()


# How linears are registered


class Untraceable(nn.Module):
    """Holds linears of given sizes under given names; its forward depends on values."""

    def __init__(self, **sizes):
        super().__init__()
        for name, size in sizes.items():
            setattr(self, name, nn.Linear(*size))

    def forward(self, x):
        raise AssertionError("traced") if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ({"a": (16, 32), "b": (32, 16)}, [[("a",), ("b",)]]),
        ({"a": (32, 16), "b": (16, 32)}, [[("a",), ("b",)]]),
        ({"a": (16, 32), "b": (16, 32), "c": (32, 16)}, [[("a", "b"), ("c",)]]),
        ({"a": (16, 32), "b": (32, 16), "c": (16, 32), "d": (32, 16)}, [[("a",), ("b",)], [("c",), ("d",)]]),
        ({"x": (16, 16), "a": (16, 32), "b": (32, 16)}, [[("a",), ("b",)]]),
        ({"a": (16, 32), "x": (32, 32), "b": (32, 16)}, []),  # something linear lies between
        ({"a": (16, 16), "b": (16, 16)}, []),  # neighbours alone are no evidence
        ({"q": (16, 32), "k": (16, 32), "v": (16, 32), "o": (32, 16)}, []),  # attention, whatever it is called
        ({"a": (16, 32), "b": (32, 8)}, []),
        ({"a": (16, 18), "b": (18, 16)}, []),
    ],
)
def test_sizes_and_order_tell_where_no_trace_does(sizes, groups):
    module = Untraceable(**sizes)
    assert groups_of(module) == groups
    assert {IN_ONE_BLOCK} >= {layer.reason for layer in plan_of(module).swapped}


def test_linears_of_two_numbered_parts_are_not_one_block():
    def parts(*modules):
        module = Untraceable()
        module.layers = nn.ModuleList(modules)
        return module

    assert groups_of(parts(Untraceable(a=(16, 32)), Untraceable(a=(32, 16)))) == []
    two = parts(*(Untraceable(a=(16, 32), b=(32, 16)) for _ in range(2)))
    assert groups_of(two) == [[(f"layers.{n}.a",), (f"layers.{n}.b",)] for n in (0, 1)]


def test_a_gate_and_up_in_one_linear_is_said_to_be_one():
    module = Untraceable(gate_up=(16, 64), down=(32, 16))
    assert set(reasons(module).values()) == {"gate and up are one linear here, whose halves are read apart"}


# What a model says itself


class Declares(nn.Module):
    """A model with a tensor parallel plan of its own, as Hugging Face's models have them."""

    base_model_prefix = "model"

    def __init__(self, block, words):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": block})])
        self._tp_plan = {f"layers.*.mlp.{key}": word for key, word in words.items()}


SWAPPED = {"a": (16, 24), "b": (24, 24), "c": (16, 24), "d": (24, 16)}  # neither trace nor order tells what belongs


def test_a_models_own_plan_counts_first():
    module = Declares(
        Untraceable(**SWAPPED), {"a": "colwise", "c": "colwise", "d": "rowwise", "b": "sequence_parallel"}
    )
    name = "layers.0.mlp."
    assert groups_of(module) == [[(f"{name}a", f"{name}c"), (f"{name}d",)]]
    assert reasons(module)[f"{name}a"] == "FFN: the model's own TP plan names it"
    wrapped = nn.Module()
    wrapped.net = module
    assert groups_of(wrapped) == [[(f"net.{name}a", f"net.{name}c"), (f"net.{name}d",)]]


@pytest.mark.parametrize(
    "words",
    [
        {"a": "colwise"},
        {"a": "colwise", "b": "colwise", "d": "rowwise"},  # b does not lead where d comes from
        {"a": "colwise_rep", "c": "colwise_rep", "d": "rowwise"},
        {},
    ],
)
def test_a_plan_that_names_no_network_counts_for_nothing(words):
    assert groups_of(Declares(Untraceable(**SWAPPED), words)) == [[("layers.0.mlp.c",), ("layers.0.mlp.d",)]]


# What has another part to play


def named(name, module):
    root = Untraceable()
    setattr(root, name, module)
    return root


class BottleneckAttention(Untraceable):
    pass


class Attention2(Untraceable):
    pass


class AttentionBlock(Untraceable):
    pass


FFN_SIZES = {"a": (16, 32), "b": (32, 16)}


@pytest.mark.parametrize(
    ("name", "kind", "is_attention"),
    [
        ("self_attn", Untraceable, True),
        ("SelfAttention", Untraceable, True),
        ("mixer", BottleneckAttention, True),
        ("mixer", Attention2, True),
        ("attention_block", AttentionBlock, False),
        ("mlp", Untraceable, False),
    ],
)
def test_attention_is_told_by_its_name_or_its_class(name, kind, is_attention):
    module = named(name, kind(**FFN_SIZES))
    assert bool(plan_of(module).swapped) is not is_attention
    called = kind.__name__ if kind is not Untraceable else name
    assert set(reasons(module).values()) == {f"part of the attention ({called})" if is_attention else IN_ONE_BLOCK}


def test_what_holds_attention_may_hold_a_network_beside_it():
    block = BottleneckAttention(**FFN_SIZES)
    block.attention = Untraceable(q=(16, 24), o=(24, 16))
    block.attention.out = named("dense", nn.Linear(16, 16))
    module = named("cross_attn", block)
    assert groups_of(module) == [[("cross_attn.a",), ("cross_attn.b",)]]
    assert reasons(module)["cross_attn.attention.q"] == "part of the attention (attention)"
    bert = named("attention", Untraceable(dense=(16, 16)))
    bert.attention.self = BottleneckAttention(q=(16, 16))
    assert reasons(bert)["attention.dense"] == "part of the attention (attention)"
    lists = named("attentions", nn.ModuleList([Untraceable(**FFN_SIZES)]))
    assert groups_of(lists) == [[("attentions.0.a",), ("attentions.0.b",)]]


def test_a_models_output_embedding_is_a_head():
    class Model(nn.Sequential):
        def get_output_embeddings(self):
            return self[2]

    class Fails(nn.Sequential):
        def get_output_embeddings(self):
            raise NotImplementedError

    layers = nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 40)
    assert reasons(Model(*layers)) == {"0": ALONE, "2": "the model's head: its output embedding"}
    assert set(reasons(Fails(*layers)).values()) == {TRACED}
