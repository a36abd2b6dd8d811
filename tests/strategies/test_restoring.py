"""A fit goes on in the order of DDP: hooks and states of callbacks come before optimizers and `on_fit_start`."""

import inspect
import re
import tempfile
from datetime import timedelta

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BaseFinetuning, Callback, StochasticWeightAveraging, Timer
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from ranks import run_ranks
from torch import nn
from training import Net, loader, own, trainer, weights

from lightning_phantom import PhantomLinear, PhantomStrategy
from lightning_phantom.errors import CheckpointError, PhantomError

FORMATS = ("full", "sharded")


def phantom(kind="full", **kwargs):
    return PhantomStrategy(num_blocks=4, state_dict_type=kind, **kwargs)


def folder_of_all():
    folder = [tempfile.mkdtemp()]
    if dist.is_initialized():
        dist.broadcast_object_list(folder, 0)
    return folder[0]


def fit(
    make, epochs, callbacks=(), ckpt_path=None, strategy=None, save=None, weights_only=None, dtype=torch.float32, **kw
):
    """Fit what `make` returns for so many epochs of 4 steps, and save."""
    L.seed_everything(3, verbose=False)
    module = make()
    t = trainer(tempfile.gettempdir(), strategy=strategy or phantom(), max_epochs=epochs, callbacks=[*callbacks], **kw)
    more = {} if weights_only is None else {"weights_only": weights_only}
    t.fit(module, loader(32, batch_size=own(8), dtype=dtype), ckpt_path=ckpt_path, **more)
    if save is not None:
        t.save_checkpoint(save)
    return t, module


def same(module, other):
    theirs = weights(other)
    return {name for name, tensor in weights(module).items() if not torch.equal(tensor, theirs[name])} == set()


def plain():
    return Net(dropout=0.0, lr=0.01, optimizer=torch.optim.AdamW)


# The order of hooks


class Order(Callback):
    """Notes what is called, and what the module's weights are by then."""

    def __init__(self):
        self.seen = []

    def state_dict(self):
        return {"kept": 1}

    def on_load_checkpoint(self, trainer, module, checkpoint):
        self.seen.append("callback on_load_checkpoint")

    def load_state_dict(self, state):
        self.seen.append("callback load_state_dict")

    def on_fit_start(self, trainer, module):
        self.seen.append("callback on_fit_start")


class Tells(Net):
    def on_load_checkpoint(self, checkpoint):
        self.trainer.callbacks[0].seen.append("on_load_checkpoint")
        self.shape = tuple(checkpoint["state_dict"]["net.0.weight"].shape)

    def on_fit_start(self):
        self.trainer.callbacks[0].seen.append("on_fit_start")

    def configure_optimizers(self):
        self.trainer.callbacks[0].seen.append("configure_optimizers")
        return super().configure_optimizers()


@pytest.mark.parametrize("strategy", ["ddp", phantom, lambda: phantom("sharded")], ids=["ddp", "full", "sharded"])
def test_the_order_is_that_of_ddp(tmp_path, strategy):
    make = strategy if callable(strategy) else lambda: strategy
    fit(Tells, 1, [Order()], strategy=make(), save=tmp_path / "a")
    order = Order()
    _, module = fit(Tells, 2, [order], tmp_path / "a", make())
    assert order.seen == [
        "on_load_checkpoint",
        "callback on_load_checkpoint",
        "callback load_state_dict",
        "configure_optimizers",
        "callback on_fit_start",
        "on_fit_start",
    ]
    if strategy in ("ddp", phantom):
        assert module.shape == (32, 16)  # a file is seen as it is


NOT_CALLED = {"configure_model", "configure_sharded_model"}  # what is not overridden


