"""Random modules, configs and plans: each is refused as a whole or trains like the dense oracle on any number of ranks.

A module is a list of steps, drawn through `random.Random`'s interface: by hypothesis on one rank, so that a failure
shrinks, and by seeded generators on two, where the ranks have to agree on it. `benchmarks/fuzz.py` draws many more.
"""

import copy
import itertools
import random
from dataclasses import replace

import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from ranks import run_ranks
from reference import by_part, off_diagonal
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_phantom.config import INITS, PLAN_WORDS, PhantomConfig
from lightning_phantom.distributed.comm import all_reduce
from lightning_phantom.errors import LayoutError, PhantomError, PlanError
from lightning_phantom.layers.phantom import PhantomLinear
from lightning_phantom.layers.split import sharded_parameters
from lightning_phantom.plan.finder import plan_phantom
from lightning_phantom.swap import densify, phantomize_

FACTORS = ("weight", "compressor_weight", "decompressor_weight")


class TwistedBackward(torch.autograd.Function):
    """Elementwise forward, but not backward."""

    @staticmethod
    def forward(ctx, x):
        return x * 0.5

    @staticmethod
    def backward(ctx, grad):
        return grad.cumsum(-1)


def without_gradient(h):
    with torch.no_grad():
        return h.tanh() * 2


# Steps that treat each feature alone; the arguments of log and its like are kept where they are smooth and moderate.
ELEMENTWISE = {
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": lambda h: F.gelu(h, approximate="tanh"),
    "leaky_relu": lambda h: F.leaky_relu(h, 0.2),
    "hardtanh": lambda h: F.hardtanh(h, -2.0, 2.0),
    "sigmoid": lambda h: h.sigmoid(),
    "affine": lambda h: (2 - h) * 0.5 + 1,
    "divide": lambda h: -(h / 3),
    "log": lambda h: (h.abs() + 1).log(),
    "rsqrt": lambda h: torch.rsqrt(h.square() + 1),
    "reciprocal": lambda h: h / (h.abs().add(1)),
    "exp": lambda h: h.tanh().exp(),
    "pow": lambda h: h.tanh() ** 3,
    "sin": lambda h: torch.sin(h.tanh()).mul(2.0),
    "clamp": lambda h: torch.clamp(h, min=-0.7, max=0.9),
    "with itself": lambda h: h.tanh() * h,
    "squared": lambda h: (t := torch.tanh(h)) * t,
    "softplus": F.softplus,
    "threshold": lambda h: F.threshold(h, 0.1, 0.0),
}
# Steps that mix features, or that look at them from outside.
MIXING = {
    "softmax": lambda h: h.softmax(-1),
    "log_softmax": lambda h: F.log_softmax(h, dim=-1),
    "cumsum": lambda h: torch.cumsum(h, -1),
    "flip": lambda h: h.flip(-1),
    "roll": lambda h: torch.roll(h, 1, -1),
    "sort": lambda h: torch.sort(h, -1)[0],
    "view": lambda h: h.view(h.shape),
    "reshape": lambda h: h.reshape(*h.shape[:-1], h.shape[-1]),  # also of no tokens at all
    "centre": lambda h: h - h.mean(-1, keepdim=True),
    "first": lambda h: h - h[..., :1],
    "normalise": lambda h: F.layer_norm(h, h.shape[-1:]),
    "where": lambda h: torch.where(h > 0, h, h * 0.1),
    "ramp": lambda h: h * torch.linspace(0.5, 1.5, h.shape[-1]),
    "dropout": lambda h: F.dropout(h, 0.0),
    "detach": lambda h: h + h.detach(),
    "twisted": TwistedBackward.apply,
    "no_grad": lambda h: h + without_gradient(h),
}
INPLACE = {
    "relu": lambda h: F.relu(h, inplace=True),
    "mul_": lambda h: h.mul_(0.5),
    "+=": lambda h: inplace_add(h),
    "alias": lambda h: inplace_alias(h),
}
BINARY = {
    "mul": lambda a, b: a * b,
    "add": torch.add,
    "maximum": torch.maximum,
    "sub": lambda a, b: a.sub(b, alpha=0.5),
    "clamp": lambda a, b: torch.clamp(a, max=b),
}
MODULES = (nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU, nn.Mish, nn.ELU, nn.Hardswish, nn.Softsign, nn.Identity, nn.LeakyReLU)
MIXING_MODULES = (lambda n: nn.Softmax(-1), nn.LayerNorm, lambda n: nn.PReLU(), lambda n: nn.Flatten(-1), nn.RMSNorm)


