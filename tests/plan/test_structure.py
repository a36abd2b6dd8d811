"""Which linears form networks by how they are registered or what a model says, and which have other parts."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_phantom.config import PhantomConfig
from lightning_phantom.plan.finder import plan_phantom

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
        ({"a": (16, 32), "b": (16, 32), "c": (32, 8)}, []),
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


def test_a_gate_and_up_in_one_linear_make_a_network_with_the_one_that_reads_their_product():
    module = Untraceable(gate_up=(16, 64), down=(32, 16))
    (ffn,) = plan_of(module).ffns
    ways = [(g.names, g.enters, g.gated, g.exits) for g in ffn.groups]
    assert ways == [(("gate_up",), True, False, False), (("down",), False, True, True)]
    assert [layer.parts for layer in plan_of(module).layers] == [2, 1]
    assert [layer.parts for layer in plan_of(module, 8).layers] == [2, 1]
    narrow = Untraceable(gate_up=(16, 24), down=(12, 16))  # of which 8 blocks would have a part and a half each
    assert [(layer.decision, layer.parts) for layer in plan_of(narrow, 8).layers] == [("skip", 1), ("skip", 1)]
    assert "gate and up are one linear" in reasons(module)["gate_up"]
    assert len(groups_of(Attention2(gate_up=(16, 64), down=(32, 16)))) == 1  # the whole model's name says nothing
    mixer = Untraceable(weights=(16, 64), value=(32, 16))
    mixer.attn = nn.Identity()  # its kernel, say
    said = reasons(nn.ModuleDict({"self_attn": mixer, "mlp": module}))
    assert "part of the attention" in said["self_attn.weights"] and "part of the attention" in said["self_attn.value"]


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
    lists = named("attn", nn.ModuleList([Untraceable(**FFN_SIZES)]))
    assert groups_of(lists) == [[("attn.0.a",), ("attn.0.b",)]]


def test_what_attention_writes_makes_no_network_of_a_linear_behind_it():
    class Behind(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.fc, self.head = nn.Sequential(nn.Linear(16, 16)), nn.Linear(16, 16), nn.Linear(16, 1)

        def forward(self, x):
            return self.head(torch.relu(self.fc(torch.relu(self.attn(x)))))

    assert groups_of(Behind()) == []


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


# Linears that others train around, or call now and then


class LoraLinear(nn.Module):
    """As the library peft makes them: the frozen base weight, and a way around it of two linears."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 8, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(8, base.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_what_a_lora_trains_around_stays_dense_and_its_own_linears_are_no_network():
    module = Gated()
    module.gate, module.down = LoraLinear(module.gate), LoraLinear(module.down)
    assert not plan_of(module).swapped
    found = reasons(module)
    assert found["gate.base_layer"] == "the base weight, which it trains around, of a LoRA or another adapter ('gate')"
    assert found["down.lora_A.default"] == "a part, of a LoRA or another adapter ('down')"
    named = plan_phantom(module, PhantomConfig(4, plan={"*.base_layer": "phantom"}))
    assert [layer.name for layer in named.swapped] == ["gate.base_layer", "down.base_layer"]


def test_experts_that_a_router_chooses_stay_dense_and_the_one_for_all_is_taken():
    module = nn.Module()
    module.experts = nn.ModuleList([Gated(), Gated()])
    module.shared_experts = Gated()
    plan = plan_of(module)
    assert [layer.name for layer in plan.swapped] == [f"shared_experts.{name}" for name in ("gate", "up", "down")]
    assert "own tokens" in reasons(module)["experts.0.gate"]


# What is like a linear


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(torch.zeros(4, 64, 16))
        self.bias = nn.Parameter(torch.zeros(4, 64))


class OfAnotherLibrary(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight, self.bias = nn.Parameter(torch.zeros(out_channels, in_channels)), None


def test_what_is_like_a_linear_has_a_row_that_says_why_it_stays_dense():
    module = nn.ModuleDict({"experts": Fused(), "embed": nn.Embedding(4, 4), "conv": nn.Conv1d(4, 4, 4)})
    module["lin"] = OfAnotherLibrary(16, 24)
    plan = plan_of(module)
    assert plan.layers == ()
    assert [(row.name, row.in_features, row.out_features, row.weights_before) for row in plan.others] == [
        ("experts.gate_up", 16, 64, 4096),
        ("lin", 16, 24, 384),
    ]
    text = str(plan)
    assert "0 of 0 linears" in text and "4 experts" in text and "OfAnotherLibrary is no nn.Linear" in text
