"""EnergyMonitor: sums of a scripted meter, honest flags, failures that stay harmless, and codecarbon itself."""

import copy
import csv
import inspect
import io
import itertools
import json
import logging
import os
import pickle
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from ranks import run_ranks
from rich.console import Console
from torch.utils.data import DataLoader

from lightning_phantom.energy import fit as energy_fit
from lightning_phantom.energy import meter as energy_meter
from lightning_phantom.energy import report as energy_report
from lightning_phantom.energy import show as energy_show
from lightning_phantom.energy.cards import Card
from lightning_phantom.energy.monitor import EnergyMonitor
from lightning_phantom.energy.report import Device, Energy, RankRecord
from lightning_phantom.errors import PhantomError

TRAIN, VALIDATION, OTHER = Energy(2.0, 300.0, 40.0, 10.0), Energy(1.0, 70.0, 8.0, 5.0), Energy(0.5, 11.0, 3.0, 1.0)
ON_GPU = Device("a GPU", is_accelerator=True, address="GPU-of-a-test")


def joules(energy, gpu=False):
    return energy.cpu_j + energy.ram_j + gpu * energy.gpu_j


class Bench:
    """A replay meter: the tracker's counters stand still but for what the module under test spends on them."""

    def __init__(self, fail_at=None, husk=False, parts=None, g_per_kwh=56.0):
        self.total = Energy()
        self.fail_at, self.husk, self.parts, self.g_per_kwh = fail_at, husk, parts, g_per_kwh
        self.calls, self.options = [], None

    def __call__(self, **options):
        self._note("constructor")
        self.options, self.sink = options, options["output_handlers"][0]
        if self.parts is not None:
            self._hardware = self.parts
        return self

    def spend(self, energy):
        self.total += energy

    def start(self):
        self._note("start")

    def stop(self):
        self._note("stop")

    def flush(self):
        self._note("flush")
        if not self.husk:
            total_kwh = (self.total.gpu_j + self.total.cpu_j + self.total.ram_j) / 3.6e6
            data = SimpleNamespace(
                duration=self.total.duration_s,
                gpu_energy=self.total.gpu_j / 3.6e6,
                cpu_energy=self.total.cpu_j / 3.6e6,
                ram_energy=self.total.ram_j / 3.6e6,
                energy_consumed=total_kwh,
                emissions=total_kwh * self.g_per_kwh / 1000,
            )
            self.sink.out(data, data)

    def _note(self, call):
        self.calls.append(call)
        if self.fail_at == call or self.fail_at == (call, self.calls.count(call)):
            raise OSError(f"{call} is broken")


