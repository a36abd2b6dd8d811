"""What calibration saves of the loss that a conversion costs: the language model of examples/lm.py, on one process.

    python -m benchmarks.calibration                        # trains a dense model first
    python -m benchmarks.calibration --checkpoint dense.ckpt

For every number of blocks p and width k, a share of the block width, the dense model is converted from its weights
alone and with calibration on training batches; nothing is trained after. Loss is the mean over the held-out text in
nats per byte. "saved" is the share of the plain conversion's increase over dense that calibration takes away, if it
increased. Writes a CSV.
"""

import argparse
import csv
import logging
import tempfile
import warnings
from pathlib import Path

import lightning as L
import torch

from examples.lm import LanguageModel, Text
from lightning_phantom import PhantomConfig, plan_phantom
from lightning_phantom.conversion.calibration_run import CalibrationRun
from lightning_phantom.conversion.to_phantom import to_phantom

COLUMNS = ("p", "k", "weights", "dense", "plain", "calibrated", "saved")


def trainer(**options):
    quiet = dict(logger=False, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False)
    return L.Trainer(accelerator="cpu", devices=1, **quiet, **options)


def held_out_loss(model, state, data):
    model.load_state_dict(state)
    (result,) = trainer().validate(model, datamodule=data, verbose=False)
    return result["val_loss"]


def compare(model, data, blocks, shares, batches):
    """Yield one row per p and k."""
    dense = {"state_dict": {key: value.clone() for key, value in model.state_dict().items()}}
    calibration = CalibrationRun(trainer(), model, data, batches)
    moments = None
    before = held_out_loss(model, dense["state_dict"], data)
    for p in blocks:
        for share in shares:
            # A wide k does not shrink every layer; they are named, so that all widths convert the same ones.
            config = PhantomConfig(p, share, plan={"blocks.*.mlp.*": "phantom"})
            plan = plan_phantom(model, config)
            if moments is None:  # the same layers and inputs each time
                moments = calibration([layer.name for layer in plan.swapped])
            with tempfile.TemporaryDirectory() as folder:
                losses = []
                for statistics in (None, lambda names, seen=moments: seen):
                    converted, report = to_phantom(dense, plan, Path(folder), statistics)
                    losses.append(held_out_loss(model, converted["state_dict"], data))
                    model.load_state_dict(dense["state_dict"])
            plain, calibrated = losses
            weights = report.weights_after / report.weights_before
            saved = (plain - calibrated) / (plain - before) if plain > before else None
            yield dict(zip(COLUMNS, (p, report.layers[0].phantom_width, weights, before, *losses, saved), strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="of examples.lm.LanguageModel; None trains one")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6000, help="of dense training")
    parser.add_argument("--max-bytes", type=int, default=2_000_000, help="of text")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.125, 0.25, 0.5], help="k / block width")
    parser.add_argument("--batches", type=int, default=32, help="to calibrate with")
    parser.add_argument("--csv", type=Path, default=Path("outputs/calibration.csv"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)

    if options.checkpoint is None:
        model = LanguageModel(options.dim, options.depth, context=options.context)
        data = Text(context=options.context, max_bytes=options.max_bytes)
        trainer(max_steps=options.steps, limit_val_batches=0).fit(model, datamodule=data)
    else:
        model = LanguageModel.load_from_checkpoint(options.checkpoint, map_location="cpu")
        data = Text(context=model.hparams.context, max_bytes=options.max_bytes)

    options.csv.parent.mkdir(parents=True, exist_ok=True)
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        print("| p | k | weights | dense | plain | calibrated | saved |\n|---|---|---|---|---|---|---|")
        for row in compare(model, data, options.blocks, options.shares, options.batches):
            writer.writerow(row)
            file.flush()
            losses = " | ".join(f"{row[key]:.4f}" for key in ("dense", "plain", "calibrated"))
            saved = "-" if row["saved"] is None else f"{row['saved']:.0%}"
            print(f"| {row['p']} | {row['k']} | {row['weights']:.2f} | {losses} | {saved} |", flush=True)


if __name__ == "__main__":
    main()
