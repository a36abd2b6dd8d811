"""Which linears are swapped, which are not and why; what a plan refuses."""

import gc
import random

import pytest
import torch
from lightning_phantom.layers.chain import ShardedDropout
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from lightning_phantom.config import PhantomConfig
from lightning_phantom.cost.count import estimate_cost
from lightning_phantom.errors import LayoutError, PhantomError, PlanError
from lightning_phantom.layers.phantom import PhantomLinear
from lightning_phantom.plan.finder import plan_phantom
from lightning_phantom.swap import densify, phantomize_


def decisions(module, **config):
    plan = plan_phantom(module, PhantomConfig(**{"num_blocks": 4, **config}))
    return {layer.name: layer.decision for layer in plan.layers}


def reasons(module, **config):
    plan = plan_phantom(module, PhantomConfig(**{"num_blocks": 4, **config}))
    return {layer.name: layer.reason for layer in plan.layers}


class Block(nn.Module):
    """fc2(between(fc1(x))) with whatever a test puts between."""

    def __init__(self, between=torch.relu, **modules):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        for name, module in modules.items():
            setattr(self, name, module)
        self.between = between

    def forward(self, x):
        return self.fc2(self.between(self.fc1(x)))


CHAIN = {"fc1": "colwise", "fc2": "rowwise"}
DENSE = {"fc1": "skip", "fc2": "skip"}


def test_a_sequential_is_one_chain():
    module = nn.Sequential(
        *(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.5)), *(nn.Linear(32, 32), nn.GELU()), nn.Linear(32, 8)
    )
    assert decisions(module) == {"0": "colwise", "3": "sharded", "5": "rowwise"}


@pytest.mark.parametrize(
    "between",
    [
        torch.relu,
        F.silu,
        lambda h: h.sigmoid() * 2.0,
        lambda h: F.gelu(h, approximate="tanh"),
        lambda h: (h + 1) / 3,
        lambda h: -h,
        lambda h: F.leaky_relu(h, 0.2, inplace=True),
        nn.Hardswish(),
        nn.Sequential(nn.Tanh(), nn.Dropout(0.1)),
        nn.Identity(),
    ],
)
def test_elementwise_operations_are_proven(between):
    assert decisions(Block(between)) == CHAIN


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda h: F.softmax(h, -1), "softmax"),
        (nn.LayerNorm(32), "LayerNorm"),
        (nn.PReLU(), "PReLU"),
        (nn.AlphaDropout(), "AlphaDropout"),
        (lambda h: F.dropout(h, 0.5), "dropout"),
        (lambda h: h * torch.ones(32), "mul"),
        (lambda h: h.flip(-1), "flip"),
        (lambda h: h.view(-1, 32), "view"),
        (lambda h: h - h.mean(-1, keepdim=True), "read"),
        (lambda h: h[..., :32], "getitem"),
        (lambda h: torch.clamp(h, min=h.detach()), "read"),
    ],
)
def test_other_operations_are_not(between, reason):
    module = Block(between)
    assert decisions(module) == DENSE
    assert reason in reasons(module)["fc1"]


def test_a_tensor_from_outside_ends_a_chain():
    class Scaled(Block):
        def forward(self, x):
            return self.fc2(self.fc1(x) * self.scale)

    assert decisions(Scaled(scale=nn.Parameter(torch.ones(32)))) == DENSE

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.fc2(self.fc1(x) + x)

    assert decisions(Residual()) == DENSE


def test_an_intermediate_that_is_seen_elsewhere_is_not_sharded():
    class Returns(Block):
        def forward(self, x):
            h = torch.relu(self.fc1(x))
            return self.fc2(h), h

    assert decisions(Returns()) == DENSE
    assert "the output of the root module" in reasons(Returns())["fc1"]

    class ReadTwice(Block):
        def forward(self, x):
            h = torch.relu(self.fc1(x))
            return self.fc2(h + h.tanh())

    assert decisions(ReadTwice()) == DENSE
    assert "is read 2 times" in reasons(ReadTwice())["fc1"]

    class Kept(Block):
        def forward(self, x):
            self.fc1(x)
            return self.fc2(torch.relu(x.repeat(1, 2)))

    assert "is not used" in reasons(Kept())["fc1"]


