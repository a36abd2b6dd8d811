"""The strategies' names in a program that imports nothing of this package, as a wheel in an environment of its own."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from types import ModuleType

import pytest
from programs import ENVIRONMENT, ROOT

import lightning_phantom_autoload

NET = """
import sys

import torch
import NAME as pl
from NAME.cli import LightningCLI
from NAME.demos.boring_classes import BoringModel

assert not [name for name in sys.modules if name.startswith("lightning_phantom.")]


class Net(BoringModel):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))


"""
TRAIN = """
trainer = pl.Trainer(strategy="phantom", accelerator="cpu", devices=2, fast_dev_run=2, enable_progress_bar=False)
trainer.fit(Net())
print(f"rank {trainer.global_rank} of {trainer.world_size}: {type(trainer.strategy).__name__}", flush=True)
"""
CLI = """
cli = LightningCLI(Net, save_config_callback=None)
print(f"{type(cli.trainer.strategy).__name__} of {cli.trainer.strategy.config.num_blocks} blocks")
"""
FIT = ("fit", "--trainer.strategy=phantom_4", "--trainer.accelerator=cpu", "--trainer.devices=1")
FIT += ("--trainer.fast_dev_run=2", "--trainer.enable_progress_bar=false")
BY_NAME = "import lightning as L; L.Trainer(strategy='phantom', accelerator='cpu', devices=1, logger=False)"


def environment(folder, wheel, *without):
    """An environment with the wheel and, of what these tests are run with, all but some packages; its Python."""
    venv.create(folder, symlinks=True, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    for path in {Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")}:
        for entry in path.iterdir():
            if not entry.name.startswith(("lightning_phantom", "__editable__", "_distutils", "distutils", *without)):
                (site / entry.name).symlink_to(entry)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    return python


def run(*arguments, **environment):
    clean = {key: value for key, value in ENVIRONMENT.items() if key != "COVERAGE_PROCESS_START"}
    clean["PYTHONPATH"] = str(ROOT / "tests" / "helpers" / "lean")  # and not the sources
    command = list(map(str, arguments))
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd="/", env={**clean, **environment})
    return ended.returncode, ended.stdout, ended.stderr


def from_the_wheel(folder):
    """What programs of an environment with the wheel end with and print."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "lightning_phantom_autoload.py"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "lightning_phantom", source / "lightning_phantom")
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    assert run(sys.executable, *build)[0] == 0, run(sys.executable, *build)
    (wheel,) = folder.glob("*.whl")
    for name in ("lightning.pytorch", "pytorch_lightning"):
        (folder / f"train_{name}.py").write_text(NET.replace("NAME", name) + TRAIN)
    (folder / "cli.py").write_text(NET.replace("NAME", "lightning.pytorch") + CLI)
    python = environment(folder / "with", wheel)
    lone = environment(folder / "without", wheel, "lightning", "pytorch_lightning")
    return {
        "lightning.pytorch": run(python, folder / "train_lightning.pytorch.py"),
        "pytorch_lightning": run(python, folder / "train_pytorch_lightning.py"),
        "cli": run(python, folder / "cli.py", *FIT),
        "switched off": run(python, "-c", BY_NAME, TORCH_DEVICE_BACKEND_AUTOLOAD="0"),
        "torch": run(python, "-c", "import torch"),
        "torch alone": run(lone, "-c", "import torch"),
        "Lightning": run(lone, "-c", "import torch, lightning"),
    }


tried = pytest.mark.program.with_args(from_the_wheel)


@tried
@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_the_name_alone_trains_on_two_ranks(outcome, name):
    code, printed, errors = outcome[name]
    assert code == 0, errors
    for rank in range(2):
        assert f"rank {rank} of 2: PhantomStrategy" in printed


@tried
def test_the_name_alone_in_a_plain_lightning_cli(outcome):
    code, printed, errors = outcome["cli"]
    assert code == 0, errors
    assert "PhantomStrategy of 4 blocks" in printed


@tried
def test_it_can_be_switched_off(outcome):
    code, _, errors = outcome["switched off"]
    assert code != 0
    assert "invalid strategy name: `strategy='phantom'`" in errors


@tried
def test_importing_torch_prints_nothing(outcome):
    """With Lightning and without."""
    assert outcome["torch"] == outcome["torch alone"] == (0, "", "")
    assert "No module named 'lightning'" in outcome["Lightning"][2]


def test_nothing_that_goes_wrong_is_heard(monkeypatch, capfd):
    for name in lightning_phantom_autoload._TO_DO:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))  # has no registry
    monkeypatch.setattr(sys, "meta_path", [])
    lightning_phantom_autoload.register()
    (finder,) = sys.meta_path
    assert finder.find_spec("lightning.pytorch.strategies", path=0) is None
    monkeypatch.setattr(sys, "meta_path", None)
    lightning_phantom_autoload.register()
    assert capfd.readouterr() == ("", "")
