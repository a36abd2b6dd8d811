"""The strategy on gloo ranks: the same training for every number of ranks, and what must agree between them."""

import copy
import gc
import itertools
import os
import re
import tempfile
import textwrap
import weakref
from datetime import timedelta
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging
from programs import program
from ranks import run_ranks
from torch import nn
from training import Attentive, EMAWeightAveraging, Net, data, loader, needs_ema, own, quiet, trainer, weights

from lightning_phantom import PhantomLinear, PhantomStrategy
from lightning_phantom.distributed.gradients import clip_grad_norm_
from lightning_phantom.distributed.mesh import resolve_sizes
from lightning_phantom.errors import CheckpointError, PhantomError, PlanError
from lightning_phantom.layers.split import sharded_parameters, split_layers

LAYOUTS = {2: [{}, {"phantom_parallel_size": 1}], 4: [{}, {"phantom_parallel_size": 2}]}


class Llama(Net):
    """A tiny Llama of transformers, which reads the features as 16 tokens of a small vocabulary."""

    def __init__(self, **kwargs):
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__(**kwargs)
        sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=11)
        self.net = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="sdpa"))
        for name, m in list(self.net.named_modules()):
            if name.endswith("norm"):  # its own computes in 32 bits, and so would its loss
                self.net.set_submodule(name, nn.RMSNorm(m.weight.shape, m.variance_epsilon))
        del self.norm, self.tail

    def training_step(self, batch, batch_idx):
        tokens = (batch[0] * 3).long() % 11
        logits = self.net(input_ids=tokens).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss


RUNS = {
    "digits": (lambda: Net(0.0, lr=0.5), "64-true", True, 24),
    "unseeded": (lambda: Net(0.0, lr=0.5), "64-true", False, 8),
    "32 bits": (lambda: Net(0.0, lr=0.5), "32-true", True, 8),
    "torch's transformer": (lambda: Attentive(lr=0.03, optimizer=torch.optim.AdamW), "64-true", True, 24),
    "transformers' Llama": (lambda: Llama(lr=0.03, optimizer=torch.optim.AdamW), "64-true", True, 50),
}


def _losses(sizes, make, precision, seeded, steps):
    """Losses of a run whose ranks start from different random states unless they are seeded."""
    os.environ.pop("PL_GLOBAL_SEED", None)
    torch.manual_seed(100 + dist.get_rank())
    if seeded:
        L.seed_everything(7, verbose=False)
    module, dtype = make(), torch.float64 if precision == "64-true" else torch.float32
    strategy = PhantomStrategy(num_blocks=4, **sizes)
    trainer(tempfile.gettempdir(), strategy=strategy, precision=precision, max_epochs=10, max_steps=steps).fit(
        module, loader(batch_size=own(8), dtype=dtype, shuffle=True)
    )
    os.environ.pop("PL_GLOBAL_SEED", None)
    assert len(module.losses) == steps and len(split_layers(module)) >= 2
    return torch.tensor(module.losses, dtype=torch.float64)


def _all_losses(layouts):
    return [{name: _losses(sizes, *run) for name, run in RUNS.items()} for sizes in layouts]


def test_the_same_training_on_1_2_and_4_ranks():
    ((alone,),) = run_ranks(1, _all_losses, [{}])
    for losses in alone.values():
        assert len(losses) == 8 or losses[-8:].mean() < 0.95 * losses[:8].mean()
    assert not torch.equal(alone["digits"][:8], alone["unseeded"])
    for size, layouts in ((2, [{}]), (4, LAYOUTS[4])):
        by_rank = run_ranks(size, _all_losses, layouts)
        for n, sizes in enumerate(layouts):
            for name, expected in alone.items():
                mean = torch.stack([seen[n][name] for seen in by_rank]).mean(0)
                error = ((mean - expected) / expected).abs().max().item()
                assert error < (1e-4 if name == "32 bits" else 1e-9), (size, sizes, name, error)


