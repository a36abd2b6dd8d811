"""Linears become phantom layers in place, and plain ones again in a copy."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_phantom.config import PhantomConfig
from lightning_phantom.errors import PlanError
from lightning_phantom.layers.phantom import PhantomLinear
from lightning_phantom.swap import densify, phantomize_

EXACT = PhantomConfig(4, phantom_width=10**6, plan={"*": "phantom"})


class Block(nn.Module):
    def __init__(self, between=torch.relu):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.between = between

    def forward(self, x):
        return self.fc2(self.between(self.fc1(x)))


def phantoms(module):
    return [m for m in module.modules() if isinstance(m, PhantomLinear)]


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (Block, (5, 16)),
        (lambda: Block(lambda h: F.softmax(h, -1)), (5, 16)),
        (lambda: nn.Sequential(Block(), nn.ReLU(), Block(torch.tanh)), (2, 3, 16)),
        (lambda: nn.Sequential(nn.Linear(16, 16)), (16,)),
    ],
)
def test_at_the_largest_width_a_module_computes_what_it_did(build, shape):
    module, x = build(), torch.randn(shape)
    expected, before = module(x).detach(), copy.deepcopy(module)
    assert phantomize_(module, EXACT) is module
    assert len(phantoms(module)) == sum(isinstance(m, nn.Linear) for m in before.modules())
    assert torch.allclose(module(x), expected, atol=1e-5)
    dense = densify(module)
    assert not phantoms(dense) and phantoms(module)
    assert torch.allclose(dense(x), expected, atol=1e-5)
    assert [*dense.state_dict()] == [*before.state_dict()]


class Listed(nn.Module):
    """Keeps its linears in a list and in a closure, beside the ModuleList that registers them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 16)])
        self.steps = [self.layers[0], torch.relu]
        second = self.layers[1]
        self.last = {"layer": self.layers[2], "step": lambda h: torch.relu(second(h))}

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return self.last["layer"](self.last["step"](x))


def test_every_reference_to_a_linear_runs_the_new_layer():
    module, x = Listed(), torch.randn(3, 16)
    expected = module(x).detach()
    phantomize_(module, EXACT)
    assert torch.allclose(module(x), expected, atol=1e-5)
    for layer in phantoms(module):
        with torch.no_grad():
            layer.weight.zero_()
    assert not torch.allclose(module(x), expected, atol=1e-3)
    module(x).square().sum().backward()
    assert all(p.grad is not None for p in module.parameters()) and len(phantoms(module)) == 3


def test_what_a_reference_was_is_what_it_is():
    module = Block()
    module.again = module.fc1
    linear, weight = module.fc1, module.fc1.weight
    phantomize_(module, PhantomConfig(4))
    assert module.fc1 is module.again is linear and type(linear) is PhantomLinear
    assert linear.weight is not weight and linear.name == "fc1"
    assert next(name for name, _ in module.named_parameters()) == "fc1.weight"


def test_bad_weights_are_refused_before_anything_changes():
    module = Block()
    module.fc2.weight.data[0, 0] = float("nan")
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(PlanError, match="'fc2' holds NaN"):
        phantomize_(module, PhantomConfig(4))
    assert type(module.fc1) is nn.Linear
    for key, value in module.state_dict().items():
        assert torch.equal(value.nan_to_num(7.0), before[key].nan_to_num(7.0))
    with torch.device("meta"):
        module = Block()
    with pytest.raises(PlanError, match="'fc1' is on the meta device and has no weights to start from"):
        phantomize_(module, PhantomConfig(4, init="from_dense"))
    assert type(module.fc1) is nn.Linear
    assert phantomize_(module, PhantomConfig(4)).fc1.weight.is_meta


def test_frozen_and_mode_and_dtype_survive():
    module = Block().to(torch.float64).eval()
    module.fc1.weight.requires_grad_(False)
    module.fc2.bias.requires_grad_(False)
    phantomize_(module, PhantomConfig(4))
    assert not module.fc1.decompressor_weight.requires_grad and module.fc1.bias.requires_grad
    assert module.fc2.weight.requires_grad and not module.fc2.bias.requires_grad
    assert module.fc1.weight.dtype is torch.float64 and not module.fc1.training
    dense = densify(module)
    assert not dense.fc1.weight.requires_grad and dense.fc2.weight.dtype is torch.float64 and not dense.fc1.training


def test_a_deep_copy_works_on_its_own():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x):
            return self.down(F.silu(self.gate(x)) * self.up(x))

    module = phantomize_(Gated(), PhantomConfig(4))
    twin, x = copy.deepcopy(module), torch.randn(2, 16)
    assert module.gate.siblings == (module.gate, module.up) and twin.gate.siblings == (twin.gate, twin.up)
    assert torch.equal(module(x), twin(x))
    with torch.no_grad():
        twin.up.weight.zero_()
    assert not torch.equal(module(x), twin(x))


class OfTheUsers(nn.TransformerEncoderLayer):
    pass


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.SiLU()])
@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, OfTheUsers])
@pytest.mark.parametrize("swapped", ["linear?", "linear1", "linear2"])
def test_torchs_fused_path_is_switched_off_and_on_again(activation, kind, swapped):
    layer = kind(16, 2, 32, dropout=0.0, batch_first=True, activation=activation)
    module, x = nn.TransformerEncoder(layer, 2), torch.randn(3, 5, 16)
    mask = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]], dtype=torch.bool)
    expected = module(x, src_key_padding_mask=mask).detach()
    before = module.use_nested_tensor, module.layers[0].activation_relu_or_gelu
    phantomize_(module, PhantomConfig(4, 10**6, plan={f"layers.*.{swapped}": "phantom"})).eval()
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():  # without gradients torch would take the fused path, which reads linear1.weight
            out = module(x, src_key_padding_mask=mask)
            assert torch.allclose(out[~mask], expected[~mask], atol=1e-5), mode
    alike = nn.ModuleList([copy.deepcopy(densify(module)) for _ in range(2)])
    phantomize_(alike, PhantomConfig(4, plan={f"0.layers.*.{swapped}": "phantom"}))
    now = [(encoder.use_nested_tensor, encoder.layers[0].activation_relu_or_gelu) for encoder in alike]
    assert now == [(False, 0), before]  # nothing is switched off where nothing was swapped
    dense = densify(module)
    assert (dense.use_nested_tensor, dense.layers[0].activation_relu_or_gelu) == before
    with torch.no_grad():
        assert torch.allclose(dense(x, src_key_padding_mask=mask)[~mask], expected[~mask], atol=1e-5)
