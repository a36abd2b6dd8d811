"""The language model example: its text, its model, and the files that run it."""

from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from benchmarks import ablation, lm
from examples.lm import LanguageModel, Text
from examples.report import RunReport
from lightning_phantom import EnergyMonitor, PhantomConfig, PhantomStrategy, plan_phantom
from lightning_phantom.energy.report import FLAGS

ROOT = Path(__file__).parent.parent


def tiny(**kwargs):
    torch.manual_seed(0)
    return LanguageModel(**{**dict(dim=16, depth=2, heads=2, context=8, dropout=0.0), **kwargs})


def test_the_text_is_cut_into_windows_and_its_end_held_out(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(101)))
    data = Text(str(tmp_path / "text"), context=10, batch_size=4, held_out=0.4)
    data.setup("fit")
    tokens, following = data.train.tensors
    assert tokens.tolist() == [list(range(i, i + 10)) for i in range(0, 60, 10)][: len(tokens)]
    assert torch.equal(following, tokens + 1)
    held_out, _ = data.validation.tensors
    assert held_out.min() > following.max() and held_out.max() < 101
    assert [len(x) for x, _ in data.train_dataloader()] == [4]


def test_the_standard_library_is_the_same_text_every_time():
    first, second = Text(max_bytes=100_000), Text(max_bytes=100_000)
    first.setup("fit"), second.setup("fit")
    assert torch.equal(first.train.tensors[0], second.train.tensors[0])
    assert len(first.train) == (95_000 - 1) // 128


def test_a_missing_or_short_text_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"text='none.txt': there is no such file in .*"):
        Text("none.txt").setup("fit")
    (tmp_path / "short").write_bytes(b"x" * 1000)
    with pytest.raises(ValueError, match=r"1000 bytes give 7 windows of context=128 .* a smaller context"):
        Text(str(tmp_path / "short")).setup("fit")


def test_no_position_sees_what_comes_after_it():
    model = tiny().eval()
    tokens = torch.randint(256, (2, 8))
    changed = tokens.clone()
    changed[:, 5] += 1
    changed %= 256
    same = (model(tokens) == model(changed)).all(-1).all(0)
    assert same[:5].all() and not same[5:].any()


def test_the_feed_forward_networks_are_swapped_and_nothing_else():
    plan = plan_phantom(tiny(), PhantomConfig(num_blocks=2))
    assert [layer.name for layer in plan.swapped] == [
        f"blocks.{n}.mlp.{name}" for n in (0, 1) for name in ("up", "down")
    ]


def test_the_three_runs_differ_in_their_strategy_only():
    overlays = {
        name: yaml.safe_load((ROOT / f"examples/lm_{name}.yaml").read_text())
        for name in ("dense", "phantom", "tensor_parallel")
    }
    assert overlays == {
        "dense": {"trainer": {"devices": 1, "strategy": "auto"}},
        "phantom": {"trainer": {"devices": 2, "strategy": "phantom"}, "data": {"init_args": {"batch_size": 4}}},
        "tensor_parallel": {
            "trainer": {"devices": 2, "strategy": "tensor_parallel"},
            "data": {"init_args": {"batch_size": 4}},
        },
    }


def test_the_ablation_runs_resumes_and_draws(tmp_path, capsys):
    (tmp_path / "text").write_bytes(bytes(range(97, 123)) * 60)
    runs = tmp_path / "runs.csv"
    options = "--dim 8 --depth 1 --context 8 --batch-size 4 --steps 2 --blocks 2 --widths 0.5 --lrs 1e-3 1e-2".split()

    def run(*seeds):
        ablation.main([f"--csv={runs}", f"--text={tmp_path / 'text'}", *options, "--seeds", *seeds])
        return capsys.readouterr().out, runs.read_text().splitlines()

    table, rows = run("0")
    assert rows[0] == "method,p,k,lr,seed,weights,val_loss,steps,seconds"
    # Three models, two learning rates; the phantom model and its control have about as many weights.
    assert len(rows) == 7 and "| p = 2, k = 2 |" in table
    weights = {row.split(",")[0]: int(row.split(",")[5]) for row in rows[1:]}
    assert weights["phantom"] < weights["dense"] and abs(weights["phantom"] - weights["narrow"]) <= 2 * 8 + 1
    _, resumed = run("0", "1")
    # What was there stays; another seed runs at the best learning rate alone.
    assert resumed[:7] == rows and len(resumed) == 10
    best = {}
    for row in (row.split(",") for row in rows[1:]):
        best[row[0]] = min(best.get(row[0], row), row, key=lambda r: float(r[6]))
    assert {tuple(row.split(",")[i] for i in (0, 3)) for row in resumed[7:]} == {(m, r[3]) for m, r in best.items()}
    assert "phantom, p = 2" in (tmp_path / "runs.svg").read_text()


def test_reports_of_any_strategy_become_one_table(tmp_path, capsys):
    (tmp_path / "text").write_bytes(bytes(range(97, 123)) * 60)
    for method, strategy in ("dense", "auto"), ("phantom", PhantomStrategy(num_blocks=2)):
        data = Text(str(tmp_path / "text"), context=8, batch_size=4)
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            strategy=strategy,
            max_epochs=1,
            limit_train_batches=4,
            enable_model_summary=False,
            callbacks=[
                EnergyMonitor(print_table=False, warmup_steps=1),
                RunReport(beside=[str(tmp_path / "dense-0"), str(tmp_path / "none")]),
            ],
            logger=CSVLogger(tmp_path / f"{method}-0"),
            default_root_dir=tmp_path,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        trainer.fit(tiny(), data)
        shown = capsys.readouterr().out
        assert "LanguageModel: 4 steps on 1 rank" in shown and "validation bits per byte" in shown
        head = next(line for line in shown.splitlines() if line.startswith("┃") and "SingleDevice" in line)
        assert ("SingleDevice" in head, "Phantom" in head) == (True, method == "phantom")
    lines = lm.table(tmp_path, ["dense", "phantom", "tensor_parallel"], [0, 1]).splitlines()
    rows = {cells[0]: cells[1:] for cells in ([c.strip() for c in line.split("|")[1:-1]] for line in lines)}
    assert rows[""] == ["dense", "phantom", "tensor_parallel"]
    assert rows["steps"] == ["4", "4", "not run"] and rows["seeds"][:2] == ["1", "1"]
    dense, phantom = (int(cell.replace(",", "")) for cell in rows["weights per rank"][:2])
    assert dense == sum(p.numel() for p in tiny().parameters()) > phantom
    assert float(rows["validation loss, nats per byte"][0]) > 0
    assert all(rows[f"{part} energy"][0].split(", ")[-1] in FLAGS for part in ("GPU", "CPU", "RAM"))