def inplace_add(h):
    h += 0.5
    return h


def inplace_alias(h):
    other = h
    h *= 0.5
    return other


STEPS = (
    "call, call with, call held, keep, residual, pair, broadcast, if training, if evaluating, if learning, if given, "
    "if left out, untraceable, scale, unlearned, store, return, unused"
).split(", ")


class ReadsWeight(nn.Module):
    """Computes with the weight of a linear that it does not call."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return F.linear(x, self.linear.weight)


class Net(nn.Module):
    """Applies its steps; `kept` holds values for later steps, `extra` what is returned beside the last one.

    What is in `held` is called by a reference that is no attribute of a module.
    """

    takes_mix = False

    def __init__(self):
        super().__init__()
        self.steps = []
        self.held = []

    def forward(self, x):
        return self.run(x, None)

    def run(self, h, mix):
        kept, extra = [], []
        for kind, *what in self.steps:
            match kind:
                case "call":
                    h = getattr(self, what[0])(h)
                case "call with":
                    h = getattr(self, what[0])(h, h)
                case "elementwise":
                    h = ELEMENTWISE[what[0]](h)
                case "mixing":
                    h = MIXING[what[0]](h)
                case "inplace":
                    h = INPLACE[what[0]](h)
                case "keep":
                    kept.append(h)
                case "residual":
                    h = BINARY[what[0]](h, kept[what[1]])
                case "pair":
                    one, first, other, second, join = what
                    left, right = getattr(self, one)(h), getattr(self, other)(h)
                    h = BINARY[join](ELEMENTWISE[first](left), ELEMENTWISE[second](right))
                case "broadcast":
                    one, other, join = what
                    h = BINARY[join](getattr(self, one)(h), getattr(self, other)(h.unsqueeze(0)))
                case "if training":
                    h = ELEMENTWISE[what[0]](h) if self.training else MIXING[what[1]](h)
                case "if evaluating":
                    h = MIXING[what[1]](h) if self.training else ELEMENTWISE[what[0]](h)
                case "if learning":
                    h = ELEMENTWISE[what[0]](h) if torch.is_grad_enabled() else MIXING[what[1]](h)
                case "if given":
                    h = ELEMENTWISE[what[0]](h) if mix is None else MIXING[what[1]](h)
                case "if left out":
                    h = MIXING[what[1]](h) if mix is None else ELEMENTWISE[what[0]](h)
                case "untraceable":  # but decided alike on every rank, whose rows are its own
                    h = h * 0.5 if h.isfinite().all() else h * 0.25
                case "scale":
                    h = h * getattr(self, what[0])
                case "call held":
                    h = self.held[what[0]](h)
                case "unlearned":
                    with torch.no_grad():
                        h = getattr(self, what[0])(h)
                case "store":
                    self.stored = h
                case "return":
                    extra.append(h)
                case "unused":
                    getattr(self, what[0])(h)
        return (h, *extra) if extra else h

    def extra_repr(self):
        return "\n".join(map(str, self.steps))


class OptionalNet(Net):
    takes_mix = True

    def forward(self, x, mix=None):
        return self.run(x, mix)


class Builder:
    """Draws modules whose layers, dropouts and parameters are sometimes shared."""

    def __init__(self, rng, num_blocks):
        self.rng = rng
        self.num_blocks = num_blocks
        self.dtype = rng.choice([torch.float32, torch.float64])
        self.linears, self.dropouts = [], []

    def chance(self, share):
        return self.rng.randrange(100) < 100 * share

    def width(self):
        return self.rng.choice([1, 5, 14]) if self.chance(0.08) else self.num_blocks * self.rng.randrange(3, 7)

    def linear(self, n_in, n_out=None):
        same = [m for m in self.linears if m.in_features == n_in and n_out in (None, m.out_features)]
        if same and self.chance(0.06):
            return self.rng.choice(same)
        linear = nn.Linear(n_in, n_out or self.width(), self.chance(0.7), dtype=self.dtype)
        if same and self.chance(0.06):
            other = self.rng.choice(same)
            if other.weight.shape == linear.weight.shape:
                linear.weight = other.weight
        if self.chance(0.06):
            linear.weight.requires_grad_(False)
        if self.chance(0.02):
            linear.register_forward_hook(lambda module, args, output: output.flip(-1))
        self.linears.append(linear)
        return linear

    def activation(self):
        if self.chance(0.3):
            if not self.dropouts or self.chance(0.5):
                p = self.rng.choice([0.0, 0.3, 0.5, 1.0])
                # Where all falls away, torch itself cannot go back through what came before.
                self.dropouts.append(nn.Dropout(p, inplace=self.chance(0.2) and p < 1))
            return self.rng.choice(self.dropouts)
        module = self.rng.choice(MODULES)()
        if self.chance(0.04):
            module.forward = MIXING["softmax"]
        return module

    def module(self, n_in, depth=0):
        """Return a module and the width of its output."""
        return self.sequential(n_in, depth) if self.chance(0.3) else self.net(n_in, depth)

    def sequential(self, width, depth):
        modules = []
        for _ in range(self.rng.randrange(2, 6)):
            what = self.rng.randrange(10)
            if what < 5:
                modules.append(self.linear(width))
                width = modules[-1].out_features
            elif what < 8:
                modules.append(self.activation())
            elif what < 9 and depth < 2:
                module, width = self.module(width, depth + 1)
                modules.append(module)
            elif self.chance(0.3):
                modules.append(self.rng.choice(MIXING_MODULES)(width).to(self.dtype))
        return nn.Sequential(*modules), width

    def net(self, width, depth):
        net = (OptionalNet if self.chance(0.25) else Net)()
        kept = []

        def add(module):
            net.add_module(f"m{len(net._modules)}", module)
            return f"m{len(net._modules) - 1}"

        def step(*what):
            net.steps.append(what)

        def elementwise():
            return self.rng.choice(list(ELEMENTWISE))

        def mixing():
            return self.rng.choice(list(MIXING))

        def binary():
            return self.rng.choice(list(BINARY))

        for n in range(self.rng.randrange(2, 8)):
            what = 92 if n == 1 and self.chance(0.5) and net.takes_mix else self.rng.randrange(100)
            if what < 40:
                linear = self.linear(width)
                name = add(linear)
                if self.chance(0.1):
                    net.held.append(linear)
                    step("call held", len(net.held) - 1)
                else:
                    step("call", name)
                width = linear.out_features
                if self.chance(0.1):
                    step("inplace", self.rng.choice(list(INPLACE)))
                elif self.chance(0.1):
                    step("keep")
                    kept.append(width)
            elif what < 58:
                step("elementwise", elementwise())
            elif what < 66:
                step("call", add(self.activation()))
            elif what < 74:
                one = self.linear(width)
                other = self.linear(width, one.out_features)
                if self.chance(0.8):
                    step("pair", add(one), elementwise(), add(other), elementwise(), binary())
                else:
                    step("broadcast", add(one), add(other), binary())
                width = one.out_features
            elif what < 82 and depth < 2:
                module, after = self.module(width, depth + 1)
                call = "call with" if getattr(module, "takes_mix", False) and self.chance(0.5) else "call"
                name = add(module)
                for _ in range(1 + (after == width and self.chance(0.3))):
                    step(call, name)
                width = after
            elif what < 84:
                step("mixing", mixing())
            elif what < 86:
                step("keep")
                kept.append(width)
            elif what < 88:
                fitting = [n for n, other in enumerate(kept) if other == width]
                if fitting:
                    step("residual", binary(), self.rng.choice(fitting))
            elif what < 92:
                step(self.rng.choice(["if training", "if evaluating", "if learning"]), elementwise(), mixing())
            elif what < 93 and net.takes_mix:
                step(self.rng.choice(["if given", "if left out"]), elementwise(), mixing())
            elif what < 94:
                name = f"scale{len(net.steps)}"
                net.register_parameter(name, nn.Parameter(torch.randn(width, dtype=self.dtype)))
                step("scale", name)
            elif what < 95:
                step("untraceable")
            elif what < 96:
                reads = ReadsWeight(self.linear(width))
                step("call", add(reads))
                width = reads.linear.out_features
            elif what < 97:
                linear = self.linear(width)
                step("unlearned", add(linear))
                width = linear.out_features
            elif what < 98:
                step("unused", add(self.linear(width)))
            elif what < 99:
                step("store")
            elif depth == 0:
                step("return")
        return net, width


def draw(rng):
    """Return a module, a config, the shape of an input to call it with, and whether to cast it before the swap."""
    torch.manual_seed(rng.randrange(2**16))
    num_blocks = rng.choice([2, 4, 4, 8, 3])
    builder = Builder(rng, num_blocks)
    width = builder.width()
    module, _ = builder.module(width)
    lead = rng.choice([(5,), (2, 3), (), (0,), (1,), (1, 1)])
    return module, draw_config(rng, module, num_blocks), (*lead, width), builder.chance(0.5)


def calls_of(module, shape, rank=0):
    """The arguments of the calls on a rank: other rows on each, and another number of them where there are rows."""
    generator = torch.Generator().manual_seed(rank)
    shape = (shape[0] + rank, *shape[1:]) if len(shape) > 1 else shape
    x, mix = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    return [(x,), (x, mix)] if getattr(module, "takes_mix", False) else [(x,)]


def kinds_of(module):
    """The classes and steps of which a module is made."""
    kinds = {type(m).__name__ for m in module.modules()}
    for m in module.modules():
        for step in getattr(m, "steps", ()):
            kinds |= {what for what in step if isinstance(what, str) and not hasattr(m, what)}
    return kinds


def seeds_of_every_kind(among=600):
    """The seeds of modules that are swapped, on two ranks too, and have in them what those before have not."""
    seen, seeds = set(), []
    for seed in range(among):
        module, config, *_ = draw(random.Random(seed))
        kinds = kinds_of(module)
        if not kinds <= seen and config.num_blocks % 2 == 0 and would_be_swapped(module, config):
            seen |= kinds
            seeds.append(seed)
    missing = {*ELEMENTWISE, *MIXING, *INPLACE, *BINARY, *STEPS} - seen
    assert not missing, missing
    return seeds


def would_be_swapped(module, config):
    try:
        return bool(plan_phantom(module, config).swapped)
    except PlanError:
        return False


def draw_config(rng, module, num_blocks):
    plan = None
    if rng.randrange(4) == 0:
        names = [name for name, m in module.named_modules() if isinstance(m, nn.Linear)]
        parents = sorted({name.rpartition(".")[0] for name in names} - {""})
        globs = ["*", *["*"] * len(names), *names, *(f"{parent}.*" for parent in parents), "nothing"]
        words = ["phantom", "phantom", "skip", *PLAN_WORDS]
        plan = {rng.choice(globs): rng.choice(words) for _ in range(rng.randrange(1, 4))}
    width = rng.choice([0.25, 0.25, 0.5, 1, 1, 1, 2, 10**9, 1.0])
    how = rng.choice(["auto", *INITS]), rng.randrange(3)
    mixing, latents = rng.choice(["pairwise", "pairwise", "private"]), rng.choice(["own", "own", "both", "previous"])
    return PhantomConfig(num_blocks, width, plan, *how, mixing=mixing, latents=latents)


def snapshot(module):
    """What a refusal must leave as it was."""
    modules = [
        (name, id(m), type(m), list(vars(m)), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in module.named_modules(remove_duplicate=False)
    ]
    parameters = [(id(p), p.requires_grad, p.dtype, p.tolist()) for p in module.parameters()]
    return modules, parameters, list(module.state_dict()), torch.get_rng_state().tolist()


def swap(module, config, group=None):
    """Swap in place; return None, or the message of the refusal."""
    before = snapshot(module)
    try:
        phantomize_(module, config, group)
    except PhantomError as error:
        assert snapshot(module) == before, "a refusal left something behind"
        return f"{type(error).__name__}: {error}"
    return None


def called(module, args):
    """Everything that a caller can see of one call."""
    out = module(*args)
    stored = [vars(m).pop("stored") for m in module.modules() if hasattr(m, "stored")]  # else no copy can be made
    return [*(out if isinstance(out, tuple) else (out,)), *stored]


def loss_of(outputs):
    """A loss in which no two features count the same."""
    return sum((o * torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in outputs)


def leaf(x):
    return x.detach().clone().requires_grad_(x.requires_grad)


def assert_same(got, expected, what):
    assert got.shape == expected.shape and got.dtype == expected.dtype, what
    assert expected.isfinite().all(), what
    if expected.numel():
        error = (got - expected).abs().max().item() / (1 + expected.abs().max().item())
        assert error < 1e-8, f"{what}: {error:.1e}"


def filled(gradient, like):
    return torch.zeros_like(like) if gradient is None else gradient


def step_of(gradients):
    """A learning rate at which the next values are moderate again."""
    return 0.01 / (1 + max((g.abs().max().item() for g in gradients if g is not None and g.numel()), default=0.0))


def compare_with_dense(module, args, p, step):
    """One call, forward and backward, against autograd through dense weights made of the same factors."""
    dense = densify(module)
    assert not any(isinstance(m, PhantomLinear) for m in dense.modules())
    with torch.no_grad():
        for got, expected in zip(called(module, args), called(dense, args), strict=True):
            assert_same(got, expected, "output without gradients")

    factors = {name: leaf(parameter) for name, parameter in module.named_parameters()}
    weights = dict(factors)
    for name, layer in module.named_modules():
        if isinstance(layer, PhantomLinear):
            prefix = f"{name}."
            local, *narrow = (weights.pop(f"{prefix}{f}") for f in FACTORS)
            weight = torch.block_diag(*local.chunk(p)) + off_diagonal(*narrow, p, layer.mixing)
            weights[f"{prefix}weight"] = by_part(weight, p, layer.parts)
            if layer.bias is not None:
                weights[f"{prefix}bias"] = by_part(weights[f"{prefix}bias"], p, layer.parts)
            assert_same(dense.get_submodule(name).weight.detach(), weights[f"{prefix}weight"].detach(), "dense weight")

    inputs, module_inputs = ([a.clone().requires_grad_() for a in args] for _ in range(2))
    expected = called(Functional(dense, weights), [a * 1 for a in inputs])
    got = called(module, [a * 1 for a in module_inputs])
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b, "output")
        assert a.requires_grad == b.requires_grad
    loss, module_loss = loss_of(expected), loss_of(got)
    assert_same(module_loss, loss, "loss")
    if not loss.requires_grad:
        return

    module.zero_grad()
    loss.backward()
    module_loss.backward()
    for a, b in zip(module_inputs, inputs, strict=True):
        assert_same(filled(a.grad, a), filled(b.grad, b), "gradient of the input")
    for name, parameter in module.named_parameters():
        wanted = factors[name]
        assert_same(filled(parameter.grad, parameter), filled(wanted.grad, wanted), f"gradient of {name}")
    if step:
        lr = step_of([wanted.grad for wanted in factors.values()])
        torch.optim.SGD(module.parameters(), lr=lr).step()
        for name, parameter in module.named_parameters():
            wanted = factors[name]
            assert_same(parameter, wanted - lr * filled(wanted.grad, wanted), f"{name} after the step")


class Functional:
    """A module called with other tensors in the place of its parameters."""

    def __init__(self, module, tensors):
        self.module, self.tensors = module, tensors
        self.modules = module.modules

    def __call__(self, *args):
        return functional_call(self.module, self.tensors, args)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(st.randoms(use_true_random=False))
def test_a_random_module_is_refused_or_trains_like_its_dense_oracle(rng):
    becomes_of(rng, note)


def test_modules_of_every_kind_are_refused_or_train_like_their_dense_oracle():
    for seed in seeds_of_every_kind():
        becomes_of(random.Random(seed))


def becomes_of(rng, note=lambda text: None):
    """Compare a random module with its dense oracle; return "trained", or the refusal to swap it."""
    module, config, shape, cast_first = draw(rng)
    note(f"{module}\n{config}")
    if cast_first:
        module.double()
    refusal = swap(module, replace(config, latents="own"))  # no dense function stands for the others
    if refusal:
        return refusal
    without_dropout(module.double())
    calls = calls_of(module, shape)
    for training in (True, False):
        module.train(training)
        for args in calls:
            compare_with_dense(module, args, config.num_blocks, step=training)
    return "trained"


def without_dropout(module):
    """Let no mask fall: on every rank it would fall otherwise."""
    for m in module.modules():
        if isinstance(m, nn.Dropout):
            m.p = float(m.p == 1)
    return module


def trained(module, batches, share):
    """What a caller sees of each rank's calls, in train and in eval mode, with the gradient of a loss over `share`."""
    seen = {}
    for training, (rank, calls) in itertools.product((True, False), batches.items()):
        module.train(training)
        for n, args in enumerate(calls):
            inputs = [a.clone().requires_grad_() for a in args]
            outputs = called(module, [a * 1 for a in inputs])
            loss = loss_of(outputs)
            if loss.requires_grad:
                (loss / share).backward()
            values = [*map(plain, outputs), *(filled(a.grad, a) * share for a in inputs)]
            seen.update({(rank, training, n, i): value for i, value in enumerate(values)})
    return seen