def test_a_linear_that_is_called_twice_is_in_no_chain():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.fc2(torch.relu(self.fc1(torch.relu(self.fc1(x)))))

    assert decisions(Twice()) == DENSE
    assert reasons(Twice())["fc1"].endswith("it is called more than once")


def test_a_linear_may_be_called_by_keyword():
    class Keyword(Block):
        def forward(self, x):
            return self.fc2(input=torch.relu(self.fc1(input=x)))

    assert decisions(Keyword()) == CHAIN
    assert phantomize_(Keyword(), PhantomConfig(4))(torch.randn(2, 16)).shape == (2, 16)


def test_a_value_that_three_linears_read_is_not_sharded():
    class Three(Block):
        def forward(self, x):
            h = torch.relu(self.fc1(x))
            return self.fc2(h) * self.a(h) * self.b(h)

    made = Three(a=nn.Linear(32, 16), b=nn.Linear(32, 16))
    assert set(decisions(made).values()) == {"skip"}
    assert "'fc1' (Linear) is read" not in reasons(made)["fc1"] and "is read 3 times" in reasons(made)["fc1"]


class Listens(Block):
    """Keeps what it hears in a list or as an attribute, where a training step may read it."""

    def forward(self, x):
        h = torch.relu(self.fc1(x))
        if self.heard is None:
            self.heard = h
        else:
            self.heard.append(h)
        return self.fc2(h)


class Unpacks(Block):
    """Where a forward unpacks a value, torch.fx leaves a cycle that holds its locals until the next collection."""

    def forward(self, x):
        x, rest = x.chunk(2, -1)
        h = torch.relu(self.fc1(torch.cat([x, rest], -1)))
        return self.fc2(h)


@pytest.mark.parametrize("collecting", [True, False])
def test_what_a_cycle_holds_does_not_outlive_the_forward(collecting):
    (gc.enable if collecting else gc.disable)()
    try:
        assert decisions(Unpacks()) == {"fc1": "colwise", "fc2": "rowwise"}
        assert gc.isenabled() is collecting
    finally:
        gc.enable()


def test_an_intermediate_that_outlives_the_forward_is_not_sharded():
    for heard in (None, []):
        module = Listens(heard=heard)
        assert decisions(module) == DENSE
        assert reasons(module)["fc1"].endswith("relu() is kept beyond the forward")
        assert module.heard is heard and not heard


def test_a_gated_pair_is_proven_and_shares_its_input():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x):
            return self.down(F.silu(self.gate(x)) * self.up(x))

    plan = plan_phantom(Gated(), PhantomConfig(4))
    assert decisions(Gated()) == {"gate": "colwise", "up": "colwise", "down": "rowwise"}
    assert plan.chains[0].siblings == (("gate", "up"),)
    assert [layer.shares_input for layer in plan.cost_layers()] == [False, True, False]


def test_what_depends_on_the_mode_or_on_an_optional_argument_is_not_proven():
    class Mode(Block):
        def forward(self, x):
            h = self.fc1(x)
            return self.fc2(h if self.training else h.cumsum(-1))

    class Optional(Block):
        def forward(self, x, mix=None):
            h = self.fc1(x)
            return self.fc2(h if mix is None else h.cumsum(-1))

    class OtherWay(Block):
        def forward(self, x, mix=None):
            h = self.fc1(x)
            return self.fc2(h.cumsum(-1) if mix is None else h)

    class OneOfTwo(Block):
        def forward(self, x, mix=None, shift=None):
            h = self.fc1(x)
            return self.fc2(h.cumsum(-1) if mix is None and shift is not None else h)

    class EvaluatedWithGradients(Block):
        def forward(self, x):
            h = self.fc1(x)
            return self.fc2(h.cumsum(-1) if torch.is_grad_enabled() and not self.training else h)

    for cls in (Mode, Optional, OtherWay, OneOfTwo, EvaluatedWithGradients):
        assert decisions(cls()) == DENSE, cls
    assert "computes otherwise" in reasons(Mode())["fc1"]


class CumsumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad.cumsum(-1)


def test_a_backward_of_its_own_or_a_switched_grad_mode_is_not_proven():
    assert decisions(Block(CumsumBackward.apply)) == DENSE

    class Frozen(Block):
        def forward(self, x):
            with torch.no_grad():
                h = self.fc1(x)
            return self.fc2(h)

    assert decisions(Frozen()) == DENSE
    assert "where gradients are switched on or off" in reasons(Frozen())["fc1"]


def test_an_activation_with_another_forward_is_not_elementwise():
    activation = nn.ReLU()
    activation.forward = lambda h: h.softmax(-1)
    assert decisions(Block(activation)) == DENSE


def test_siblings_do_not_share_across_what_may_write_into_their_input():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x):
            gate = self.gate(x)
            x.add_(1)
            return self.down(gate * self.up(x))

    module = phantomize_(Writes(), PhantomConfig(4))
    assert plan_phantom(Writes(), PhantomConfig(4)).chains[0].siblings == ()
    with torch.inference_mode():  # where tensors do not count the writes into them
        assert torch.allclose(module(torch.ones(2, 16)), densify(module)(torch.ones(2, 16)), atol=1e-6)


def test_an_untraceable_forward_says_so():
    class Branches(Block):
        def forward(self, x):
            return self.fc2(self.fc1(x) if x.sum() > 0 else self.fc1(-x))

    assert decisions(Branches()) == DENSE
    assert "the forward of the root module cannot be traced (TraceError" in reasons(Branches())["fc1"]


def test_tracing_leaves_no_trace():
    class Remembers(Block):
        def forward(self, x):
            self.seen = x
            self.calls = self.calls + 1
            self.log.append(x)
            return self.fc2(torch.relu(self.fc1(x)) + torch.rand(()).item() + random.random())

    module = Remembers(calls=0, log=[]).eval()
    state, python_state = torch.get_rng_state(), random.getstate()
    assert decisions(module) == CHAIN
    assert module.log == [] and random.getstate() == python_state
    assert module.calls == 0 and not hasattr(module, "seen") and not module.training
    assert torch.equal(torch.get_rng_state(), state)


def test_the_longest_chain_wins_and_an_inner_owner_keeps_its_own():
    nested = nn.Sequential(nn.Sequential(nn.Linear(16, 32), nn.ReLU()), nn.Sequential(nn.Linear(32, 16), nn.Tanh()))
    assert [c.owner for c in plan_phantom(nested, PhantomConfig(4)).chains] == [""]

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block(self.block(x))

    assert [c.owner for c in plan_phantom(Twice(), PhantomConfig(4)).chains] == ["block"]
    deep = nn.Sequential(Block(), nn.ReLU(), Block())
    (chain,) = plan_phantom(deep, PhantomConfig(4)).chains
    assert chain.owner == "" and len(chain.members) == 4


def test_a_step_modules_own_forward_is_asked_last():
    class Auto(nn.Module):  # like the autoencoder of Lightning's quickstart, whose step calls the halves
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = Block(), Block()

        def forward(self, x):
            return self.decoder(self.encoder(x))

        def training_step(self, batch):
            return self.decoder(self.encoder(batch)).sum()

    assert {c.owner for c in plan_phantom(Auto(), PhantomConfig(4)).chains} == {"encoder", "decoder"}
    module = phantomize_(Auto(), PhantomConfig(4))
    module.training_step(torch.randn(2, 16)).backward()


def tied():
    module = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    module[4].weight = module[0].weight
    return module


def shared_module():
    linear = nn.Linear(16, 16)
    return nn.Sequential(linear, nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), linear)


def transposed():
    module = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    module[2].weight = nn.Parameter(module[0].weight.t())
    return module


def adapted():
    module = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    module[0].adapter = nn.Linear(16, 32)
    return module