class Module(pl.LightningModule):
    """Spends TRAIN per training step, VALIDATION per validation step, OTHER when an epoch is over."""

    def __init__(self, bench=None, step=None):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)
        self.bench, self.step = bench, step

    def _spend(self, energy):
        if self.bench is not None:
            self.bench.spend(energy)

    def training_step(self, batch, batch_idx):
        self._spend(TRAIN)
        if self.step is not None:
            self.step(self)
        return self.layer(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self._spend(VALIDATION)

    def test_step(self, batch, batch_idx):
        self._spend(VALIDATION)

    def on_train_epoch_end(self):
        self._spend(OTHER)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(batches=4, batch_size=2):
    return DataLoader(torch.arange(4.0 * batches * batch_size).reshape(-1, 4) / 100, batch_size=batch_size)


def make_trainer(tmp_path, monitor=None, **kwargs):
    settings = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": tmp_path,
        "callbacks": [] if monitor is None else [monitor],
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    return pl.Trainer(**(settings | kwargs))


def fit(tmp_path, bench, monitor=None, batches=4, step=None, validate=True, trainer_kwargs=None, **kwargs):
    """Fit a seeded module under a monitor on the bench; returns the monitor, the trainer and the module."""
    torch.manual_seed(0)
    module = Module(bench, step)
    monitor = monitor or EnergyMonitor(tracker_factory=bench, warmup_steps=1, **kwargs)
    trainer = make_trainer(tmp_path, monitor, **(trainer_kwargs or {}))
    trainer.fit(module, loader(batches), loader(3) if validate else None)
    return monitor, trainer, module


@pytest.fixture(autouse=True)
def no_threads_left():
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 10
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(energy_fit, "describe_device", lambda device: ON_GPU)
    monkeypatch.setattr(energy_fit, "find_cards", lambda devices: [Card((3,))])


# --- what is measured -------------------------------------------------------------------------------------------------


def test_phases_and_the_steady_window_add_up_exactly(tmp_path):
    bench = Bench()
    monitor, _, _ = fit(tmp_path, bench, tokens_per_sample=5, trainer_kwargs={"num_sanity_val_steps": 2})
    report = monitor.report

    # Two epochs of 4 training and 3 validation batches; 2 sanity batches; both epoch ends fall behind "train".
    expected = {"train": (8, TRAIN), "validation": (6, VALIDATION)}
    for phase, (count, energy) in expected.items():
        row = report["phases"][phase]
        assert row["duration_s"] == pytest.approx(count * energy.duration_s)
        assert row["cpu_J"] == pytest.approx(count * energy.cpu_j)
        assert row["ram_J"] == pytest.approx(count * energy.ram_j)
        assert row["total_J"] == pytest.approx(count * joules(energy))
        assert row["avg_power_W"] == pytest.approx(joules(energy) / energy.duration_s)
    assert report["phases"]["other"]["total_J"] == pytest.approx(2 * joules(VALIDATION) + 2 * joules(OTHER))
    total_j = 8 * joules(TRAIN) + 8 * joules(VALIDATION) + 2 * joules(OTHER)
    assert report["total"]["total_J"] == pytest.approx(total_j)
    assert report["total_kWh"] == pytest.approx(total_j / 3.6e6)

    steady = report["steady"]
    assert (steady["steps"], steady["samples"]) == (7, 14)
    assert steady["total_J"] == pytest.approx(7 * joules(TRAIN))
    assert steady["J_per_step"] == pytest.approx(joules(TRAIN))
    assert steady["J_per_sample"] == pytest.approx(joules(TRAIN) / 2)
    assert steady["J_per_token"] == pytest.approx(joules(TRAIN) / 10)

    # No GPU in this job: the meter's GPU column is somebody else's.
    assert report["total"]["gpu_J"] is None and report["flags"]["gpu"] == "unavailable"
    assert bench.options["gpu_ids"] == []
    assert report["flags"]["total"] == "modelled"
    assert bench.calls[-1] == "stop" and bench.calls.count("stop") == 1


@pytest.mark.parametrize(("warmup_steps", "steps"), [(0, 8), (3, 5), (6, 2), (8, 0), (100, 0)])
def test_warm_up_is_left_out(tmp_path, warmup_steps, steps):
    bench = Bench()
    monitor, _, _ = fit(tmp_path, bench, EnergyMonitor(tracker_factory=bench, warmup_steps=warmup_steps))
    steady = monitor.report["steady"]
    assert steady["steps"] == steps
    assert steady["samples"] == 2 * steps
    assert steady["total_J"] == pytest.approx(steps * joules(TRAIN))
    assert (steady["J_per_step"] is None) == (steps == 0)
    assert ("no_steady_window" in monitor.report["warnings"]) == (steps == 0)


def test_warm_up_counts_optimizer_steps_of_this_fit(tmp_path):
    bench = Bench()
    monitor, trainer, _ = fit(tmp_path, bench, trainer_kwargs={"accumulate_grad_batches": 2})
    assert trainer.global_step == 4
    assert monitor.report["steady"]["steps"] == 3
    assert monitor.report["steady"]["J_per_step"] == pytest.approx(2 * joules(TRAIN))

    trainer.save_checkpoint(tmp_path / "here.ckpt")
    resumed = make_trainer(tmp_path, EnergyMonitor(tracker_factory=(again := Bench()), warmup_steps=2), max_epochs=3)
    resumed.fit(Module(again), loader(4), ckpt_path=tmp_path / "here.ckpt")
    assert resumed.global_step == 8
    assert resumed.callbacks[0].report["steady"]["steps"] == 2


def test_gpu_joules_count_where_the_job_uses_gpus(tmp_path, on_gpu):
    bench = Bench()
    monitor, _, _ = fit(tmp_path, bench)
    assert bench.options["gpu_ids"] == [3]
    assert monitor.report["phases"]["train"]["gpu_J"] == pytest.approx(8 * TRAIN.gpu_j)
    assert monitor.report["phases"]["train"]["total_J"] == pytest.approx(8 * joules(TRAIN, gpu=True))
    assert monitor.report["steady"]["J_per_step"] == pytest.approx(joules(TRAIN, gpu=True))
    assert monitor.report["devices"] == [
        {"rank": 0, "host": socket.gethostname(), "name": "a GPU", "is_accelerator": True}
        | {"address": "GPU-of-a-test", "is_mig": False, "power_limit_w": None}
    ]


def test_an_accelerator_without_a_meter_leaves_no_total(tmp_path, monkeypatch):
    monkeypatch.setattr(energy_fit, "describe_device", lambda device: Device("another", is_accelerator=True))
    report = fit(tmp_path, Bench())[0].report
    assert report["flags"] == {"gpu": "unavailable", "cpu": "modelled", "ram": "modelled", "total": "unavailable"}
    assert report["total"]["gpu_J"] is None and report["total"]["total_J"] is None and report["total_kWh"] is None
    assert report["total"]["cpu_J"] > 0
    assert "gpu_unavailable" in report["warnings"]


@pytest.mark.parametrize(
    ("options", "source", "g_per_kwh"),
    [
        ({}, "omitted", None),
        ({"country_iso_code": "FRA"}, "codecarbon:FRA", 56.0),
        ({"carbon_intensity": 400}, "user", 400),
        ({"carbon_intensity": 400, "country_iso_code": "FRA"}, "user", 400),
    ],
)
def test_co2e(tmp_path, options, source, g_per_kwh):
    report = fit(tmp_path, Bench(), **options)[0].report
    assert report["carbon_source"] == source
    if g_per_kwh is None:
        assert report["co2e_kg"] is None
    else:
        assert report["co2e_kg"] == pytest.approx(report["total_kWh"] * g_per_kwh / 1000)
    assert ("carbon_source" in report["warnings"]) == source.startswith("codecarbon")


def test_nothing_is_read_or_synchronised_per_step(tmp_path, monkeypatch):
    synchronised = []
    monkeypatch.setattr(torch.accelerator, "synchronize", synchronised.append)

    class PretendCuda(Callback):
        def on_fit_start(self, trainer, pl_module):
            monitor._fit._root_device = torch.device("cuda", 0)

    counts = []
    for batches in (3, 30):
        bench = Bench()
        monitor = EnergyMonitor(tracker_factory=bench, warmup_steps=1)
        fit(tmp_path, bench, monitor, batches, trainer_kwargs={"callbacks": [monitor, PretendCuda()]})
        counts.append((bench.calls.count("flush"), len(synchronised)))
        synchronised.clear()
    assert counts[0] == counts[1]
    assert counts[0][1] == counts[0][0] - 1  # every reading but the one at start-up ends a window


def test_only_fit_is_measured(tmp_path):
    bench = Bench()
    trainer = make_trainer(tmp_path, EnergyMonitor(tracker_factory=bench))
    trainer.validate(Module(bench), loader(), verbose=False)
    trainer.test(Module(bench), loader(), verbose=False)
    assert bench.calls == [] and trainer.callbacks[0].report is None


def test_a_fit_with_nothing_to_train_stops_its_meter(tmp_path):
    bench = Bench()
    monitor, _, _ = fit(tmp_path, bench, trainer_kwargs={"limit_train_batches": 0})
    assert bench.calls == ["constructor", "start", "flush", "stop"]
    assert monitor.report is None


def test_fast_dev_run(tmp_path):
    monitor, _, _ = fit(tmp_path, Bench(), trainer_kwargs={"fast_dev_run": True})
    assert monitor.report["phases"]["train"]["total_J"] == pytest.approx(joules(TRAIN))


def test_two_fits_are_measured_apart(tmp_path):
    bench = Bench()
    monitor, _, module = fit(tmp_path, bench)
    first = monitor.report
    trainer = make_trainer(tmp_path, monitor, max_epochs=1)
    trainer.fit(module, loader())
    assert bench.calls.count("stop") == 2
    assert monitor.report is not first
    assert monitor.report["phases"]["train"]["total_J"] == pytest.approx(4 * joules(TRAIN))
    assert monitor.report["total"]["total_J"] == pytest.approx(4 * joules(TRAIN) + joules(OTHER))


def test_pickles_before_between_and_after(tmp_path):
    class Local(Module):
        """Cannot be pickled: what the trainer hangs on its callbacks must not travel along."""

    class Pickler(Callback):
        def on_train_batch_end(self, *args):
            self.copy = pickle.loads(pickle.dumps(monitor))

    monitor, pickler = EnergyMonitor(warmup_steps=3, ram_power_w=100), Pickler()
    assert pickle.loads(pickle.dumps(monitor)).warmup_steps == 3
    trainer = make_trainer(tmp_path, callbacks=[monitor, pickler])
    trainer.fit(Local(), loader())
    assert pickler.copy.warmup_steps == 3 and pickler.copy.report is None
    assert pickle.loads(pickle.dumps(monitor)).report == monitor.report
    assert copy.deepcopy(monitor).report == monitor.report


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_files_and_metrics(tmp_path):
    bench = Bench()
    monitor, trainer, _ = fit(
        tmp_path / "root", bench, output_dir=tmp_path / "new" / "dir", carbon_intensity=500, tokens_per_sample=5
    )
    written = json.loads((tmp_path / "new" / "dir" / "energy_report.json").read_text())
    assert written == monitor.report
    assert written["schema_version"] == 1 and written["complete"] is True
    assert written["config"]["carbon_intensity"] == 500 and written["config"]["pue"] == 1.0
    assert "tracker_factory" not in written["config"]
    assert set(written["versions"]) == {"python", "lightning-phantom", "lightning", "torch", "codecarbon"}
    assert [host["owner_rank"] for host in written["hosts"]] == [0]
    assert written["total"]["gpu_J"] is None

    rows = list(csv.DictReader((tmp_path / "new" / "dir" / "energy_epochs.csv").open()))
    assert [(row["epoch"], row["global_step"], row["flag"]) for row in rows] == [
        ("0", "4", "modelled"),
        ("1", "8", "modelled"),
    ]
    assert [float(row["train_J"]) for row in rows] == pytest.approx([4 * joules(TRAIN), 8 * joules(TRAIN)])
    assert [float(row["other_J"]) for row in rows] == pytest.approx([0, joules(OTHER)])
    assert rows[0]["gpu_J"] == ""
    assert sorted(path.name for path in (tmp_path / "new" / "dir").iterdir()) == [
        "energy_epochs.csv",
        "energy_report.json",
    ]

    figures = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("energy/")}
    assert figures.pop("energy/overhead_s") > 0
    total_j = 8 * joules(TRAIN) + 6 * joules(VALIDATION) + 2 * joules(OTHER)
    assert figures == pytest.approx(
        {
            "energy/total_kWh": total_j / 3.6e6,
            "energy/cpu_J": 8 * TRAIN.cpu_j + 6 * VALIDATION.cpu_j + 2 * OTHER.cpu_j,
            "energy/ram_J": 8 * TRAIN.ram_j + 6 * VALIDATION.ram_j + 2 * OTHER.ram_j,
            "energy/train_J": 8 * joules(TRAIN),
            "energy/val_J": 6 * joules(VALIDATION),
            "energy/other_J": 2 * joules(OTHER),
            "energy/avg_power_W": total_j / (8 * TRAIN.duration_s + 6 * VALIDATION.duration_s + 2 * OTHER.duration_s),
            "energy/steady_J_per_step": joules(TRAIN),
            "energy/steady_J_per_sample": joules(TRAIN) / 2,
            "energy/J_per_token": joules(TRAIN) / 10,
            "energy/co2e_kg": total_j / 3.6e6 / 2,
        }
    )


