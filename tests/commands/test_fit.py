"""`lightning-phantom fit`: what a config and the command line give to a run, beside the model."""

import warnings

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import nn
from training import loader, weights

from lightning_phantom.commands.cli import main

ENDED = []  # trainers of the fits that have ended


class Plain(L.LightningModule):
    """Has no optimizer of its own, but data."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.head(self.norm(self.net(batch[0]))), batch[1])
        self.log("loss", loss)
        return loss

    def train_dataloader(self):
        return loader(48)

    def on_train_end(self):
        ENDED.append(self.trainer)


class Direct(Plain):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def fit(folder, *arguments, strategy="phantom_4", **config):
    """The trainer of a fit by config and command line."""
    trainer = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "strategy": strategy, "logger": False}
    trainer |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(folder)}
    trainer |= config.pop("trainer", {})
    (folder / "run.yaml").write_text(yaml.safe_dump({"seed_everything": 3, "trainer": trainer, **config}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(["fit", "--config", str(folder / "run.yaml"), *arguments])
    return ENDED.pop()


def assert_same(one, other):
    one, other = weights(one.lightning_module), weights(other.lightning_module)
    assert all(torch.equal(value, other[name]) for name, value in one.items()) and one.keys() == other.keys()


def test_optimizer_and_schedule_come_from_yaml_or_the_command_line(tmp_path):
    direct = fit(tmp_path, model="test_fit.Direct")
    yaml_ = fit(
        tmp_path,
        model="test_fit.Plain",
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        lr_scheduler={"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.5}},
    )
    line = fit(
        tmp_path,
        *("--model", "test_fit.Plain", "--optimizer", "AdamW", "--optimizer.lr=0.01"),
        *("--lr_scheduler", "StepLR", "--lr_scheduler.step_size=1", "--lr_scheduler.gamma=0.5"),
    )
    for trainer in (yaml_, line):
        assert type(trainer.optimizers[0]) is torch.optim.AdamW
        assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0025
        assert_same(direct, trainer)


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_plugins_beside_a_strategy_of_the_config(tmp_path, kind):
    """A fit that goes on from what was written in the background equals one that was never interrupted."""
    config = {
        "model": "test_fit.Direct",
        "strategy": {
            "class_path": "lightning_phantom.PhantomStrategy",
            "init_args": {"num_blocks": 4, "state_dict_type": kind, "weights_only": True},
        },
    }
    saver = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
    saver["init_args"]["dirpath"] = str(tmp_path / "saved")
    plugged = {"callbacks": [saver], "plugins": [{"class_path": "lightning.pytorch.plugins.io.AsyncCheckpointIO"}]}
    whole = fit(tmp_path, **config, trainer={"max_epochs": 4, "enable_checkpointing": False})
    half = fit(tmp_path, **config, trainer=plugged)
    assert isinstance(half.strategy.checkpoint_io, AsyncCheckpointIO)
    resumed = fit(tmp_path, f"--ckpt_path={tmp_path}/saved/last.ckpt", **config, trainer=plugged | {"max_epochs": 4})
    assert resumed.global_step == 24
    assert_same(whole, resumed)


def test_unknown_arguments_of_a_strategy_in_a_config_are_named(tmp_path, capsys):
    def strategy(where):
        return {"class_path": "lightning_phantom.PhantomStrategy", where: {"phantom_widht": 4}}

    with pytest.raises(SystemExit):
        fit(tmp_path, strategy=strategy("init_args"), model="test_fit.Direct")
    assert "Option 'phantom_widht' is not accepted" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"has no argument 'phantom_widht'.* Did you mean 'phantom_width'"):
        fit(tmp_path, strategy=strategy("dict_kwargs"), model="test_fit.Direct")
