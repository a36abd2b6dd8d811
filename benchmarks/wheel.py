"""The wheel in environments of its own: other Pythons, other releases of Lightning, nothing else of this repository.

    python benchmarks/wheel.py --pythons python3.10 python3.11 python3.12 python3.13 --lightning 2.6.6
    python benchmarks/wheel.py --pythons python3.11 --lightning 2.5.6 2.6.6 --folder /tmp/environments

In each environment: the demo on two ranks, `strategy="phantom"` without an import of the package under both names of
Lightning, and a checkpoint that the plain module loads after the package is uninstalled. Exit code 1 if one fails.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
TORCH = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))

MODULE = """
import torch
import PL as pl

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())
"""
FIT = """
data = torch.utils.data.TensorDataset(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)))
trainer = pl.Trainer(strategy="phantom", accelerator="cpu", devices=2, max_epochs=1, logger=False,
                     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer.fit(model := Net(), torch.utils.data.DataLoader(data, batch_size=8))
trainer.save_checkpoint("trained.ckpt")
"""
LOAD = """
import importlib.util
assert importlib.util.find_spec("lightning_phantom") is None
weight = Net.load_from_checkpoint("trained.ckpt").net[0].weight
assert weight.shape == (64, 32) and weight.isfinite().all()
"""


def programs(folder: Path) -> dict[str, list[str]]:
    """What is run in an environment, in order: arguments of its Python."""
    made: dict[str, list[str]] = {}
    for package in ("lightning.pytorch", "pytorch_lightning"):
        for what, code in (("fit", FIT), ("load", LOAD)):
            (folder / f"{what}_{package}.py").write_text(MODULE.replace("PL", package) + code)
        made[f"the name alone, {package}"] = [f"fit_{package}.py"]
    demo = "-m lightning_phantom fit --config examples/digits.yaml --trainer.max_epochs 2"
    return {
        "the demo": demo.split(),
        **made,
        "uninstalled": "-m pip uninstall --quiet --yes lightning-phantom".split(),
        "its checkpoint without the package": ["load_pytorch_lightning.py"],
    }


def attempt(python: Path, wheel: Path, lightning: str, folder: Path) -> dict[str, str]:
    """What became of each program: "works", or the end of what it printed."""
    pip = [python, "-m", "pip", "install", "--quiet"]
    wanted = [f"{wheel}[demo]", TORCH, f"lightning=={lightning}", f"pytorch-lightning=={lightning}"]
    installed = subprocess.run([*pip, *wanted], capture_output=True, text=True)
    if installed.returncode:
        return {"installed": installed.stderr[-2000:]}
    shutil.copytree(ROOT / "examples", folder / "examples", dirs_exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    became = {}
    for name, arguments in programs(folder).items():
        command = [str(python), *arguments]
        run = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
        became[name] = "works" if run.returncode == 0 else (run.stdout + run.stderr)[-2000:]
    return became


def main() -> None:
    """Build the wheel, try it everywhere, and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", nargs="+", default=[sys.executable], help="commands (default: this one)")
    parser.add_argument("--lightning", nargs="+", default=["2.6.6"], help="releases (default: 2.6.6)")
    parser.add_argument("--folder", type=Path, help="keeps the environments, for the next time")
    args = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", temporary, ROOT]
        subprocess.run(build, check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        for which, lightning in tqdm([(p, release) for p in args.pythons for release in args.lightning]):
            home = folder / f"{Path(which).parent.parent.name or ''}{Path(which).name}-{lightning}"
            python = home / "bin" / "python"
            if not python.exists():
                subprocess.run([which, "-m", "venv", home], check=True)
            became = attempt(python, wheel, lightning, home)
            failures += sum(word != "works" for word in became.values())
            version = subprocess.check_output([python, "--version"], text=True).strip()
            tqdm.write(f"{version}, Lightning {lightning}: " + "; ".join(f"{k}: {v}" for k, v in became.items()))
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