def test_loggers_see_every_epoch_and_the_end(tmp_path):
    logger = CSVLogger(tmp_path, name="logs")
    fit(tmp_path, Bench(), trainer_kwargs={"logger": logger, "log_every_n_steps": 1})
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    seen = [(int(row["step"]), float(row["energy/train_J"])) for row in rows if row.get("energy/train_J")]
    assert [step for step, _ in seen] == [4, 8, 8]
    assert [value for _, value in seen] == pytest.approx([4 * joules(TRAIN), 8 * joules(TRAIN), 8 * joules(TRAIN)])
    assert "energy/gpu_J" not in rows[0]
    # The log directory is where the report goes when no other is named.
    assert (Path(logger.log_dir) / "energy_report.json").exists()


def test_log_metrics_can_be_switched_off(tmp_path):
    logger = CSVLogger(tmp_path, name="logs")
    _, trainer, _ = fit(tmp_path, Bench(), log_metrics=False, trainer_kwargs={"logger": logger})
    assert not (Path(logger.log_dir) / "metrics.csv").exists()
    assert "energy/total_kWh" in trainer.callback_metrics


def test_the_table_shows_a_flag_beside_every_figure(tmp_path, capsys, on_gpu):
    monitor, _, _ = fit(tmp_path, Bench(), carbon_intensity=500)
    assert "steady J/step" in capsys.readouterr().out
    out = io.StringIO()
    Console(file=out, width=80).print(energy_show.table(monitor.report))
    lines = {line.strip().split("  ")[0]: " ".join(line.split()) for line in out.getvalue().splitlines()}
    assert lines["train"] == "train 16 2,400 320 80 175 modelled"
    assert lines["validation"] == "validation 6 420 48 30 83 modelled"
    assert lines["other"] == "other 1 22 6 2 30 modelled"
    assert lines["total"] == "total 23 2,842 374 112 144.7 modelled"
    assert lines["steady J/step"] == "steady J/step 350 modelled"
    assert lines["steady J/sample"] == "steady J/sample 175 modelled"
    assert lines["steady J/token"] == "steady J/token - modelled"
    assert lines["CO2e kg"] == "CO2e kg 0.0004622 modelled, user"

    fit(tmp_path, Bench(), print_table=False)
    assert "steady J/step" not in capsys.readouterr().out


