"""What a plan says and refuses: the user's globs, widths, the table, and that making one changes nothing."""

import gc
import random
from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_phantom.config import PhantomConfig, TensorParallelConfig
from lightning_phantom.errors import PhantomError, PlanError
from lightning_phantom.plan.finder import plan_phantom, plan_tensor_parallel
from lightning_phantom.plan.structure import Group
from lightning_phantom.swap import phantomize_


def plan_of(module, num_blocks=4, **config):
    return plan_phantom(module, PhantomConfig(num_blocks, **config))


def decisions(module, **config):
    return {layer.name: layer.decision for layer in plan_of(module, **config).layers}


def reasons(module, **config):
    return {layer.name: layer.reason for layer in plan_of(module, **config).layers}


def mlp(*widths):
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Branches(nn.Module):
    """Two blocks that no trace connects, each a network of its own."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([mlp(16, 32, 16), mlp(16, 32, 16)])
        self.head = nn.Linear(16, 16)

    def forward(self, x):
        return self.head(self.blocks[0](x) if float(x.sum()) > 0 else self.blocks[1](x))


# A plan of the user's own


def test_a_users_plan_names_what_is_swapped_and_nothing_else_is():
    module = mlp(16, 32, 32, 16)
    assert decisions(module, plan={"*": "phantom"}) == {"0": "phantom", "2": "phantom", "4": "phantom"}
    assert decisions(module, plan={"*": "phantom", "4": "skip"}) == {"0": "phantom", "2": "phantom", "4": "skip"}
    assert decisions(module, plan={"4": "skip", "*": "phantom"})["4"] == "phantom"  # later entries win
    assert reasons(module, plan={"0": "phantom", "4": "skip"}) == {
        "0": "named in the plan",
        "2": "not named in the plan",
        "4": "skipped by the plan",
    }


def test_what_is_named_forms_the_networks_that_it_does_without_a_plan():
    module = mlp(16, 32, 16)
    assert plan_of(module, plan={"*": "phantom"}).ffns == plan_of(module).ffns
    (ffn,) = plan_of(module, plan={"0": "phantom"}).ffns
    (group,) = ffn.groups
    assert group == Group(("0",), 0, True, True, True)


def test_a_lone_linear_is_swapped_only_when_named():
    module = nn.Sequential(nn.Linear(16, 16), nn.Softmax(-1))
    (layer,) = plan_of(module).layers
    assert (layer.decision, layer.phantom_width, layer.weights_after) == ("skip", None, 16 * 16 + 16)
    assert decisions(module, plan={"0": "phantom"}) == {"0": "phantom"}


def test_attention_is_swapped_when_named():
    module = nn.Module()
    module.attention = mlp(16, 32, 16)
    assert decisions(module) == {"attention.0": "skip", "attention.2": "skip"}
    assert decisions(module, plan={"attention.?": "phantom"}) == {"attention.0": "phantom", "attention.2": "phantom"}
    module = nn.Sequential(nn.ModuleDict({"attention": mlp(16, 24, 8)})["attention"])
    module.attention = module.pop(0)
    (ffn,) = plan_of(module, plan={"*.0": "phantom", "*.2": "phantom"}).ffns
    assert len(ffn.groups) == 2  # as a trace finds them


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"nothing.*": "phantom"}, r"'nothing\.\*': 'phantom' matches no module. The linear layers here are: '0', '2'"),
        ({"nothing.*": "skip"}, r"'nothing\.\*': 'skip' matches no module"),
        ({"1": "phantom"}, r"matches '1' \(ReLU\), which is no linear layer"),
    ],
)
def test_globs_that_match_nothing(plan, message):
    with pytest.raises(PlanError, match=message):
        plan_of(mlp(8, 8, 8), plan=plan)


def test_a_module_without_linears_says_so():
    with pytest.raises(PlanError, match="The linear layers here are: none"):
        plan_of(nn.Sequential(nn.ReLU()), plan={"0": "phantom"})


def test_all_that_a_plan_names_wrongly_is_said_at_once():
    with pytest.raises(PlanError, match=r"(?s)0: 18 -> 32 features .*\n  4: 32 -> 9 features") as error:
        plan_of(mlp(18, 32, 32, 9), plan={"*": "phantom"})
    assert "  2:" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_blocks": 1}, "num_blocks=1: needs an int of at least 2"),
        ({"num_blocks": 2.0}, "num_blocks=2.0"),
        ({"num_blocks": True}, "num_blocks=True"),
        ({"phantom_width": 0}, "k must be at least 1"),
        ({"phantom_width": -1}, "k must be at least 1"),
        ({"phantom_width": 1.5}, r"lie in \(0, 1\]"),
        ({"phantom_width": float("nan")}, r"lie in \(0, 1\]"),
        ({"phantom_width": "wide"}, "needs an int"),
        ({"phantom_width": True}, "needs an int"),
        ({"plan": {"*": "columnwise"}}, "'columnwise' is not a word of the plan; choose one of 'phantom', 'skip'"),
        ({"plan": {"*": "colwise"}}, "'colwise' is not a word of the plan; choose one of 'phantom', 'skip'"),
        ({"plan": {}}, "names no layer"),
        ({"plan": "phantom"}, "needs a mapping"),
        ({"init": "zeros"}, "choose one of 'auto'"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_config(arguments, message):
    with pytest.raises(PhantomError, match=message):
        PhantomConfig(**{"num_blocks": 4, **arguments})


# Sizes


def test_width_is_resolved_and_clamped():
    for width, resolved in ((0.25, 1), (1.0, 4), (1, 1), (3, 3), (1000, 12)):
        plan = plan_of(mlp(64, 16, 64), phantom_width=width, plan={"0": "phantom"})
        assert plan.layers[0].phantom_width == resolved, width


def test_what_would_not_shrink_stays_dense_or_warns_when_named():
    why = "phantom would not make it smaller at k=1"
    assert decisions(mlp(4, 4, 4)) == {"0": "skip", "2": "skip"}
    assert reasons(mlp(4, 4, 4)) == {"0": why, "2": why}
    layer, _ = plan_of(mlp(4, 4, 4), plan={"0": "phantom"}).layers
    assert (layer.decision, layer.warning) == ("phantom", why)


def test_weights_are_counted():
    layer, _ = plan_of(mlp(16, 32, 16), phantom_width=2).layers
    assert (layer.in_features, layer.out_features, layer.bias, layer.phantom_width) == (16, 32, True, 2)
    assert layer.warning == ""
    assert (layer.weights_before, layer.weights_after) == (16 * 32 + 32, 16 * 32 // 4 + 2 * 16 + 3 * 2 * 32 + 32)
    phantomize_(module := mlp(16, 32, 16), PhantomConfig(4, phantom_width=2))
    assert sum(p.numel() for p in module[0].parameters()) == layer.weights_after


@pytest.mark.parametrize("latents", ["own", "both", "previous"])
def test_a_layer_reads_the_latents_of_the_one_before_it_in_a_chain_but_not_in_a_pair(latents):
    chain, pair = (plan_of(mlp(*widths), latents=latents) for widths in ((16, 32, 32, 16), (16, 32, 16)))
    others = ["0", "2"] if latents != "own" else ["", ""]
    assert [layer.predecessor for layer in chain.layers] == ["", *others]
    assert [layer.latents for layer in chain.layers] == ["own", latents, latents]
    assert [(layer.predecessor, layer.latents) for layer in pair.layers] == [("", "own")] * 2
    module = phantomize_(mlp(16, 32, 32, 16), PhantomConfig(4, latents=latents))
    held = [sum(p.numel() for p in module[n].parameters()) for n in (0, 2, 4)]
    assert [layer.weights_after for layer in chain.layers] == held


def test_a_swapped_module_is_planned_as_what_it_is():
    module = phantomize_(mlp(16, 32, 16), PhantomConfig(4))
    plan = plan_of(module)
    assert {layer.reason for layer in plan.layers} == {"is a phantom layer already"} and not plan.swapped
    assert plan.layers[0].weights_after == sum(p.numel() for p in module[0].parameters())
    assert not plan_of(module, plan={"*": "phantom"}).swapped


def test_tensor_parallelism_takes_what_phantom_would_not_shrink():
    plan = plan_tensor_parallel(mlp(4, 4, 4), TensorParallelConfig(2))
    assert [layer.decision for layer in plan.layers] == ["colwise", "rowwise"]
    assert [layer.phantom_width for layer in plan.layers] == [None, None]


# The table


def test_the_table_lists_every_linear_and_folds_what_repeats():
    text = str(plan_of(Branches()))
    assert "4 of 5 linears, num_blocks=4" in text
    for word in ("blocks.{0-1}.0", "blocks.{0-1}.2", "head", "phantom", "stands alone", "weights before", "of dense"):
        assert word in text
    assert "1,088" in text and "blocks.0" not in text  # two linears of 16 * 32 + 32 weights and biases, together


def test_only_what_is_alike_is_folded():
    module = nn.ModuleDict({"layers": nn.ModuleList(mlp(16, n, 16) for n in (32, 32, 64, 32))})
    module["layers"][1][0].register_forward_hook(lambda *_: None)
    text = str(plan_of(module))
    assert "layers.{0,3}.0" in text and "layers.2.0" in text and "it has hooks" in text
    tied = nn.ModuleDict({"a": nn.ModuleList(mlp(16, 32, 16) for _ in "ab")})
    for block in tied["a"]:
        block[2].weight = nn.Parameter(block[0].weight.t())
    assert "tied to those of 'a.*.0'" in str(plan_of(tied))
    ragged = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), nn.Sequential(nn.Linear(16, 16))])
    rows = [line.split()[1] for line in str(plan_of(ragged, plan={"*": "phantom"})).splitlines() if "272" in line]
    assert rows == ["0.0", "0.1", "1.0"]


def test_nothing_qualifies():
    module = nn.Sequential(nn.Linear(16, 32), nn.Softmax(-1))
    with pytest.raises(PlanError, match="nothing in Sequential qualifies") as error:
        phantomize_(module, PhantomConfig(4))
    assert "stands alone" in str(error.value)
    assert type(module[0]) is nn.Linear and not plan_of(module).swapped


# Planning changes nothing


def everything_of(module):
    return {name: {**vars(m), "_parameters": dict(m._parameters)} for name, m in module.named_modules()}


def tensors_alive():
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def test_planning_changes_nothing():
    module = Branches().eval()
    module(torch.ones(2, 16)).sum().backward()
    before, weights = everything_of(module), {k: v.clone() for k, v in module.state_dict().items()}
    state, python_state = torch.get_rng_state(), random.getstate()
    gc.collect()
    plan_of(module)
    tensors = tensors_alive()
    plan_of(module)
    assert tensors_alive() == tensors
    assert everything_of(module) == before
    assert all(torch.equal(value, weights[key]) for key, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python_state
