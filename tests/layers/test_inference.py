"""Swapped modules, exported and compiled: the same function, with the same gradients; on several ranks with breaks."""

import itertools
import shutil

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.nn import functional as F

from examples.lm import LanguageModel
from lightning_phantom import PhantomConfig, PhantomLinear, phantomize_
from lightning_phantom.errors import LayoutError

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler here"
)


class Gated(nn.Module):
    """A gated feed-forward network, whose first two linears share their latents' journey."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def mlp():
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 16))


def swapped(kind):
    """A module with phantom layers, and an input."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    if kind == "layer":
        return PhantomLinear(16, 24, 4, 2, dtype=torch.float64), x
    if kind == "language model":
        return phantomize_(LanguageModel(16, 2, 2, 8).double(), PhantomConfig(2)), torch.randint(256, (2, 8))
    module = {"mlp": mlp, "gated": Gated}[kind]()
    return phantomize_(module.double(), PhantomConfig(4)), x


KINDS = ("layer", "mlp", "gated", "language model")


@pytest.mark.parametrize("kind", KINDS)
def test_exported(kind, tmp_path):
    module, x = swapped(kind)
    module.eval()
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert not any("lightning_phantom" in str(node.target) for node in program.graph.nodes)
    torch.export.save(program, tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2").module()
    for batch in (x, torch.cat([x, x.flip(0), x])):
        assert torch.allclose(program(batch), module(batch), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_without_a_graph_break(kind):
    module, x = swapped(kind)
    module.eval()

    def gradients(function):
        module.zero_grad()
        out = function(x)
        out.square().mean().backward()
        return [out, *(p.grad for p in module.parameters())]

    expected = gradients(module)
    torch._dynamo.reset()
    got = gradients(torch.compile(module, fullgraph=True, backend="aot_eager"))
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-12)


@needs_compiler
def test_compiled_to_machine_code():
    module, x = swapped("mlp")
    module.eval()
    torch._dynamo.reset()
    sooner = {"cpp_cache_precompile_headers": False, "cpp.vec_isa_ok": True}  # two compilations of torch's own less
    with torch.no_grad(), torch._inductor.config.patch(sooner):
        try:
            torch.compile(torch.sin)(x)
        except torch._dynamo.exc.BackendCompilerFailed as error:  # as where torch lies in a path with a space
            pytest.skip(f"torch.compile fails for torch's own functions here: {str(error)[:80]}")
        assert torch.allclose(torch.compile(module, fullgraph=True)(x), module(x), rtol=1e-10, atol=1e-12)


def test_traced_and_eager_agree_in_values_and_gradients(monkeypatch):
    for p, bias, autocast in itertools.product((2, 4), (True, False), (True, False)):
        dtype = torch.float32 if autocast else torch.float64
        layer = PhantomLinear(16, 24, p, 2, bias, dtype=dtype)
        x = torch.randn(3, 5, 16, dtype=dtype, requires_grad=True)
        grad = torch.randn(3, 5, 24, dtype=dtype)

        def run(layer=layer, x=x, grad=grad, autocast=autocast):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = layer(x)
            tensors = [x, *layer.parameters()]
            return [out, *torch.autograd.grad(out, tensors, grad.to(out.dtype))]

        eager = run()
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            traced = run()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            without_gradients = layer(x)
        for a, b in zip([*traced, without_gradients], [*eager, eager[0]], strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            tolerance = 0.05 if autocast else 1e-12
            assert torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def test_a_wrong_width_is_named_in_an_export():
    module, x = swapped("mlp")
    with pytest.raises(LayoutError, match="last size must be in_features=16"):
        torch.export.export(module, (x[..., :8],))


# On several ranks


class Block(nn.Module):
    """A block of a transformer around its FFN, with something between the FFN's two linears."""

    def __init__(self, between):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.between = between

    def forward(self, x):
        return x + 2 * self.down(self.between(self.up(self.norm(x))))


class Between(nn.Module):
    """What treats each feature alone, what asks for a size, and what mixes the features, before the next linear."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 32))
        self.drop = nn.Dropout(0.0)

    def forward(self, z):
        z = self.drop(F.gelu(z) * z.shape[-1] ** -0.5)
        z = z.softmax(-1) * self.scale
        z += 0.1
        return z


def compiled_in_part():
    """By what is compiled: whether values and gradients are those of the same module as it is."""
    seen = {}
    for between in (nn.GELU(), Between()):
        torch.manual_seed(0)
        block = phantomize_(
            Block(between), PhantomConfig(4, plan={"up": "phantom", "down": "phantom"}), dist.group.WORLD
        )
        block.double()

        def values(call, x, block=block):
            block.zero_grad()
            x = x.clone().requires_grad_()
            out = call(x)
            out.square().sum().backward()
            return [out, x.grad, *(p.grad.clone() for p in block.parameters())]

        batches = [torch.randn(rows + dist.get_rank(), 16, dtype=torch.float64) for rows in (3, 3, 5, 0)]
        plain = [values(block, x) for x in batches]
        for what in ("block", "what lies between"):
            torch._dynamo.reset()
            call = block if what != "block" else torch.compile(block, backend="aot_eager")
            block.between = between if what == "block" else torch.compile(between, backend="aot_eager")
            seen[type(between).__name__, what] = all(
                torch.allclose(a, b, rtol=1e-10, atol=1e-12)
                for x, wanted in zip(batches, plain, strict=True)
                for a, b in zip(values(call, x), wanted, strict=True)
            )
            block.between = between
    return seen


def test_compiled_around_activations_of_several_ranks():
    for seen in run_ranks(2, compiled_in_part):
        assert len(seen) == 4 and all(seen.values()), seen
