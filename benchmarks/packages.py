"""Other packages' models and loops, unchanged, under the default strategy and under phantom, on one and two ranks.

    python benchmarks/packages.py [--only darts chemprop pytorch_forecasting] [--folder FOLDER]

Each package is installed, with a wheel of this one, into an environment of its own in the folder (a temporary one
without the option), under this repository's constraints for torch and Lightning. Prints the last training loss of each
run. Nothing imports lightning_phantom: the strategies' names are all that a package is given.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINNED = ("torch", "lightning", "pytorch-lightning", "torchmetrics")
RUNS = (("auto", 1), ("phantom_4", 1), ("ddp", 2), ("phantom", 2))

COMMON = """
import sys, warnings
warnings.filterwarnings("ignore")
import numpy as np
which, strategy, devices = sys.argv[1], sys.argv[2], int(sys.argv[3])
options = dict(accelerator="cpu", devices=devices, strategy=strategy, logger=False, enable_checkpointing=False)
options |= dict(enable_progress_bar=False, enable_model_summary=False)
t = np.arange(400)
wave = np.sin(t / 7) + 0.3 * np.sin(t / 3)
"""
DARTS = """
from darts import TimeSeries
from darts.models import NBEATSModel, TiDEModel, TransformerModel

if which == "Transformer" and devices == 2:  # its buffer overlaps itself, which DDP's broadcast refuses, too
    import pytorch_lightning, lightning_phantom
    made = {"ddp": pytorch_lightning.strategies.DDPStrategy, "phantom": lightning_phantom.PhantomStrategy}[strategy]
    options["strategy"] = made(broadcast_buffers=False)
kwargs = dict(input_chunk_length=24, output_chunk_length=8, n_epochs=3, random_state=1, pl_trainer_kwargs=options)
model = {
    "NBEATS": lambda: NBEATSModel(num_stacks=2, num_blocks=1, num_layers=2, layer_widths=64, **kwargs),
    "TiDE": lambda: TiDEModel(hidden_size=64, **kwargs),
    "Transformer": lambda: TransformerModel(
        d_model=32, nhead=4, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=128, **kwargs
    ),
}[which]()
model.fit(TimeSeries.from_values(wave.astype(np.float32)))
trainer = model.trainer
"""
FORECASTING = """
import lightning.pytorch as pl
import pandas as pd
from pytorch_forecasting import TimeSeriesDataSet, models
from pytorch_forecasting.metrics import MAE

pl.seed_everything(1, verbose=False)
frame = pd.DataFrame({"t": np.tile(t, 2), "g": np.repeat(["a", "b"], 400), "y": np.concatenate([wave, np.cos(t / 5)])})
known = ["t"] if which in ("DecoderMLP", "TiDE") else []
lengths = dict(max_encoder_length=24, min_encoder_length=24, max_prediction_length=8, min_prediction_length=8)
reals = dict(time_varying_unknown_reals=["y"], time_varying_known_reals=known)
data = TimeSeriesDataSet(frame, time_idx="t", target="y", group_ids=["g"], **lengths, **reals)
model = {
    "NHiTS": lambda: models.NHiTS.from_dataset(data, hidden_size=64, loss=MAE()),
    "NBeats": lambda: models.NBeats.from_dataset(data, widths=[64, 128], backcast_loss_ratio=0.1),
    "TiDE": lambda: models.TiDEModel.from_dataset(data, hidden_size=64, loss=MAE()),
    "DecoderMLP": lambda: models.DecoderMLP.from_dataset(data, hidden_size=64, n_hidden_layers=2, loss=MAE()),
}[which]()
trainer = pl.Trainer(max_epochs=2, gradient_clip_val=0.1, **options)
trainer.fit(model, data.to_dataloader(train=True, batch_size=32, num_workers=0))
"""
CHEMPROP = """
import lightning.pytorch as pl
from chemprop import data, models, nn

pl.seed_everything(1, verbose=False)
smiles = ["C" * n + end for n in range(1, 17) for end in ("O", "N", "Cl", "C(=O)O", "c1ccccc1", "Br", "F", "C#N")]
sizes = np.array([[float(len(s))] for s in smiles])
sizes = (sizes - sizes.mean()) / sizes.std()
molecules = [data.MoleculeDatapoint.from_smi(s, y) for s, y in zip(smiles, sizes)]
ffn = nn.RegressionFFN(input_dim=64, hidden_dim=64, n_layers=2)
trainer = pl.Trainer(max_epochs=4, **options)
loader = data.build_dataloader(data.MoleculeDataset(molecules), batch_size=16, num_workers=0)
trainer.fit(models.MPNN(nn.BondMessagePassing(d_h=64), nn.MeanAggregation(), ffn), loader)
"""
REPORT = """
if trainer.is_global_zero:
    print("LOSS", float(trainer.callback_metrics["train_loss"]), flush=True)
"""
PACKAGES = {
    "darts": (DARTS, ("NBEATS", "TiDE", "Transformer")),
    "pytorch_forecasting": (FORECASTING, ("NHiTS", "NBeats", "TiDE", "DecoderMLP")),
    "chemprop": (CHEMPROP, ("MPNN",)),
}


def install(package: str, folder: Path) -> Path:
    """The Python of an environment with the package and this one."""
    python = folder / package / "bin" / "python"
    if not python.exists():
        venv.create(folder / package, with_pip=True)
    constraints = folder / "constraints.txt"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints.write_text("\n".join(line for line in lines if line.split("==")[0] in PINNED))
    pip = (python, "-m", "pip", "install", "--quiet", "--constraint", constraints)
    subprocess.run([*pip, package.replace("_", "-"), ROOT], check=True)
    return python


def loss(python: Path, script: Path, *arguments: object) -> float:
    """The last training loss of a run."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [str(part) for part in (python, script, *arguments)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=script.parent, env=environment)
    found = re.search(r"^LOSS (\S+)$", run.stdout, re.MULTILINE)
    if found is None:
        sys.exit(f"{' '.join(command)}:\n{run.stdout}\n{run.stderr}")
    return float(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PACKAGES, default=list(PACKAGES), metavar="PACKAGE")
    parser.add_argument("--folder", type=Path, help="keeps the environments, for the next time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{'training loss':<34}" + "".join(f"{f'{strategy}, {n}':>14}" for strategy, n in RUNS))
        for package in options.only:
            code, models = PACKAGES[package]
            python, script = install(package, folder), folder / f"train_{package}.py"
            script.write_text(COMMON + code + REPORT)
            for model in models:
                losses = [loss(python, script, model, *run) for run in RUNS]
                print(f"{package + ', ' + model:<34}" + "".join(f"{value:>14.4f}" for value in losses), flush=True)


if __name__ == "__main__":
    main()