def tells(cls, seen):
    """`cls`, whose instances note which of their hooks are called."""

    def told(name):
        def call(self, *args, **kwargs):
            seen.append(f"{cls.__name__}.{name}")
            return getattr(super(telling, self), name)(*args, **kwargs)

        return call

    hooks = {name for base in (ModelHooks, CheckpointHooks, DataHooks, Callback) for name in dir(base)}
    own = {name for name in hooks if name[0] != "_" and callable(getattr(cls, name, None))} - NOT_CALLED
    telling = type(cls.__name__, (cls,), {name: told(name) for name in own})
    return telling


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return loader(16)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def hooks_of(strategy, folder):
    """Every hook of a program, in order: a fit, one that goes on, and what else reads its checkpoint."""
    seen = []
    module, data, callback = (tells(cls, seen) for cls in (Net, Data, Callback))
    options = {"num_sanity_val_steps": 1, "gradient_clip_val": 1.0}
    t = trainer(folder, strategy=strategy(), callbacks=[callback()], **options)
    t.fit(module(), datamodule=data())
    t.save_checkpoint(folder / "a")
    for n, run in enumerate(("fit", "validate", "test", "predict")):
        t = trainer(folder, strategy=strategy(), callbacks=[callback()], max_epochs=2, **options)
        seen.append(f"-- {n}: {run}")
        getattr(t, run)(module(), datamodule=data(), ckpt_path=folder / "a")
    return seen


def test_every_hook_comes_when_it_does_under_ddp(tmp_path):
    seen = hooks_of(phantom, tmp_path)
    assert seen == hooks_of(lambda: "ddp", tmp_path) and len(seen) > 200


class Odd:
    """What torch does not load with weights_only."""


class HoldsOdd(Net):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["odd"] = Odd()

    def on_load_checkpoint(self, checkpoint):
        assert isinstance(checkpoint["odd"], Odd)


@pytest.mark.skipif(
    "weights_only" not in inspect.signature(L.Trainer.fit).parameters, reason="Lightning 2.5 has no such argument"
)
@pytest.mark.parametrize("kind", FORMATS)
def test_fit_obeys_weights_only(tmp_path, kind):
    fit(HoldsOdd, 1, strategy=phantom(kind), save=tmp_path / "a")
    with pytest.raises(CheckpointError, match="cannot be read"):
        fit(HoldsOdd, 2, ckpt_path=tmp_path / "a", weights_only=True)
    t, _ = fit(HoldsOdd, 2, ckpt_path=tmp_path / "a", weights_only=False)
    assert t.current_epoch == 2
    if kind == "full":
        t.validate(HoldsOdd(), loader(), ckpt_path=tmp_path / "a", weights_only=False, verbose=False)


# Callbacks that decide by their state before the first step


class Thaws(BaseFinetuning):
    def freeze_before_training(self, module):
        self.freeze(module.net)

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.net, optimizer, lr=0.05)


class Freezable(Net):
    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def frozen():
    return Freezable(dropout=0.0, lr=0.01)


class Thawed(Callback):
    """What a resumed fit finds frozen, and Lightning leaves so."""

    def on_train_start(self, trainer, module):
        if trainer.current_epoch > 1:
            BaseFinetuning.make_trainable(module.net)


def thaw(kind):
    folder = folder_of_all()
    path = f"{folder}/a"
    whole = fit(frozen, 3, [Thaws(), Thawed()], strategy=phantom(kind))[1]
    fit(frozen, 2, [Thaws(), Thawed()], strategy=phantom(kind), save=path)
    t, resumed = fit(frozen, 3, [Thaws(), Thawed()], path, phantom(kind))
    return same(whole, resumed), [len(group["params"]) for group in t.optimizers[0].param_groups]


@pytest.mark.parametrize("kind", FORMATS)
def test_finetuning_resumes_after_the_thaw(kind):
    assert thaw(kind) == (True, [4, 12])


class Scheduled(Net):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.9**n)]


def scheduled():
    return Scheduled(dropout=0.0, lr=0.01, optimizer=torch.optim.SGD)


def averaged(kind="full"):
    path = f"{folder_of_all()}/a"

    def swa():
        return StochasticWeightAveraging(0.02, swa_epoch_start=1, annealing_epochs=2)

    whole = fit(scheduled, 5, [swa()], strategy=phantom(kind))[1]
    fit(scheduled, 5, [swa(), SaveAfter(3, path)], strategy=phantom(kind))
    t, resumed = fit(scheduled, 5, [swa()], path, phantom(kind))
    return same(whole, resumed), t.optimizers[0].param_groups[0]["lr"]