class ReadsWeight(Block):
    def forward(self, x):
        return F.linear(self.fc2(torch.relu(self.fc1(x))), self.fc1.weight)


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def hooked():
    module = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    module[0].register_forward_hook(lambda *_: None)
    return module


def parametrised():
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(16, 32)), nn.ReLU(), nn.Linear(32, 16))


def pruned():
    return nn.Sequential(prune.l1_unstructured(nn.Linear(16, 32), "weight", 0.5), nn.ReLU(), nn.Linear(32, 16))


UNFIT = [
    (tied, "0", "tied"),
    (shared_module, "0", "tied"),
    (transposed, "0", "tied"),
    (adapted, "0", "holds modules or buffers of its own"),
    (lambda: nn.Sequential(nn.Linear(16, 16, dtype=torch.complex64), nn.Linear(16, 16)), "0", "torch.complex64"),
    (
        lambda: nn.Sequential(nn.utils.skip_init(nn.Linear, 0, 16), nn.Linear(16, 16)),
        "0",
        "0 -> 16 features do not divide",
    ),
    (ReadsWeight, "fc1", "read by the forward of 'the root module' itself"),
    (Attends, "attention.out_proj", "read by MultiheadAttention"),
    (lambda: nn.TransformerEncoderLayer(16, 2, 32), "self_attn.out_proj", "read by MultiheadAttention"),
    (
        lambda: nn.Sequential(nn.Linear(18, 32), nn.Linear(32, 16)),
        "0",
        "18 -> 32 features do not divide into num_blocks=4",
    ),
    (hooked, "0", "hooks"),
    (parametrised, "0", "parametrised"),
    (pruned, "0", "pruned"),
    (lambda: nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, 16)), "0", "LazyLinear is not nn.Linear itself"),
]


@pytest.mark.parametrize(("build", "name", "reason"), UNFIT)
def test_what_cannot_be_swapped_stays_dense_with_a_reason_and_is_refused_when_named(build, name, reason):
    module = build()
    assert reason in reasons(module)[name]
    assert decisions(module)[name] == "skip"
    before = {key: (type(m), id(m)) for key, m in module.named_modules()}
    with pytest.raises(PlanError, match=name) as error:
        phantomize_(module, PhantomConfig(4, plan={name: "phantom"}))
    assert reason in str(error.value)
    assert before == {key: (type(m), id(m)) for key, m in module.named_modules()}


def test_a_bare_linear_is_refused():
    module = nn.Linear(16, 16)
    with pytest.raises(PlanError, match="it is the module itself"):
        phantomize_(module, PhantomConfig(4, plan={"*": "phantom"}))
    assert not module._modules


def test_what_would_not_shrink_stays_dense_or_warns_when_named():
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert set(decisions(module).values()) == {"skip"}
    assert "phantom would not make it smaller at k=1" in reasons(module)["0"]
    assert "warning: phantom would not make it smaller" in reasons(module, plan={"0": "phantom"})["0"]