def _agreement(sizes):
    """On one layout: metrics, logging, clipping, samplers, seeds and checkpoints."""
    rank, seen = dist.get_rank(), {}
    strategy = PhantomStrategy(num_blocks=4, **sizes)
    folder = tempfile.mkdtemp() if rank == 0 else None
    folder = [folder]
    dist.broadcast_object_list(folder, 0)
    folder = folder[0]

    class Watch(Callback):
        def __init__(self):
            self.norms = []

        def on_before_optimizer_step(self, trainer, module, optimizer):
            parameters = list(module.parameters())
            grads = [p.grad.clone() for p in parameters]
            self.norms.append(clip_grad_norm_(parameters, 1e9, sharded_parameters(module)).item())
            for p, g in zip(parameters, grads, strict=True):
                p.grad.copy_(g)

    watch = Watch()
    L.seed_everything(3, verbose=False)
    module = Net(dropout=0.0)
    checkpoint = ModelCheckpoint(folder, save_last=True)
    run = trainer(
        folder,
        strategy=strategy,
        gradient_clip_val=0.05,
        callbacks=[watch, checkpoint],
        enable_checkpointing=True,
        limit_train_batches=3,
    )
    run.fit(module, loader(48, batch_size=own(8)), loader(40, batch_size=5))
    seen["metrics"] = {k: float(v) for k, v in run.callback_metrics.items()}
    seen["norms"] = watch.norms
    seen["weights"] = weights(module)
    seen["sampler"] = strategy.distributed_sampler_kwargs
    seen["group"] = (strategy.phantom_parallel_size, strategy.mesh.phantom.rank, strategy.mesh.data_parallel.rank)
    seen["decision"] = (
        strategy.reduce_boolean_decision(rank == 0, all=False),
        strategy.reduce_boolean_decision(rank == 0, all=True),
        strategy.reduce_boolean_decision(True, all=True),
    )
    seen["gathered"] = strategy.all_gather(torch.tensor([rank])).flatten().tolist()
    seen["validate"] = run.validate(module, loader(40, batch_size=5), verbose=False)[0]
    seen["test"] = run.test(module, loader(40, batch_size=5), verbose=False)[0]
    seen["predict"] = torch.cat(run.predict(module, loader(40, batch_size=5)))
    seen["after"] = weights(module)
    fresh = Net(dropout=0.0)
    seen["best"] = trainer(folder, strategy=PhantomStrategy(num_blocks=4, **sizes)).validate(
        fresh, loader(40, batch_size=5), ckpt_path=checkpoint.last_model_path, verbose=False
    )[0]
    seen["path"] = checkpoint.last_model_path
    return seen


def _agreements(layouts):
    return [_agreement(sizes) for sizes in layouts]