def test_the_table_shows_what_is_missing_as_missing(tmp_path):
    out = io.StringIO()
    Console(file=out, width=80).print(energy_show.table(fit(tmp_path, Bench(fail_at="start"))[0].report))
    (train,) = (line.split() for line in out.getvalue().splitlines() if line.strip().startswith("train"))
    assert train == ["train", "-", "-", "-", "-", "-", "failed"]


def test_warnings_of_the_report(tmp_path, monkeypatch, on_gpu):
    device = Device("a GPU", is_accelerator=True, address="GPU-of-a-test", is_mig=True)
    monkeypatch.setattr(energy_fit, "describe_device", lambda _: device)
    codes = set(fit(tmp_path, Bench())[0].report["warnings"])
    assert codes == {"mig"}  # 14 s of steady window
    codes = set(fit(tmp_path, Bench(), batches=2)[0].report["warnings"])
    assert codes == {"mig", "window_too_short"}
    bench = Bench()
    bench.spend = lambda energy: Bench.spend(bench, Energy(energy.duration_s, 0.0, energy.cpu_j, energy.ram_j))
    assert set(fit(tmp_path, bench)[0].report["warnings"]) == {"mig", "gpu_zero_suspect"}


def test_unknown_batch_sizes_leave_figures_per_sample_out(tmp_path):
    class Opaque(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step(torch.ones(2, 4), batch_idx)

    bench = Bench()
    monitor = EnergyMonitor(tracker_factory=bench, warmup_steps=1)
    batches = DataLoader([object() for _ in range(4)], batch_size=None, collate_fn=lambda item: {"opaque": None})
    make_trainer(tmp_path, monitor).fit(Opaque(bench), batches)
    assert monitor.report["steady"]["J_per_sample"] is None
    assert monitor.report["steady"]["J_per_step"] == pytest.approx(joules(TRAIN))
    assert "samples_unknown" in monitor.report["warnings"]


# --- flags ------------------------------------------------------------------------------------------------------------


def part(kind, **attributes):
    return type(kind, (), attributes)()


class Gpu:
    """Has a counter that moves, or is asked for its power."""

    def __init__(self, gpu_index, use_power):
        self.gpu_index, self._use_power_fallback = gpu_index, use_power
        self.power, self._kwh = SimpleNamespace(kW=0.4), itertools.count(1)

    @property
    def last_energy(self):
        return None if self._use_power_fallback else SimpleNamespace(kWh=next(self._kwh))


def gpu_part(**use_power_by_index):
    gpus = [Gpu(int(index[1:]), use_power) for index, use_power in use_power_by_index.items()]
    return part("GPU", devices=SimpleNamespace(devices=gpus))


@pytest.mark.parametrize(
    ("parts", "options", "component", "flag"),
    [
        ([part("CPU", _mode="intel_rapl")], {}, "cpu", "measured_counter"),
        ([part("CPU", _mode="intel_power_gadget")], {}, "cpu", "sampled_power"),
        ([part("CPU", _mode="cpu_load")], {}, "cpu", "modelled"),
        ([part("CPU", _mode="cpu_load")], {"cpu_power_w": 90.0}, "cpu", "modelled"),
        ([part("CPU", _mode="constant")], {"cpu_power_w": 90.0}, "cpu", "user_constant"),
        ([part("CPU", _mode="constant")], {}, "cpu", "modelled"),
        ([part("CPU", _mode="of the future")], {}, "cpu", "modelled"),
        ([part("CPU")], {}, "cpu", "modelled"),
        ([part("AppleSiliconChip", chip_part="CPU")], {}, "cpu", "sampled_power"),
        ([part("RAM")], {}, "ram", "modelled"),
        ([part("RAM")], {"ram_power_w": 20.0}, "ram", "user_constant"),
        ([part("Raspberry", chip_part="RAM")], {"ram_power_w": 20.0}, "ram", "sampled_power"),
        ([gpu_part(i0=True, i3=False)], {}, "gpu", "measured_counter"),
        ([gpu_part(i0=False, i3=True)], {}, "gpu", "sampled_power"),
        ([gpu_part(i0=False)], {}, "gpu", "unavailable"),
        ([part("GPU")], {}, "gpu", "modelled"),
        ([part("RAM")], {}, "gpu", "unavailable"),
        (None, {}, "gpu", "modelled"),
    ],
)
def test_flags_are_read_off_the_tracker(tmp_path, on_gpu, parts, options, component, flag):
    report = fit(tmp_path, Bench(parts=parts), **options)[0].report
    assert report["flags"][component] == flag
    assert (report["total"][f"{component}_J"] is None) == (flag == "unavailable")


def test_a_sum_carries_the_worst_flag():
    assert energy_report.worst_flag(["measured_counter", "modelled", "user_constant"]) == "modelled"
    assert energy_report.worst_flag(["failed", "unavailable"]) == "failed"
    assert energy_report.worst_flag([]) == "failed"


def test_hosts_are_summed_and_a_missing_part_is_not_a_smaller_sum():
    def record(rank, flags=None, is_owner=True, failed=False):
        spent = dict.fromkeys((*energy_report.PHASES, "steady"), Energy(10.0 + rank, 6.0, 2.0, 1.0))
        flags = dict.fromkeys(energy_report.COMPONENTS, "measured_counter") | (flags or {})
        return RankRecord(rank, f"h{rank}", ON_GPU, is_owner, None if failed else spent, flags, samples=4, steps=2)

    def summary(*records):
        return energy_report.summarise(records, replicas=2)

    both = summary(record(0), record(1), record(2, is_owner=False, failed=True))
    assert both["total"] == {
        "duration_s": 33.0,
        "gpu_J": 36.0,
        "cpu_J": 12.0,
        "ram_J": 6.0,
        "total_J": 54.0,
        "avg_power_W": 54 / 33,
        "flag": "measured_counter",
    }
    assert both["steady"]["samples"] == 8  # 12 counted by three ranks, of which two saw batches of their own
    assert len(both["hosts"]) == 2 and len(both["devices"]) == 3

    one_guesses = summary(record(0), record(1, {"cpu": "modelled"}))
    assert one_guesses["flags"]["cpu"] == "modelled" and one_guesses["flags"]["gpu"] == "measured_counter"

    one_lacks = summary(record(0), record(1, {"gpu": "unavailable"}))
    assert one_lacks["total"]["gpu_J"] is None and one_lacks["total"]["total_J"] is None
    assert one_lacks["total"]["cpu_J"] == 12.0

    one_failed = summary(record(0), record(1, failed=True))
    assert {v for k, v in one_failed["total"].items() if k != "flag"} == {None}
    assert one_failed["flags"] == dict.fromkeys(("gpu", "cpu", "ram", "total"), "failed")
    assert [host["flag"] for host in one_failed["hosts"]] == ["measured_counter", "failed"]
    assert summary(record(0, is_owner=False))["flags"]["cpu"] == "failed"


# --- what goes wrong --------------------------------------------------------------------------------------------------

FAILURES = ["constructor", "start", "flush", ("flush", 2), ("flush", 5), "husk"]


def broken(failure):
    return Bench(husk=True) if failure == "husk" else Bench(fail_at=failure)


@pytest.mark.parametrize("failure", FAILURES, ids=str)
def test_a_failing_meter_leaves_training_alone(tmp_path, caplog, failure):
    monitor, trainer, module = fit(tmp_path, broken(failure))
    torch.manual_seed(0)
    plain = Module()
    make_trainer(tmp_path).fit(plain, loader(4))
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert trainer.global_step == 8

    report = monitor.report
    assert report["flags"] == dict.fromkeys(("gpu", "cpu", "ram", "total"), "failed")
    assert report["total_kWh"] is None and report["steady"]["J_per_step"] is None
    for row in (report["total"], report["steady"], *report["phases"].values()):
        assert {row[key] for key in ("duration_s", "gpu_J", "cpu_J", "ram_J", "total_J", "avg_power_W")} == {None}
    assert len(report["problems"]["0"]) == 1
    assert set(energy_show.metrics(report)) == {"energy/overhead_s"}
    assert json.loads((tmp_path / "energy_report.json").read_text()) == report
    assert len([r for r in caplog.records if r.name.startswith("lightning_phantom")]) == 1


def test_a_meter_that_cannot_be_stopped_keeps_its_readings(tmp_path, caplog):
    report = fit(tmp_path, Bench(fail_at="stop"))[0].report
    assert report["phases"]["train"]["total_J"] == pytest.approx(8 * joules(TRAIN))
    assert report["problems"] == {"0": ["OSError: stop is broken"]}
    assert "stop is broken" in caplog.text


@pytest.mark.parametrize(
    "reading", [Energy(1.0, 0.0, -1.0, 0.0), Energy(1.0, 0.0, float("nan"), 0.0), Energy(1.0, 0.0, float("inf"), 0.0)]
)
def test_an_impossible_reading_is_a_failure(tmp_path, reading):
    bench = Bench()
    meter = energy_meter.Meter(tracker_options(), bench)
    bench.spend(reading)
    with pytest.raises(RuntimeError, match="a meter cannot run backwards"):
        meter.read()

    bench = Bench()
    monitor, _, _ = fit(tmp_path, bench, step=lambda _: bench.spend(Energy(0.0, 0.0, -2 * TRAIN.cpu_j) + reading))
    assert monitor.report["flags"]["total"] == "failed"
    assert monitor.report["total"]["cpu_J"] is None


@pytest.mark.parametrize("failure", [*FAILURES, "stop"], ids=str)
def test_strict_raises(tmp_path, failure):
    bench = broken(failure)
    with pytest.raises(PhantomError, match=r"strict=True.*strict=False"):
        fit(tmp_path, bench, strict=True)
    if failure != "constructor":
        assert bench.calls[-1] == "stop"


def test_an_unwritable_directory_only_warns(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    monitor, _, _ = fit(tmp_path, Bench(), output_dir=tmp_path / "file" / "below")
    assert "NotADirectoryError" in caplog.text
    assert monitor.report["total"]["total_J"] > 0
    with pytest.raises(PhantomError, match="NotADirectoryError"):
        fit(tmp_path, Bench(), output_dir=tmp_path / "file" / "below", strict=True)


def test_a_logger_that_fails_does_not_cost_the_report(tmp_path):
    logger = CSVLogger(tmp_path, name="logs")

    def refuse(*args, **kwargs):
        raise ConnectionError("no route to the dashboard")

    logger.log_metrics = refuse
    fit(tmp_path, Bench(), output_dir=tmp_path, trainer_kwargs={"logger": logger})
    report = json.loads((tmp_path / "energy_report.json").read_text())
    assert report["phases"]["train"]["total_J"] == pytest.approx(8 * joules(TRAIN))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_stops_the_meter_and_saves_what_there_is(tmp_path, monkeypatch, error):
    def crash(module):
        if module.global_step == 6:
            monkeypatch.setattr(energy_fit, "gather", None)  # the other ranks may be gone
            raise error("lost")

    bench = Bench()
    with pytest.raises((error, SystemExit)):
        fit(tmp_path, bench, step=crash)
    assert bench.calls[-1] == "stop"
    report = json.loads((tmp_path / "energy_report.json").read_text())
    assert report["complete"] is False and "incomplete" in report["warnings"]
    assert report["phases"]["train"]["total_J"] == pytest.approx(7 * joules(TRAIN))
    assert len((tmp_path / "energy_epochs.csv").read_text().splitlines()) == 2


def test_a_replaced_file_is_never_half_written(tmp_path, monkeypatch):
    fit(tmp_path, Bench())
    before = (tmp_path / "energy_report.json").read_text()

    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    fit(tmp_path, Bench(), batches=2)
    assert (tmp_path / "energy_report.json").read_text() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "name", ["carbon_intensity", "measure_power_secs", "tokens_per_sample", "cpu_power_w", "ram_power_w"]
)
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "12", True])
def test_quantities_are_checked_at_construction(name, value):
    with pytest.raises(PhantomError, match=rf"EnergyMonitor: {name}={value!r} is not a positive, finite number; pass "):
        EnergyMonitor(**{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps=-1 is not a count; pass an integer"),
        ({"warmup_steps": 1.5}, "warmup_steps=1.5 is not a count; pass an integer"),
        ({"warmup_steps": True}, "warmup_steps=True is not a count; pass an integer"),
        ({"measure_power_secs": None}, "measure_power_secs=None is not a positive"),
        ({"country_iso_code": "fra"}, "country_iso_code='fra' .* three capital letters"),
        ({"country_iso_code": "XXX"}, "country_iso_code='XXX' is no country .* carbon_intensity instead"),
        ({"country_iso_code": 33}, "country_iso_code=33 .* three capital letters"),
        ({"output_dir": 3}, "output_dir=3 is no path; pass a directory"),
    ],
)
def test_other_arguments_are_checked_at_construction(options, message):
    with pytest.raises(PhantomError, match=message):
        EnergyMonitor(**options)