class SaveAfter(Callback):
    def __init__(self, epochs, path):
        self.epochs, self.path = epochs, path

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch + 1 == self.epochs:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("kind", FORMATS)
def test_stochastic_weight_averaging_with_a_lambda_schedule_resumes(kind):
    is_same, lr = averaged(kind)
    assert is_same and lr == pytest.approx(0.02)


def test_a_timer_that_has_run_out_ends_the_fit_before_its_first_step(tmp_path):
    timer = Timer(timedelta(seconds=30))
    fit(plain, 1, [timer], save=tmp_path / "a")
    saved = torch.load(tmp_path / "a", weights_only=True)
    saved["callbacks"][timer.state_key]["time_elapsed"]["train"] = 31.0
    torch.save(saved, tmp_path / "a")
    _, module = fit(plain, 9, [Timer(timedelta(seconds=30))], tmp_path / "a")
    assert module.losses == []


# Layers that are rebuilt or made late


class Grows(Net):
    """Rebuilds its head and a layer of its feed-forward network as the checkpoint has them."""

    def __init__(self, classes=5, width=32, **kwargs):
        super().__init__(dropout=0.0, lr=0.01, optimizer=torch.optim.AdamW, **kwargs)
        self.build(classes, width)

    def build(self, classes, width):
        self.tail[1] = nn.Linear(16, classes)
        self.net[0], self.net[3] = nn.Linear(16, width), nn.Linear(width, 32)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["sizes"] = self.tail[1].out_features, self.net[0].out_features

    def on_load_checkpoint(self, checkpoint):
        self.build(*checkpoint["sizes"])


def wide():
    return Grows(7, 64)


def rebuilt(kind):
    path = f"{folder_of_all()}/a"
    whole = fit(wide, 2, strategy=phantom(kind))[1]
    fit(wide, 1, strategy=phantom(kind), save=path)
    t, resumed = fit(Grows, 2, ckpt_path=path, strategy=phantom(kind))
    held = {id(p) for group in t.optimizers[0].param_groups for p in group["params"]}
    layers = [type(resumed.net[n]) for n in (0, 3, 6)]
    t.predict(module := Grows(), loader(), ckpt_path=path)
    return same(whole, resumed), held == {id(p) for p in resumed.parameters()}, layers, module.net[0].out_features


@pytest.mark.parametrize("kind", FORMATS)
def test_layers_rebuilt_in_on_load_checkpoint(kind):
    assert rebuilt(kind) == (True, True, [PhantomLinear] * 3, 64)


class Rebuilds(Net):
    """Builds one layer anew, of the same sizes."""

    def on_load_checkpoint(self, checkpoint):
        shape = checkpoint["state_dict"]["net.3.bias"].shape
        self.net[3] = nn.Linear(32, 32)
        self.shape = shape


@pytest.mark.parametrize("kind", FORMATS)
def test_one_layer_of_a_network_rebuilt(tmp_path, kind):
    def make():
        return Rebuilds(dropout=0.0, lr=0.01, optimizer=torch.optim.AdamW)

    whole = fit(make, 2, strategy=phantom(kind))[1]
    fit(make, 1, strategy=phantom(kind), save=tmp_path / "a")
    t, resumed = fit(make, 2, ckpt_path=tmp_path / "a", strategy=phantom(kind))
    assert same(whole, resumed)
    assert [layer.decision for layer in t.strategy.plan.layers] == ["phantom"] * 3 + ["skip"]


class Late(Net):
    """Makes its network where `where` says."""

    where = "setup"

    def __init__(self, **kwargs):
        super().__init__(dropout=0.0, lr=0.01, optimizer=torch.optim.AdamW, **kwargs)
        self.net = None

    def build(self, device):
        if self.net is None:
            with torch.device(device):
                self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

    def setup(self, stage):
        if self.where == "setup":
            self.build("cpu")

    def configure_model(self):
        if self.where != "setup":
            self.build(self.where)


