"""Lightning's two names: a program goes by either, and the package with it."""

import subprocess
import sys

import lightning.pytorch
import pytest
import pytorch_lightning
from programs import program

from lightning_phantom import PhantomStrategy
from lightning_phantom.errors import PhantomError
from lightning_phantom.framework import pl

NAMES = ("lightning.pytorch", "pytorch_lightning")
FIT = """
import sys
from importlib import import_module

import torch

name, folder, ours, strategy, devices = sys.argv[1:]
if ours == "first":
    import lightning_phantom
pl = import_module(name)
import_module(f"{name}.demos.boring_classes")
import lightning_phantom

theirs = {"lightning.pytorch", "pytorch_lightning"} - {name}


class Module(pl.demos.boring_classes.BoringModel):
    def __init__(self):
        super().__init__()
        wide = [torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU()]
        self.layer = torch.nn.Sequential(*wide, torch.nn.Linear(64, 2))

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)["loss"]


pl.seed_everything(1)
monitor = lightning_phantom.EnergyMonitor(print_table=False, output_dir=folder)
assert isinstance(monitor, pl.Callback)
trainer = pl.Trainer(
    strategy=lightning_phantom.PhantomStrategy(num_blocks=4) if strategy == "object" else strategy,
    **dict(accelerator="cpu", devices=int(devices), max_steps=4, limit_val_batches=2, num_sanity_val_steps=0),
    **dict(logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[monitor]),
    default_root_dir=folder,
)
assert isinstance(trainer.strategy, pl.strategies.DDPStrategy)
trainer.fit(module := Module())
assert monitor.report["total"]["duration_s"] > 0, monitor.report
path = f"{folder}/saved.ckpt"
trainer.save_checkpoint(path)
trainer.fit_loop.epoch_loop.max_steps = 6
trainer.fit(module, ckpt_path=path)
assert trainer.global_step == 6
assert not theirs & set(sys.modules), theirs
if trainer.is_global_zero:
    weight = torch.load(path, weights_only=True)["state_dict"]["layer.0.weight"]
    print("sum of the weights", weight.double().sum().item())
"""


def fit(folder, *arguments):
    (folder / "run.py").write_text(FIT)
    name, *rest = arguments
    printed = program(folder / "run.py", name, folder, *rest)
    return next(line for line in printed.splitlines() if "sum of the weights" in line)


def both_names(folder, *arguments):
    return [fit(folder, name, *arguments) for name in NAMES]


@pytest.mark.program.with_args(both_names, "last", "object", 1)
def test_a_program_of_either_name_trains_with_an_object(outcome):
    assert outcome[0] == outcome[1]


@pytest.mark.program.with_args(both_names, "first", "phantom", 2)
def test_a_program_of_either_name_trains_by_name_on_two_ranks(outcome):
    assert outcome[0] == outcome[1]


def test_a_program_that_mixes_the_names_is_told_so():
    assert pl is lightning.pytorch
    with pytest.raises(PhantomError, match="do not mix"):
        pytorch_lightning.Trainer(strategy="phantom", accelerator="cpu", devices=1, logger=False)
    with pytest.raises(ValueError, match=r"PhantomStrategy of lightning\.pytorch \(.* do not mix: import one of them"):
        pytorch_lightning.Trainer(strategy=PhantomStrategy(), accelerator="cpu", devices=1, logger=False)


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_trainer_settles_it(name):
    """Whatever else a program has imported."""
    code = f"""
import lightning.pytorch, pytorch_lightning, lightning_phantom
trainer = {name}.Trainer(strategy="phantom", accelerator="cpu", devices=1, logger=False)
assert isinstance(trainer.strategy, lightning_phantom.PhantomStrategy)
assert isinstance(trainer.strategy, {name}.strategies.DDPStrategy)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