# --- codecarbon, NVML and the machine ---------------------------------------------------------------------------------


def test_codecarbon_measures_what_it_is_told(tmp_path):
    # One reading of codecarbon's own would do no harm but for its race with ours; an hour apart there is none.
    monitor = EnergyMonitor(ram_power_w=100, measure_power_secs=3600, warmup_steps=1, output_dir=tmp_path, strict=True)
    trainer = make_trainer(tmp_path, monitor, max_epochs=1)
    trainer.fit(Module(step=lambda _: time.sleep(0.25)), loader(8))
    report = monitor.report
    assert report["total"]["duration_s"] > 1.9
    assert report["total"]["ram_J"] == pytest.approx(100 * report["total"]["duration_s"], rel=0.1)
    assert report["steady"]["ram_J"] == pytest.approx(100 * report["steady"]["duration_s"], rel=0.1)
    assert report["flags"]["ram"] == "user_constant" and report["flags"]["gpu"] == "unavailable"
    assert report["total"]["cpu_J"] > 0
    assert report["hosts"][0]["hardware"]
    phases = report["phases"].values()
    assert sum(row["total_J"] for row in phases) == pytest.approx(report["total"]["total_J"])


def codecarbon_parameters():
    from codecarbon import OfflineEmissionsTracker
    from codecarbon.emissions_tracker import BaseEmissionsTracker

    names = set()
    for tracker in (OfflineEmissionsTracker, BaseEmissionsTracker):
        names |= set(inspect.signature(tracker.__init__).parameters)
    names -= {"self", "args", "kwargs"}
    # Deprecated, and not read where their successors are given.
    return {name for name in names if not name.startswith("save_to_")} - {"co2_signal_api_token"}