class LateOnCpu(Late):
    where = "cpu"


class LateOnMeta(Late):
    where = "meta"


def late(make, kind, precision="32-true", dtype=torch.float32):
    path, more = f"{folder_of_all()}/a", {"precision": precision, "dtype": dtype}
    whole = fit(make, 2, strategy=phantom(kind), **more)[1]
    fit(make, 1, strategy=phantom(kind), save=path, **more)
    t, resumed = fit(make, 2, ckpt_path=path, strategy=phantom(kind), **more)
    t.save_checkpoint(path)
    found = []
    for run in ("validate", "test"):
        module = make()
        t = trainer(tempfile.gettempdir(), strategy=phantom(kind), precision=precision)
        getattr(t, run)(module, loader(dtype=dtype), ckpt_path=path, verbose=False)
        found.append(same(resumed, module))
    return same(whole, resumed), *found


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("make", [plain, Late, LateOnCpu, LateOnMeta])
def test_late_layers_resume(make, kind):
    assert late(make, kind) == (True, True, True)


@pytest.mark.parametrize("kind", FORMATS)
def test_double_precision_resumes_without_a_loss(kind):
    assert late(plain, kind, "64-true", torch.float64) == (True, True, True)


def several():
    return {
        "thaw": [thaw(kind) for kind in FORMATS],
        "average": [averaged(kind) for kind in FORMATS],
        "rebuilt": [rebuilt(kind) for kind in FORMATS],
        "late": [late(make, kind) for make in (Late, LateOnMeta) for kind in FORMATS],
    }


def test_on_two_ranks():
    for seen in run_ranks(2, several):
        assert seen["thaw"] == [(True, [4, 12])] * 2
        assert [is_same for is_same, _ in seen["average"]] == [True] * 2
        assert seen["rebuilt"] == [(True, True, [PhantomLinear] * 3, 64)] * 2
        assert seen["late"] == [(True, True, True)] * 4


# What a hook does with the weights it is shown counts


class Edits(Net):
    edit = None

    def on_load_checkpoint(self, checkpoint):
        self.edit(checkpoint["state_dict"])


def edited(tmp_path, edit):
    exact = {"phantom_width": 10**6, "plan": {"net.*": "phantom"}}  # every dense weight has its factors
    fit(plain, 1, save=tmp_path / "a", strategy=phantom(**exact))
    module = Edits(dropout=0.0)
    module.edit = edit
    trainer(tmp_path, strategy=phantom(**exact), devices=1).validate(
        module, loader(), ckpt_path=tmp_path / "a", verbose=False
    )
    return module, torch.load(tmp_path / "a", weights_only=True)["state_dict"]


def test_weights_changed_in_on_load_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("training.quiet", lambda: None)

    def double(state):
        state["net.0.weight"] *= 2
        state["net.3.bias"] = state["net.3.bias"] + 1

    with pytest.warns(UserWarning, match="'net.0.weight' was changed after it was read"):
        module, saved = edited(tmp_path, double)
    assert torch.allclose(module.net[0].dense_weight(), 2 * saved["net.0.weight"], atol=1e-5)
    assert torch.equal(module.net[0].bias, saved["net.0.bias"])
    assert torch.equal(module.net[3].bias, saved["net.3.bias"] + 1)
    assert torch.allclose(module.net[3].dense_weight(), saved["net.3.weight"], atol=1e-5)


def test_weights_taken_out_in_on_load_checkpoint(tmp_path):
    with pytest.raises(RuntimeError, match=re.escape('Missing key(s) in state_dict: "net.0.weight"')):
        edited(tmp_path, lambda state: state.pop("net.0.weight"))


def test_copies_made_before_a_layer_was_rebuilt_are_refused(tmp_path):
    fit(wide, 1, save=tmp_path / "a")
    with pytest.raises(PhantomError, match="copied the model before all of its layers were swapped"):
        fit(Grows, 2, [StochasticWeightAveraging(0.02)], tmp_path / "a")