def test_a_lone_linear_is_swapped_only_when_named():
    class Lone(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(16, 16)

        def forward(self, x):
            return self.head(x).softmax(-1)

    assert decisions(Lone()) == {"head": "skip"}
    assert decisions(Lone(), plan={"head": "phantom"}) == {"head": "phantom"}


def test_plan_words():
    module = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    assert decisions(module, plan={"*": "phantom"}) == {"0": "colwise", "2": "sharded", "4": "rowwise"}
    assert decisions(module, plan={"*": "phantom", "4": "skip"}) == {"0": "colwise", "2": "rowwise", "4": "skip"}
    assert decisions(module, plan={"0": "colwise", "2": "rowwise"}) == {"0": "colwise", "2": "rowwise", "4": "skip"}
    with pytest.raises(PlanError, match=r"'2': 'sharded' is not proven; what is proven is 'rowwise'"):
        plan_phantom(module, PhantomConfig(4, plan={"0": "colwise", "2": "sharded"}))
    with pytest.raises(PlanError, match="softmax"):
        plan_phantom(Block(lambda h: h.softmax(-1)), PhantomConfig(4, plan={"fc1": "colwise", "fc2": "rowwise"}))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"nothing.*": "phantom"}, r"'nothing\.\*': 'phantom' matches no module. The linear layers here are: '0', '2'"),
        ({"1": "phantom"}, r"matches '1' \(ReLU\), which is no linear layer"),
    ],
)
def test_globs_that_match_nothing(plan, message):
    with pytest.raises(PlanError, match=message):
        plan_phantom(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), PhantomConfig(4, plan=plan))


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
        ({"plan": {"*": "columnwise"}}, "'columnwise' is not a word of the plan; choose one of 'phantom'"),
        ({"plan": {}}, "names no layer"),
        ({"plan": "phantom"}, "needs a mapping"),
        ({"init": "zeros"}, "choose one of 'auto'"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_config(arguments, message):
    with pytest.raises(PhantomError, match=message):
        PhantomConfig(**{"num_blocks": 4, **arguments})


def test_width_is_resolved_and_clamped():
    module = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 64))
    for width, resolved in ((0.25, 1), (1.0, 4), (1, 1), (3, 3), (1000, 12)):
        plan = plan_phantom(module, PhantomConfig(4, phantom_width=width, plan={"0": "phantom"}))
        assert plan.layers[0].phantom_width == resolved, width


def test_the_table_lists_every_linear():
    text = str(plan_phantom(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)), PhantomConfig(4)))
    assert "2 of 2 linears, num_blocks=4" in text
    for word in ("colwise", "rowwise", "chain in the root module", "weights before", "1,072", "of dense"):
        assert word in text


def test_nothing_qualifies():
    module = nn.Sequential(nn.Linear(16, 32), nn.Softmax(-1))
    with pytest.raises(PlanError, match="nothing in Sequential qualifies") as error:
        phantomize_(module, PhantomConfig(4))
    assert "Softmax" in str(error.value)
    assert type(module[0]) is nn.Linear
    assert plan_phantom(module, PhantomConfig(4)).swapped == ()


def test_bad_weights_are_refused_before_anything_changes():
    module = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    module[2].weight.data[0, 0] = float("nan")
    with pytest.raises(PlanError, match="'2' holds NaN"):
        phantomize_(module, PhantomConfig(4))
    assert type(module[0]) is nn.Linear
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    with pytest.raises(PlanError, match="meta device"):
        phantomize_(module, PhantomConfig(4, init="from_dense"))


def build_encoder(**kwargs):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **kwargs)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.SiLU()])
def test_torchs_transformer_layers_are_known(activation):
    module, x = build_encoder(activation=activation), torch.randn(3, 5, 16)
    mask = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]], dtype=torch.bool)
    expected = module(x, src_key_padding_mask=mask).detach()
    before = [(m.use_nested_tensor, m.layers[0].activation_relu_or_gelu) for m in [module]]
    plan = {"layers.*.linear?": "phantom"}
    assert set(decisions(module, plan=plan).values()) == {"colwise", "rowwise", "skip"}
    phantomize_(module, PhantomConfig(4, phantom_width=10**6, plan=plan))
    assert [c.owner for c in plan_phantom(build_encoder(), PhantomConfig(4)).chains] == ["layers.0", "layers.1"]
    module.eval()
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():  # without gradients torch would take the fused path, which reads linear1.weight
            out = module(x, src_key_padding_mask=mask)
            assert torch.allclose(out[~mask], expected[~mask], atol=1e-5), mode
    dense = densify(module)
    assert [(m.use_nested_tensor, m.layers[0].activation_relu_or_gelu) for m in [dense]] == before
    with torch.no_grad():
        assert torch.allclose(dense(x, src_key_padding_mask=mask)[~mask], expected[~mask], atol=1e-5)


def test_a_decoder_layer_is_known_and_an_odd_one_is_not():
    decoder = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    assert [c.owner for c in plan_phantom(decoder, PhantomConfig(4)).chains] == [""]
    x = torch.randn(2, 5, 16)
    expected = decoder(x, x).detach()
    phantomize_(decoder, PhantomConfig(4, phantom_width=10**6, plan={"linear?": "phantom"}))
    assert torch.allclose(decoder(x, x), expected, atol=1e-5)
    with pytest.raises(LayoutError):
        decoder.linear1(x)
    odd = nn.TransformerEncoderLayer(16, 2, 32, activation=lambda h: h.softmax(-1))
    assert "not known to be elementwise" in reasons(odd)["linear1"]