def plain(x):
    """What an activation between ranks, or any tensor, holds."""
    return x.detach().reshape(x.shape)


def gradients_of(module):
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def compare_with_alone(module, alone, shape):
    """Compare ranks that have rows of their own with one process that has those of all."""
    size, rank = dist.get_world_size(), dist.get_rank()
    batches = {r: calls_of(module, shape, r) for r in range(size)}
    got, wanted = trained(module, {rank: batches[rank]}, 1), trained(alone, batches, size)
    gradients, sharded = gradients_of(alone), sharded_parameters(module)
    for name, parameter in module.named_parameters():
        if id(parameter) not in sharded and gradients[name] is not None:  # as DistributedDataParallel does
            parameter.grad = all_reduce(filled(parameter.grad, parameter), "sum", dist.group.WORLD) / size
    lr = step_of(gradients.values())
    for each in (module, alone):
        torch.optim.SGD(each.parameters(), lr=lr).step()
        each.eval()
    with torch.no_grad():
        after, wanted_after = (plain(called(each, batches[rank][0])[0]) for each in (module, alone))
    # From here on no rank waits for another.
    for key, value in got.items():
        assert_same(value, wanted[key], f"{key}")
    for name, parameter in module.named_parameters():
        gradient = gradients[name]
        assert (gradient is None) == (parameter.grad is None), f"gradient of {name}: {parameter.grad}, not {gradient}"
        if gradient is not None:
            mine = sharded[id(parameter)].take(gradient) if id(parameter) in sharded else gradient
            assert_same(parameter.grad, mine, f"gradient of {name}")
    assert_same(after, wanted_after, "output after the step")


