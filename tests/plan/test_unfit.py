"""Which linears cannot be swapped: each stays dense with its reason, and is refused with it where a plan names it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from transformers.models.falcon.modeling_falcon import FalconLinear

from lightning_phantom.config import PhantomConfig
from lightning_phantom.errors import PlanError
from lightning_phantom.layers.phantom import PhantomLinear
from lightning_phantom.plan.finder import plan_phantom
from lightning_phantom.swap import densify, phantomize_


class Block(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


def reasons(module, **config):
    return {layer.name: layer.reason for layer in plan_phantom(module, PhantomConfig(4, **config)).layers}


def first(linear):
    return nn.Sequential(linear, nn.ReLU(), nn.Linear(32, 16))


def changed(change):
    """A network whose first linear has been changed."""
    linear = nn.Linear(16, 32)
    change(linear)
    return first(linear)


def tied(*path):
    module = Block()
    module.fc2.weight = nn.Parameter(module.fc1.weight.t()) if path else module.fc1.weight
    return module


class ReadsWeight(Block):
    def forward(self, x):
        return F.linear(self.fc2(torch.relu(self.fc1(x))), self.fc1.weight)


class ReadsNorm(Block):
    def forward(self, x):
        return super().forward(x) * float(self.fc1.weight.norm())


class ReadsWithinAQuestion(Block):
    def forward(self, x):
        return super().forward(x).to((x @ self.fc2.weight).dtype)


class Rescales(nn.Module):
    """Changes weights of the modules of a list, in a method that its forward calls."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        if not self.training:
            self.rescale()
        return self.blocks[1](self.blocks[0](x))

    def rescale(self, times=1):
        with torch.no_grad():
            for number, block in enumerate(self.blocks):
                block.fc2.weight.div_(2**number)
        if times > 1:
            self.rescale(times - 1)


class ReadsBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(x) if self.training else self.block(x) - self.block.fc2.bias


class ReadsShape(Block):
    def forward(self, x):
        return super().forward(x.expand(self.fc1.weight.shape[1]))


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixer = nn.MultiheadAttention(16, 2)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Scaled(nn.Linear):
    scale = 1.0

    def forward(self, x):
        return self.scale * super().forward(x)


class Routed(nn.Linear):
    def forward(self, x):
        return super().forward(x[:, self.columns])


def scaled():
    linear = Scaled(16, 32)
    linear.scale = 2.0
    return first(linear)


def unregister_weight(linear):
    weight = linear.weight.detach()
    del linear.weight
    linear.weight = weight


class Quantised(nn.Parameter):
    pass