# What a swapped module computes and refuses, on one rank


def test_a_swapped_module_computes_the_dense_function_at_the_largest_width():
    for module, x in (
        (Block(), torch.randn(5, 16)),
        (nn.Sequential(Block(), nn.ReLU(), Block(torch.tanh)), torch.randn(2, 3, 16)),
    ):
        expected = module(x).detach()
        swapped = phantomize_(module, PhantomConfig(4, phantom_width=10**6, plan={"*": "phantom"}))
        assert sum(isinstance(m, PhantomLinear) for m in swapped.modules()) >= 2
        assert torch.allclose(swapped(x), expected, atol=1e-5)
        dense = densify(swapped)
        assert not any(isinstance(m, PhantomLinear) for m in dense.modules())
        assert torch.allclose(dense(x), swapped(x), atol=1e-5)
        assert dense.state_dict().keys() == densify(dense).state_dict().keys()


def test_a_member_called_outside_its_owner_raises_at_one_rank_too():
    module = phantomize_(Block(), PhantomConfig(4))
    x = torch.randn(2, 16)
    with pytest.raises(LayoutError, match="'fc1' was called outside the forward of 'the root module'"):
        module.fc1(x)
    module(x)
    with pytest.raises(LayoutError):
        module.fc2(torch.randn(2, 32))
    with pytest.raises(LayoutError):
        Block.forward(module, x)


def test_the_owner_is_left_after_an_exception():
    class Fails(Block):
        def forward(self, x):
            h = self.fc2(torch.relu(self.fc1(x)))
            return self.end(h)

    class End(nn.Module):
        def forward(self, x):
            if not isinstance(x, torch.fx.Proxy):
                raise RuntimeError("on purpose")
            return x

    module = phantomize_(Fails(end=End()), PhantomConfig(4))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="on purpose"):
            module(torch.randn(2, 16))
        with pytest.raises(LayoutError):
            module.fc1(torch.randn(2, 16))


def test_a_sibling_only_takes_what_was_computed_from_its_own_input():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
            self.change = lambda x: x

        def forward(self, x):
            gate = self.gate(x)
            if not isinstance(x, torch.fx.Proxy):
                x = self.change(x)
            return self.down(gate * self.up(x))

    torch.manual_seed(0)
    module = phantomize_(Gated(), PhantomConfig(4, plan={"*": "phantom"}))
    dense = densify(module)
    for change in (lambda x: x, lambda x: x + 1, lambda x: x.add_(1)):
        module.change = dense.change = change
        x = torch.randn(3, 16)
        assert torch.allclose(module(x.clone()), dense(x.clone()), atol=1e-5)

    def no_grad_sibling(gated, x):
        gate = gated.gate(x)
        with torch.no_grad():
            up = gated.up(x)
        return gated.down(gate * up).sum()

    Gated.forward = no_grad_sibling
    module(torch.randn(3, 16)).backward()
    assert not module.up.weight.grad.any() and module.gate.weight.grad.any()


def test_dropout_used_twice_is_sharded_only_inside_the_chain():
    class Mlp(Block):
        def forward(self, x):
            return self.drop(self.fc2(self.drop(torch.relu(self.fc1(x)))))

    plan = plan_phantom(Mlp(drop=nn.Dropout(0.5)), PhantomConfig(4))
    assert plan.chains[0].dropouts == (("drop", (0, None)),)
    module = phantomize_(Mlp(drop=nn.Dropout(0.5)), PhantomConfig(4))
    x = torch.randn(64, 16)
    torch.manual_seed(3)
    once = module(x)
    torch.manual_seed(3)
    assert torch.equal(once, module(x))
    assert 0.4 < (once == 0).float().mean() < 0.6
    module.eval()
    assert torch.equal(module(x), module(x))
    assert torch.allclose(densify(module)(x), module(x), atol=1e-6)