def tracker_options(**options):
    settings = {"measure_power_secs": 1.0, "country_iso_code": None, "cpu_power_w": None, "ram_power_w": None}
    return energy_meter.tracker_options(**(settings | {"gpu_indices": []} | options))


def test_every_option_of_codecarbon_is_set():
    assert set(tracker_options()) | {"output_handlers"} == codecarbon_parameters()


def test_configuration_files_and_environment_do_not_leak_in(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    leaks = "\n".join(f"{name} = 7" for name in ("pue", "wue", "force_cpu_power", "force_ram_power"))
    (tmp_path / ".codecarbon.config").write_text(f"[codecarbon]\n{leaks}\n")
    for name in (*codecarbon_parameters(), "co2_signal_api_token"):
        monkeypatch.setenv(f"CODECARBON_{name.upper()}", "5")

    options = tracker_options(country_iso_code="FRA")
    meter = energy_meter.Meter(options)
    try:
        conf = meter._tracker._conf
        assert {name: conf[name] for name in options} == options
        assert not meter._tracker._electricitymaps_api_token
        time.sleep(0.1)
        meter.read()
        assert meter.grid_g_per_kwh == pytest.approx(56, rel=0.5)
    finally:
        meter.stop()


def test_the_network_is_not_touched(tmp_path, monkeypatch):
    touched = []

    def refuse(*args, **kwargs):
        touched.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("CODECARBON_CO2_SIGNAL_API_TOKEN", "token")
    monitor = EnergyMonitor(country_iso_code="FRA", strict=True, warmup_steps=0)
    make_trainer(tmp_path, monitor).fit(Module(step=lambda _: time.sleep(0.05)), loader())
    assert monitor.report["co2e_kg"] > 0
    assert not touched


def test_codecarbon_is_silent_and_takes_no_signal_handlers():
    logger, records = logging.getLogger("codecarbon"), []
    listener = logging.Handler()
    listener.emit = records.append
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        meter = energy_meter.Meter(tracker_options())
        meter.stop()
        meter.stop()
    finally:
        logger.removeHandler(listener)
    assert not records
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_codecarbon_that_never_reads_is_noticed(tmp_path):
    # Its offline constructor swallows the error, and start() and stop() of what is left pass.
    with pytest.raises(RuntimeError, match="no reading"):
        energy_meter.Meter(tracker_options() | {"output_dir": "/does/not/exist"})


def test_a_trainer_whose_ranks_cannot_be_reached_fails_the_meter(tmp_path):
    with pytest.raises(RuntimeError, match=r"4 ranks, torch.distributed's default group 1"):
        energy_fit.gather(0, SimpleNamespace(world_size=4))


# --- two ranks --------------------------------------------------------------------------------------------------------

SCENARIOS = ("one_host", "one_replica", "two_hosts", "failing", "failing_late", "strict")


def run_scenarios(directory):
    """Every scenario in turn, on one start of the ranks."""
    return {scenario: run_scenario(scenario, dist.get_rank(), directory) for scenario in SCENARIOS}


def run_scenario(scenario, rank, directory):
    if scenario not in ("one_host", "one_replica"):
        energy_fit.host_id = lambda: f"host of rank {rank}"
    fail_at = {"failing": "start", "failing_late": ("flush", 3), "strict": ("flush", 3)}.get(scenario)
    bench = Bench(fail_at=fail_at if rank == 1 else None)
    torch.manual_seed(0)
    module = Module(bench, step=lambda module: bench.spend(Energy(float(rank), 0.0, 100.0 * rank)))
    monitor = EnergyMonitor(
        tracker_factory=bench, warmup_steps=1, output_dir=directory / scenario, strict=scenario == "strict"
    )
    trainer = make_trainer(directory, monitor, devices=2, strategy="ddp", max_epochs=1)
    if scenario == "one_replica":
        trainer.strategy.data_parallel_size = 1
    error = None
    try:
        trainer.fit(module, loader(8))
    except PhantomError as caught:
        error = str(caught)
    return {"report": monitor.report, "calls": bench.calls, "error": error, "steps": trainer.global_step}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    return directory, run_ranks(2, run_scenarios, directory, timeout_s=180)


def test_one_owner_per_host(two_ranks):
    directory, (first, second) = two_ranks
    assert "constructor" in first["one_host"]["calls"] and second["one_host"]["calls"] == []
    report = first["one_host"]["report"]
    # 8 batches on 2 ranks: 4 steps each. The host is counted once.
    assert report["phases"]["train"]["total_J"] == pytest.approx(4 * joules(TRAIN))
    assert len(report["hosts"]) == 1 and len(report["devices"]) == 2
    assert (report["steady"]["steps"], report["steady"]["samples"]) == (3, 12)
    assert second["one_host"]["report"] == report
    assert json.loads((directory / "one_host" / "energy_report.json").read_text()) == report


def test_samples_seen_by_both_ranks_count_once(two_ranks):
    _, (first, second) = two_ranks
    assert first["one_replica"]["report"]["steady"]["samples"] == 6
    assert second["one_replica"]["report"] == first["one_replica"]["report"]


def test_hosts_are_added_up_across_ranks(two_ranks):
    _, (first, second) = two_ranks
    report = second["two_hosts"]["report"]
    assert report["phases"]["train"]["cpu_J"] == pytest.approx(4 * (2 * TRAIN.cpu_j + 100))
    assert report["phases"]["train"]["ram_J"] == pytest.approx(4 * 2 * TRAIN.ram_j)
    assert report["phases"]["train"]["duration_s"] == pytest.approx(4 * (TRAIN.duration_s + 1))
    assert [host["owner_rank"] for host in report["hosts"]] == [0, 1]
    assert first["two_hosts"]["report"] == report


@pytest.mark.parametrize("scenario", ["failing", "failing_late"])
def test_a_meter_that_fails_on_one_rank_hangs_nobody(two_ranks, scenario):
    _, (first, second) = two_ranks
    report = first[scenario]["report"]
    assert first[scenario]["steps"] == second[scenario]["steps"] == 4
    assert report["total"]["total_J"] is None and report["flags"]["total"] == "failed"
    assert [host["flag"] for host in report["hosts"]] == ["modelled", "failed"]
    assert list(report["problems"]) == ["1"]
    assert second[scenario]["report"] == report


def test_strict_raises_on_every_rank(two_ranks):
    _, ranks = two_ranks
    for rank in ranks:
        assert "flush is broken (on rank 1)" in rank["strict"]["error"]
        assert rank["strict"]["calls"][-1] == "stop"