@pytest.fixture(scope="module")
def alone():
    return run_ranks(1, _agreement, {})[0]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_agree_with_one_process(alone, size):
    by_rank = run_ranks(size, _agreements, LAYOUTS[size])
    for n, sizes in enumerate(LAYOUTS[size]):
        held, first = sizes.get("phantom_parallel_size", size), by_rank[0][n]
        for rank, seen in enumerate(result[n] for result in by_rank):
            # As under DDP.
            assert seen["sampler"] == {"num_replicas": size, "rank": rank}
            assert seen["decision"] == (True, False, True)
            assert seen["gathered"] == list(range(size))
            assert seen["group"] == (held, rank % held, rank // held)
            # One set of weights, one norm, everywhere, and those of one process.
            for name, value in alone["weights"].items():
                assert torch.allclose(seen["weights"][name], value, atol=1e-5), name
                assert torch.equal(seen["weights"][name], first["weights"][name]), name
                assert torch.equal(seen["after"][name], seen["weights"][name]), name
            assert seen["norms"] == first["norms"]
            assert seen["norms"] == pytest.approx(alone["norms"], rel=1e-6)
            # Each sample counts once.
            assert seen["metrics"]["val_seen"] == 40
            assert seen["metrics"]["val_count"] == 40
            for key in ("val_loss", "val_accuracy"):
                assert seen["metrics"][key] == pytest.approx(alone["metrics"][key], rel=1e-4), key
                for phase in ("validate", "test", "best"):
                    assert seen[phase][key] == pytest.approx(alone["metrics"][key], rel=1e-4), (phase, key)
            # The ranks of a group predict the same.
            mine = alone["predict"][rank // held :: size // held]
            assert torch.allclose(seen["predict"], mine, atol=1e-4)


def test_a_full_checkpoint_is_a_plain_one(alone, tmp_path):
    """Its state dict holds dense weights under the module's keys; no plugin is needed to load it."""
    file = torch.load(alone["path"], weights_only=True)
    plain = Net(dropout=0.0)
    plain.load_state_dict(file["state_dict"])
    plain.eval()
    x = data(40).tensors[0]
    assert torch.allclose(plain(x), alone["predict"], atol=1e-5)
    assert file["phantom"]["version"] == 1 and file["phantom"]["num_blocks"] == 4


def _masks():
    """What this rank's dropouts let through of its own tokens, inside an FFN and outside."""
    seen = {}

    class Probe(Net):
        def training_step(self, batch, batch_idx):
            self.net[2].register_forward_hook(lambda m, i, o: seen.update(inside=torch.cat([o == 0])))
            self.tail[0].register_forward_hook(lambda m, i, o: seen.update(outside=o == 0))
            return super().training_step(batch, batch_idx)

    L.seed_everything(5, verbose=False)
    strategy = PhantomStrategy(num_blocks=4, phantom_parallel_size=2)
    trainer(tempfile.gettempdir(), strategy=strategy, max_steps=1).fit(Probe(dropout=0.5), loader(batch_size=16))
    return seen


def test_dropout_falls_otherwise_on_every_rank():
    """Also in the features of one token that several ranks hold."""
    results = run_ranks(4, _masks)
    for where, shape in (("inside", (16, 32)), ("outside", (16, 16))):
        masks = [seen[where] for seen in results]
        for a, b in itertools.combinations(masks, 2):
            assert a.shape == shape and not torch.equal(a, b)
    for seen in results:
        left, right = seen["inside"].chunk(2, dim=1)
        assert not torch.equal(left, right)


# On one rank, in this process


def one(folder, **kwargs):
    return trainer(folder, devices=1, **kwargs)


def test_resume_equals_the_uninterrupted_run(tmp_path):
    def run(epochs, ckpt=None):
        torch.manual_seed(0)
        module = Net(dropout=0.0, optimizer=torch.optim.AdamW, lr=0.01)
        saver = ModelCheckpoint(tmp_path / str(epochs), save_last=True)
        t = one(tmp_path, max_epochs=epochs, callbacks=[saver], enable_checkpointing=True)
        t.fit(module, loader(), ckpt_path=ckpt)
        return module, saver.last_model_path

    whole, _ = run(2)
    _, path = run(1)
    resumed, _ = run(2, path)
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_that_does_not_fit_is_refused_before_weights_change(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_last=True)
    one(tmp_path, callbacks=[saver], enable_checkpointing=True).fit(Net(), loader())
    path = saver.last_model_path
    module = Net()
    before = copy.deepcopy(module.tail.state_dict())
    with pytest.raises(CheckpointError, match=r"saved with num_blocks=4, the model has num_blocks=8: set num_blocks=4"):
        one(tmp_path, strategy=PhantomStrategy(num_blocks=8)).fit(module, loader(), ckpt_path=path)
    assert all(torch.equal(before[k], v) for k, v in module.tail.state_dict().items())
    with pytest.raises(CheckpointError, match=r"'net.0' has phantom_width=1 in the checkpoint and phantom_width=2"):
        one(tmp_path, strategy=PhantomStrategy(num_blocks=4, phantom_width=2)).fit(Net(), loader(), ckpt_path=path)
    torch.save({"weights": 1}, tmp_path / "foreign.ckpt")
    with pytest.raises(CheckpointError, match=r"foreign.ckpt: this is not a Lightning checkpoint"):
        one(tmp_path).validate(Net(), loader(), ckpt_path=tmp_path / "foreign.ckpt")


def test_dense_checkpoints_start_a_model_but_do_not_continue_a_fit(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_last=True)
    dense = Net(dropout=0.0)
    one(tmp_path, strategy="auto", callbacks=[saver], enable_checkpointing=True).fit(dense, loader())
    exact = PhantomStrategy(num_blocks=4, phantom_width=10**6, plan={"net.*": "phantom"})
    (got,) = one(tmp_path, strategy=exact).validate(
        Net(dropout=0.0), loader(), ckpt_path=saver.last_model_path, verbose=False
    )
    (expected,) = one(tmp_path, strategy="auto").validate(dense, loader(), verbose=False)
    assert got["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
    with pytest.raises(CheckpointError, match="holds no optimizer state for phantom layers"):
        one(tmp_path, max_epochs=2).fit(Net(), loader(), ckpt_path=saver.last_model_path)

    class LoadsItself(Net):
        def setup(self, stage):
            self.load_state_dict(torch.load(saver.last_model_path, weights_only=True)["state_dict"])

    (got,) = one(
        tmp_path, strategy=PhantomStrategy(num_blocks=4, phantom_width=10**6, plan={"net.*": "phantom"})
    ).validate(LoadsItself(dropout=0.0), loader(), verbose=False)
    assert got["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)


@pytest.mark.parametrize(
    "callback",
    [
        lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1),
        pytest.param(lambda: EMAWeightAveraging(decay=0.9), marks=needs_ema),
    ],
)
def test_callbacks_that_copy_the_model_in_their_setup_hook(tmp_path, callback):
    module = Net()
    one(tmp_path, max_epochs=3, callbacks=[callback()]).fit(module, loader())
    assert sum(isinstance(m, PhantomLinear) for m in module.modules()) == 3


def test_layers_made_in_configure_model_are_swapped(tmp_path):
    class Late(Net):
        def __init__(self):
            super().__init__()
            del self.net
            self.net = None

        def configure_model(self):
            if self.net is None:
                with torch.device("meta"):
                    self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))

    with pytest.raises(PlanError, match=r"'absent.\*': 'phantom' matches no module"):
        one(tmp_path, strategy=PhantomStrategy(num_blocks=4, plan={"net.*": "phantom", "absent.*": "phantom"})).fit(
            Late(), loader()
        )
    for plan in (None, {"net.*": "phantom"}):
        module = Late()
        one(tmp_path, strategy=PhantomStrategy(num_blocks=4, plan=plan)).fit(module, loader())
        assert isinstance(module.net[0], PhantomLinear)
        assert module.net[0].weight.isfinite().all() and module.losses[-1] < 3


def test_random_weights_follow_the_users_seed(tmp_path):
    def first_weights(seed):
        L.seed_everything(seed, verbose=False)
        module = Net()
        one(tmp_path, strategy=PhantomStrategy(num_blocks=4, init="random"), max_steps=0).fit(module, loader())
        return module.net[0].weight.detach().clone()

    assert torch.equal(first_weights(1), first_weights(1))
    assert not torch.equal(first_weights(1), first_weights(2))


class Early(Net):
    """Makes its optimizer before the layers are swapped, with groups of its own."""

    def __init__(self, how):
        super().__init__(dropout=0.0)
        self.how, self.kept = how, list(self.parameters())
        self.made = self.make(self.kept)

    def make(self, parameters):
        decay, plain = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() == 1]
        return torch.optim.AdamW([{"params": decay}, {"params": plain, "weight_decay": 0.0}], lr=0.01)

    def configure_optimizers(self):
        if self.how == "in init":
            return self.made
        return self.make(self.kept if self.how == "kept" else list(self.parameters()))