def test_one_dropout_in_several_places_is_sharded_in_each():
    drop = nn.Dropout(0.5)
    first, second = (nn.Sequential(nn.Linear(16, 32), drop, nn.Linear(32, 32), drop, nn.Linear(32, 16)) for _ in "ab")
    module = phantomize_(nn.Sequential(first, nn.Softmax(-1), second), PhantomConfig(4))
    places = [first[1], first[3], second[1], second[3]]
    assert all(type(place) is ShardedDropout and place is places[0] for place in places)
    assert [flags for _, flags in places[0].calls] == [(True, True), (True, True)]
    assert {id(chain) for chain, _ in places[0].calls} == {id(first[0].chain), id(second[0].chain)}
    dense = densify(module)
    assert type(dense[0][1]) is nn.Dropout and dense[0][1] is dense[0][3] is dense[2][1] is dense[2][3]

    class TwoChains(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)
            self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))

        def forward(self, x):
            return self.d(self.drop(self.c(self.b(self.drop(self.a(x))).softmax(-1))))

    module = phantomize_(TwoChains(), PhantomConfig(4))
    assert [flags for _, flags in module.drop.calls] == [(True, False), (False, True)]


def test_block_masks_differ_and_scale():
    module = phantomize_(nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.3), nn.Linear(32, 16)), PhantomConfig(4))
    dropout = module[1]
    ((chain, _),) = dropout.calls
    chain._running.append(True)

    def masks_of(x):
        chain._calls.clear()
        return dropout(x).chunk(4, dim=-1)

    masks = masks_of(torch.ones(200, 32))
    for i in range(4):
        assert set(masks[i].unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
        assert abs((masks[i] == 0).float().mean().item() - 0.3) < 0.05
        assert all(not torch.equal(masks[i], masks[j]) for j in range(i))


def test_frozen_and_mode_and_dtype_survive():
    module = Block().to(torch.float64).eval()
    module.fc1.weight.requires_grad_(False)
    module.fc2.bias.requires_grad_(False)
    phantomize_(module, PhantomConfig(4))
    assert not module.fc1.decompressor_weight.requires_grad and module.fc1.bias.requires_grad
    assert module.fc2.weight.requires_grad and not module.fc2.bias.requires_grad
    assert module.fc1.weight.dtype is torch.float64 and not module.fc1.training
    dense = densify(module)
    assert not dense.fc1.weight.requires_grad and dense.fc2.weight.dtype is torch.float64


def test_a_deep_copy_works_on_its_own():
    import copy

    module = phantomize_(Block(drop=nn.Dropout()), PhantomConfig(4))
    twin = copy.deepcopy(module)
    x = torch.randn(2, 16)
    assert torch.equal(module(x), twin(x))
    assert twin.fc1.chain is twin.fc2.chain is not module.fc1.chain
    with torch.no_grad():
        twin.fc1.weight.zero_()
    assert not torch.equal(module(x), twin(x))


def test_cost_of_a_plan():
    plan = plan_phantom(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)), PhantomConfig(4))
    cost = estimate_cost(plan.cost_layers(), 4, 0.25, 2, tokens=10)
    assert cost.phantom.weights == sum(layer.weights_after for layer in plan.layers) // 2
    pairs = estimate_cost([(16, 32), (32, 16)], 4, 0.25, 2, tokens=10)
    assert pairs == cost
    # The transformer block of the documentation: about 0.75 of Megatron's bytes at the default width.
    block = estimate_cost([(64, 256), (256, 64)], 4, 0.25, 4, tokens=10)
    assert block.phantom.sent_bytes / block.tensor_parallel.sent_bytes == 0.75
    # Deep and square: the layers' own traffic falls to p*k/n of tensor parallelism's.
    deep = estimate_cost([(64, 64)] * 40, 4, 4, 4, tokens=10)
    assert deep.phantom.layer_bytes / deep.tensor_parallel_layerwise.layer_bytes == pytest.approx(4 * 4 / 64, rel=0.02)
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