def attempt(seed, group):
    """What becomes of a seed's module on this rank: "trained", a refusal, or what is wrong."""
    module, config, shape, _ = draw(random.Random(seed))
    alone = copy.deepcopy(without_dropout(module.double()))
    described = f"{module}\n{config}"
    refusal, refusal_alone = swap(module, config, group), swap(alone, config)
    if refusal or refusal_alone:
        indivisible = config.num_blocks % dist.get_world_size() and "must divide the number of blocks" in str(refusal)
        expected = refusal == refusal_alone or (indivisible and not refusal_alone)
        return refusal if expected else f"seed {seed}: {refusal_alone} | {refusal}"
    try:
        compare_with_alone(module, alone, shape)
    except AssertionError as error:
        return f"seed {seed}: {error}\n{described}"
    except LayoutError as error:
        reads_another = "reads latents of" in str(error)  # of a layer that this call leaves out, on one process, too
        expected = reads_another and is_refused_in_use(alone, shape)
        return f"refused in use: {error}" if expected else f"seed {seed}: {error}\n{described}"
    return "trained"


def is_refused_in_use(module, shape):
    try:
        trained(module, {0: calls_of(module, shape)}, 1)
    except LayoutError:
        return True
    return False


def one_and_several_ranks(seeds):
    """What becomes of each seed's module on all ranks together."""
    verdicts, group = {}, None
    for seed in seeds:
        group = group or dist.new_group()
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, attempt(seed, group))
        wrong = [verdict for verdict in everyone if verdict.startswith("seed")]
        ends = {verdict.partition(":")[0] for verdict in everyone}
        if len(ends) > 1 and not wrong:
            wrong = [f"seed {seed}: the ranks end differently: {everyone}"]
        verdicts[seed] = wrong[0] if wrong else everyone[0]
        if wrong or verdicts[seed].startswith("refused in use"):
            group = None  # in this one they may still wait for each other
    return verdicts


def test_random_modules_compute_the_same_on_two_ranks_as_on_one():
    seeds = sorted({*seeds_of_every_kind(), *range(60)})
    verdicts = list(run_ranks(2, one_and_several_ranks, seeds)[0].values())
    wrong = [verdict for verdict in verdicts if verdict.startswith("seed")]
    assert not wrong, "\n".join(wrong[:3])
    assert verdicts.count("trained") > 40 and not [v for v in verdicts if v.startswith("refused in use")]