def _early():
    seen = {}
    for how in ("after", "in init", "kept"):
        L.seed_everything(5, verbose=False)
        module = Early(how)
        trainer(tempfile.gettempdir()).fit(module, loader(batch_size=own(8)))
        seen[how] = weights(module)
    return seen


def test_an_optimizer_made_before_the_swap_trains_the_layers():
    (alone,) = run_ranks(1, _early)
    for seen in (alone, *run_ranks(2, _early)):
        for name, value in seen["after"].items():
            assert torch.equal(seen["in init"][name], value) and torch.equal(seen["kept"][name], value), name
            assert torch.allclose(value, alone["after"][name], atol=1e-5), name


def test_optimizers_that_would_not_train_the_layers_are_refused(tmp_path):
    class Stepped(Early):
        def __init__(self):
            super().__init__("in init")
            self(torch.ones(2, 16)).sum().backward()
            self.made.step()

    with pytest.raises(PhantomError, match=r"has taken steps with the dense weight of 'net.0', and its state fits no"):
        one(tmp_path).fit(Stepped(), loader())

    class Foreign(Net):
        def configure_optimizers(self):
            return torch.optim.SGD([*Net().parameters()], lr=0.1)

    with pytest.raises(PhantomError, match="10 parameters that are not in the model"):
        one(tmp_path).fit(Foreign(), loader())

    class Part(Net):
        def configure_optimizers(self):
            return torch.optim.SGD([self.net[0].weight, self.net[0].bias, *self.tail.parameters()], lr=0.1)

    with pytest.raises(
        PhantomError, match=r"only a part of 'net.0': compressor_weight, decompressor_weight would never"
    ):
        one(tmp_path).fit(Part(), loader())