class Branches(nn.Module):
    """Cannot be traced, and may do anything with what it is told about."""

    def __init__(self, does=lambda x: x):
        super().__init__()
        self.does = does

    def forward(self, x, **more):
        return self.does(x) if x.sum() > 0 else self.does(x) * 2


class Beside(Block):
    """A feed-forward block that has something untraceable run before it, as attention does in a transformer."""

    def forward(self, x, **more):
        return self.fc2(torch.relu(self.fc1(self.attention(x, **more))))


def test_a_chain_is_proven_beside_what_cannot_be_traced():
    module = phantomize_(Beside(attention=Branches()), PhantomConfig(4))
    (chain,) = plan_phantom(Beside(attention=Branches()), PhantomConfig(4)).chains
    assert chain.members == ("fc1", "fc2") and chain.opaque == ("attention",)
    x = torch.randn(3, 16)
    for more in ({}, {"mask": x}):  # whatever is handed on stays outside the chain
        assert torch.allclose(module(x, **more), densify(module)(x, **more), atol=1e-6)


def test_what_cannot_be_traced_may_not_run_inside_a_chain():
    class Between(Block):
        def forward(self, x):
            h = torch.relu(self.fc1(x))
            self.attention(x)
            return self.fc2(h)

    class Through(Block):
        def forward(self, x):
            return self.fc2(self.attention(self.fc1(x)))

    why = reasons(Between(attention=Branches()))["fc1"]
    assert "'attention' (Branches), which cannot be traced, runs before it is used" in why
    assert (
        "'fc1' (Linear) is read by 'attention' (Branches), outside any chain"
        in reasons(Through(attention=Branches()))["fc1"]
    )


def test_what_cannot_be_traced_may_not_call_a_member():
    module = Beside(attention=Branches())
    hidden = [module]  # no submodule, so nothing shows it
    module.attention.does = lambda x: hidden[0].fc1(x)[..., :16]
    phantomize_(module, PhantomConfig(4))
    with pytest.raises(LayoutError, match="'fc1' was called outside the forward of 'the root module'"):
        module(torch.ones(3, 16))


def test_a_dropout_that_an_untraced_module_uses_too_is_counted_in_the_chain_alone():
    drop = nn.Dropout(0.5)

    class Uses(Block):
        def forward(self, x):
            return self.fc2(self.drop(self.fc1(self.attention(x))))

    module = phantomize_(Uses(attention=Branches(), drop=drop), PhantomConfig(4))
    module.attention.does = module.drop
    ((chain, flags),) = module.drop.calls
    counted = []
    module.fc2.register_forward_pre_hook(lambda *_: counted.append(list(chain._calls.values())))
    module(torch.ones(3, 16))
    assert flags == (True,) and counted == [[1]]


def cumsum(h, mix=False, **more):
    return h.cumsum(-1) if mix else h


def test_extra_arguments_are_only_proven_where_they_are_handed_to_an_untraced_module():
    class Looks(Block):
        def forward(self, x, **more):
            h = self.fc1(self.attention(x, **more))
            return self.fc2(h.cumsum(-1) if more.get("mix") else h)

    class HandsToFunction(Block):
        def forward(self, x, **more):
            return self.fc2(cumsum(self.fc1(x), **more))

    class HandsToMethod(Block):
        def cumsum(self, h, **more):
            return cumsum(h, **more)

        def forward(self, x, **more):
            return self.fc2(self.cumsum(self.fc1(x), **more))

    class Renames(Block):
        def forward(self, x, **more):
            other = more
            return self.fc2(cumsum(self.fc1(x), **other))

    class Unpacks(Block):
        def forward(self, *args, **more):
            return self.fc2(self.fc1(self.attention(*args, **more)))

    class Inside(Block):
        def forward(self, x, **more):
            return self.fc2(self.attention(self.fc1(x), **more))

    for cls in (Looks, HandsToFunction, HandsToMethod, Renames, Unpacks, Inside):
        assert decisions(cls(attention=Branches())) == DENSE, cls