UNFIT = {
    "tied": (tied, "fc1", "its weights are tied to those of 'fc2'"),
    "tied views": (lambda: tied("transposed"), "fc2", "its weights are tied to those of 'fc1'"),
    "adapter": (
        lambda: changed(lambda m: setattr(m, "adapter", nn.Linear(2, 2))),
        "0",
        "it holds modules or buffers of its own",
    ),
    "buffer": (
        lambda: changed(lambda m: m.register_buffer("mask", torch.ones(2))),
        "0",
        "it holds modules or buffers of its own",
    ),
    "complex": (lambda: first(nn.Linear(16, 32, dtype=torch.complex64)), "0", "its weights are torch.complex64"),
    "integers": (
        lambda: changed(lambda m: setattr(m, "weight", nn.Parameter(m.weight.char(), requires_grad=False))),
        "0",
        "its weights are torch.int8",
    ),
    "quantised": (lambda: changed(lambda m: setattr(m, "weight", Quantised(m.weight))), "0", "a Quantised"),
    "empty": (lambda: first(nn.utils.skip_init(nn.Linear, 0, 32)), "0", "0 -> 32 features do not divide"),
    "odd": (lambda: first(nn.Linear(18, 32)), "0", "18 -> 32 features do not divide into num_blocks=4"),
    "lazy": (lambda: first(nn.LazyLinear(32)), "0", "its size is not known yet"),
    "read": (ReadsWeight, "fc1", "its weight is read by the forward of 'the root module' itself"),
    "read in a mode": (ReadsBias, "block.fc2", "read by the forward of 'the root module' itself"),
    "changed by a method": (Rescales, "blocks.1.fc2", "read by the forward of 'the root module' itself"),
    "read in a call": (ReadsNorm, "fc1", "read by the forward of 'the root module' itself"),
    "read within a question": (ReadsWithinAQuestion, "fc2", "read by the forward of 'the root module' itself"),
    "shape": (ReadsShape, "fc1", "read by the forward of 'the root module' itself"),
    "fused": (Attends, "mixer.out_proj", "read by MultiheadAttention 'mixer' itself"),
    "hook": (lambda: changed(lambda m: m.register_forward_hook(lambda *_: None)), "0", "it has hooks"),
    "state hook": (lambda: changed(lambda m: m.register_state_dict_post_hook(lambda *_: None)), "0", "it has hooks"),
    "gradient hook": (lambda: changed(lambda m: m.weight.register_hook(lambda g: g)), "0", "gradient hooks"),
    "forward": (
        lambda: changed(lambda m: setattr(m, "forward", lambda x: x)),
        "0",
        "a forward of its own has been set",
    ),
    "hook after accumulation": (
        lambda: changed(lambda m: m.weight.register_post_accumulate_grad_hook(lambda p: None)),
        "0",
        "gradient hooks",
    ),
    "weight norm": (lambda: changed(parametrizations.weight_norm), "0", "it is parametrised"),
    "pruned": (lambda: changed(lambda m: prune.l1_unstructured(m, "weight", 0.5)), "0", "pruned"),
    "another parameter": (lambda: changed(lambda m: setattr(m, "scale", nn.Parameter(m.bias))), "0", "computed"),
    "no parameter": (lambda: changed(unregister_weight), "0", "computed"),
    "other forward": (lambda: first(Doubled(16, 32)), "0", "Doubled computes something else than nn.Linear"),
    "forward that fails": (lambda: first(Routed(16, 32)), "0", "Routed computes something else than nn.Linear"),
    "scaled": (scaled, "0", "Scaled computes something else than nn.Linear"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("case", UNFIT)
def test_what_cannot_be_swapped_stays_dense_with_a_reason_and_is_refused_when_named(case):
    build, name, reason = UNFIT[case]
    module = build()
    assert reason in reasons(module)[name]
    assert name not in [layer.name for layer in plan_phantom(module, PhantomConfig(4)).swapped]
    before = {key: (type(m), id(m)) for key, m in module.named_modules()}
    with pytest.raises(PlanError, match=name) as error:
        phantomize_(module, PhantomConfig(4, plan={name: "phantom"}))
    assert reason in str(error.value)
    assert before == {key: (type(m), id(m)) for key, m in module.named_modules()}


def test_a_bare_linear_is_refused():
    module = nn.Linear(16, 16)
    with pytest.raises(PlanError, match="it is the module itself"):
        phantomize_(module, PhantomConfig(4, plan={"*": "phantom"}))
    assert type(module) is nn.Linear


# Questions about a weight, and branches that plain values rule out


class Asks(Block):
    def forward(self, x):
        if isinstance(self.fc1.weight, torch.Tensor) and x.dtype != self.fc1.weight.dtype and self.fc1.bias is not None:
            x = x.to(self.fc1.weight.device)
        if self.parts > 1 and not self.fast:
            return F.linear(x, self.fc1.weight[:, : self.parts])
        return super().forward(x) if self.fast else F.linear(x, self.fc2.weight)


def test_what_is_only_asked_or_never_reached_is_not_read():
    assert set(reasons(Asks(parts=1, fast=True)).values()) == {"FFN: a trace connects its linears"}
    assert "read by" in reasons(Asks(parts=2, fast=False))["fc1"]
    assert "read by" in reasons(Asks(parts=1, fast=False))["fc2"]
    assert "read by" in reasons(Asks(parts=torch.tensor(1), fast=True))["fc1"]


class Obscure(Block):
    """Names and loops that no reading follows: what it reads through them is not seen, and nothing fails."""

    def forward(self, x, times=1):
        blocks = [self]
        for block in blocks:
            for self.count in range(times):
                x = x * block.fc1.weight.mean()
        if times > 2 or x is None:
            x = x + 1
        return super().forward(x) + self.fc2.bias


def test_the_reader_is_named():
    assert "read by the forward of '0' itself" in reasons(nn.Sequential(ReadsWeight()))["0.fc1"]


def test_what_no_reading_follows_does_no_harm():
    assert "read by" not in reasons(Obscure())["fc1"] and "read by" in reasons(Obscure())["fc2"]


# One linear under two names, and linears of other classes


def test_one_linear_under_two_names_is_swapped_once():
    linear = nn.Linear(16, 16)
    module = nn.Sequential(linear, nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), linear)
    assert [layer.name for layer in plan_phantom(module, PhantomConfig(4, 1)).swapped] == ["0", "2"]
    for plan in ({"0": "phantom"}, {"4": "phantom"}):
        assert [layer.name for layer in plan_phantom(module, PhantomConfig(4, plan=plan)).swapped] == ["0"]
    x = torch.randn(3, 16)
    expected = module(x)
    phantomize_(module, PhantomConfig(4, phantom_width=10**6, plan={"*": "phantom"}))
    assert module[0] is module[4] is linear and type(linear) is PhantomLinear
    assert torch.allclose(module(x), expected, atol=1e-5)
    dense = densify(module)
    assert dense[0] is dense[4] and type(dense[0]) is nn.Linear


class Square(nn.Linear):
    def __init__(self, size):
        super().__init__(size, size)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("build", [lambda: FalconLinear(16, 16, bias=False), lambda: Square(16)])
def test_subclasses_that_compute_what_nn_linear_does_are_linears(build, device):
    with torch.device(device):
        module = nn.Sequential(build(), nn.ReLU(), build())
    assert len(plan_phantom(module, PhantomConfig(4)).swapped) == 2
    cls = type(module[0])
    if device == "cpu":
        x = torch.randn(3, 16)
        phantomize_(module, PhantomConfig(4))
        dense = densify(module)
        assert type(dense[0]) is cls and dense[0].extra_repr() == build().extra_repr()
        assert torch.allclose(dense(x), module(x), atol=1e-5)