def test_a_second_trainer_and_a_second_run_keep_the_layers(tmp_path):
    module = Net()
    t = one(tmp_path)
    t.fit(module, loader())
    layer = module.net[0]
    t.validate(module, loader(), verbose=False)
    one(tmp_path).fit(module, loader())
    assert module.net[0] is layer
    with pytest.raises(PhantomError, match="phantom layer of 4 blocks on 1 ranks already"):
        one(tmp_path, strategy=PhantomStrategy(num_blocks=8)).fit(module, loader())


def test_nothing_qualifies_lists_why(tmp_path):
    class Plain(Net):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(16, 16)

    module = Plain()
    with pytest.raises(PlanError, match="nothing in Plain qualifies") as error:
        one(tmp_path).fit(module, loader())
    assert "tail.1" in str(error.value)
    assert type(module.net) is nn.Linear


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"phantom_width": 0}, "k must be at least 1"),
        ({"phantom_width": float("inf")}, "must lie in"),
        ({"num_blocks": 1}, "num_blocks=1"),
        ({"phantom_parallel_size": 0}, "phantom_parallel_size=0"),
        ({"timeout": 30}, "timeout=30"),
        ({"plan": {"*": "tp"}}, "'tp' is not a word"),
        ({"start_method": "spawn"}, "does not take start_method: ranks must be started as processes of their own"),
        ({"model_averaging_period": 2}, "does not take model_averaging_period"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(PhantomError, match=message):
        PhantomStrategy(**arguments)


def test_sizes():
    assert resolve_sizes("auto", None, 4, 2) == (4, 2, 4)
    assert resolve_sizes("auto", 6, 4, 2) == (2, 4, 6)
    assert resolve_sizes(2, 8, 4, 1) == (2, 2, 8)
    assert resolve_sizes(1, 8, 4, 1) == (1, 4, 8)
    for arguments, message in (
        (("auto", None, 1, 1), "Set num_blocks"),
        ((4, 2, 4, 1), "num_blocks=2 cannot be shared by phantom_parallel_size=4"),
        ((4, 6, 4, 1), "multiple of 4, or phantom_parallel_size to a divisor of 6"),
        ((3, 6, 4, 1), r"phantom_parallel_size=3 does not divide the 4 ranks there are \(1 nodes x 4 devices\)"),
        ((8, 8, 4, 1), "phantom_parallel_size=8 does not divide the 4 ranks"),
    ):
        with pytest.raises(PhantomError, match=message):
            resolve_sizes(*arguments)


def test_one_device_without_blocks_says_what_to_do(tmp_path):
    with pytest.raises(PhantomError, match="Set num_blocks"):
        one(tmp_path, strategy="phantom").fit(Net(), loader())


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
from training import Net, loader, trainer
import lightning as L
import lightning_phantom

if __name__ == "__main__":
    L.seed_everything(1)
    module = Net()
    t = trainer({folder!r}, devices=2, strategy="phantom", max_epochs=2)
    t.fit(module, loader(), loader())
    t.test(module, loader(), verbose=False)
    print(f"rank {{t.global_rank}} of {{t.world_size}} val_loss {{t.callback_metrics['val_loss']:.6f}}", flush=True)
"""


LAUNCHERS = {"subprocess": (), "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")}


def launched(folder, launcher):
    script = folder / "a script.py"
    script.write_text(textwrap.dedent(SCRIPT).format(here=str(Path(__file__).parent), folder=str(folder)))
    return program(*LAUNCHERS[launcher], script)


@pytest.mark.parametrize(
    "launcher", [pytest.param(name, marks=pytest.mark.program(launched, name)) for name in LAUNCHERS]
)
def test_launchers(outcome, launcher):
    lines = sorted(re.findall(r"rank \d of 2 val_loss [\d.]+", outcome))
    assert [line[:11] for line in lines] == ["rank 0 of 2", "rank 1 of 2"]
    assert len({line.partition("val_loss")[2] for line in lines}) == 1
    assert outcome.count("Phantom plan: 3 of 4 linears") == 1


def test_groups_of_ranks_that_have_parted_are_freed(tmp_path):
    """Every group of gloo's has threads of its own, which look for work a hundred times a second."""
    first = one(tmp_path)
    first.fit(Net(), loader(16))
    group = weakref.ref(first.strategy.mesh.groups[1])
    assert group() is not None
    del first
    dist.destroy_process_group()
    gc.collect()
    assert group() is None


def test_timeout_reaches_the_groups():
    quiet()
    assert PhantomStrategy(timeout=timedelta(seconds=90))._timeout == timedelta(seconds=90)
