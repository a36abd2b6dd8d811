"""Which cards EnergyMonitor counts, and by what: NVIDIA's by UUID, AMD's by PCI slot, two dies of one card once."""

import sys
import time
from contextlib import ExitStack
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from amd import MI300X, Die, install
from ranks import run_ranks
from test_energy import Module, loader, make_trainer

from lightning_phantom.energy import fit as energy_fit
from lightning_phantom.energy.cards import Card, describe_device, find_cards
from lightning_phantom.energy.monitor import EnergyMonitor
from lightning_phantom.energy.report import Device

STEPS, CARD_J, NEIGHBOUR_J = 3, 90.0, 500.0


def frontier():
    """Two MI250X, in amdsmi's order: the first die of each counts for both, the second reads 0."""
    return [Die("0000:c1:00"), Die("0000:c6:00", joules=0), Die("0000:c9:00"), Die("0000:cc:00", joules=0)]


def fit(directory, step, index=0, devices=1):
    """The report of STEPS steps on torch's device `index`, with codecarbon itself; `step` runs in each."""

    def spend(module):
        step()
        time.sleep(0.06)  # codecarbon reads again after 50 ms

    monitor = EnergyMonitor(warmup_steps=0, output_dir=directory, measure_power_secs=3600, strict=True)
    strategy = "ddp" if devices > 1 else "auto"
    trainer = make_trainer(directory, monitor, devices=devices, strategy=strategy, max_epochs=1)
    with patch.object(energy_fit, "describe_device", lambda _: describe_device(torch.device("cuda", index))):
        trainer.fit(Module(step=spend), loader(STEPS * devices))
    return monitor.report


@pytest.fixture
def on_host(tmp_path):
    """Fits on a host with AMD cards: (dies, the one that torch sees, step) to the report."""
    with ExitStack() as stack:

        def run(dies, die, step, **kwargs):
            install(stack, tmp_path / "pci", dies, [die], **kwargs)
            return fit(tmp_path, step)

        yield run


# --- NVIDIA -----------------------------------------------------------------------------------------------------------


def test_nvidia_devices_are_found_by_uuid_whatever_torch_numbers_them(monkeypatch):
    uuids = {"GPU-aaaa": 5, "GPU-bbbb": 2}
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuids[uuid],
        nvmlDeviceGetIndex=lambda handle: handle,
        nvmlDeviceGetMigMode=lambda handle: (1, 1) if handle == 5 else (0, 0),
        nvmlDeviceGetEnforcedPowerLimit=lambda handle: 650_000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    visible = {0: "bbbb", 1: "aaaa", 2: "cccc"}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="H200", uuid=visible[device.index])
    )

    def described(index):
        return describe_device(torch.device("cuda", index))

    assert described(0) == Device("H200", True, "GPU-bbbb", False, 650.0)
    assert described(1) == Device("H200", True, "GPU-aaaa", True, 650.0)
    assert described(2) == Device("H200", True, "GPU-cccc")  # NVML does not know it
    del nvml.nvmlDeviceGetMigMode
    assert described(1) == Device("H200", True, "GPU-aaaa", False, 650.0)
    assert describe_device(torch.device("cpu")) == Device("cpu")
    assert describe_device(torch.device("mps")) == Device("mps", is_accelerator=True)

    assert find_cards([described(0)]) == [Card((2,))]
    assert sorted(find_cards([described(1), described(0), described(1)])) == [Card((2,)), Card((5,))]
    # A rank's own library may call its device 0, as every rank's does where each may see one: the owner's decides.
    assert find_cards([described(0), described(2)]) == []
    assert find_cards([described(0), Device("mps", is_accelerator=True)]) == []
    assert find_cards([Device("cpu")]) == []


# --- AMD: which cards -------------------------------------------------------------------------------------------------


def found(host, tmp_path, visible, used, **kwargs):
    with ExitStack() as stack:
        install(stack, tmp_path / "pci", host, visible, **kwargs)
        return sorted(find_cards([describe_device(torch.device("cuda", index)) for index in used]))


def test_amd_devices_are_found_by_slot_whatever_torch_numbers_them(tmp_path):
    dies = [Die(f"0000:{bus}:00", MI300X) for bus in ("05", "26", "46", "65")]
    # HIP_VISIBLE_DEVICES=2,0 or ROCR_VISIBLE_DEVICES=2,0: torch's device 0 is the card with amdsmi's number 2.
    visible = [dies[2], dies[0]]
    assert found(dies, tmp_path / "first", visible, [0]) == [Card((2,))]
    assert found(dies, tmp_path / "both", visible, [0, 1]) == [Card((0,)), Card((2,))]
    # Another order in amdsmi than the kernel's and HIP's.
    assert found(dies[::-1], tmp_path / "reversed", visible, [0]) == [Card((1,))]


def test_two_dies_are_one_card(tmp_path):
    dies = frontier()
    assert found(dies, tmp_path / "one", dies, [0]) == [Card((0, 1), is_shared=True)]
    assert found(dies, tmp_path / "other", dies, [1]) == [Card((0, 1), is_shared=True)]
    assert found(dies, tmp_path / "both", dies, [0, 1]) == [Card((0, 1))]
    assert found(dies, tmp_path / "crossed", dies, [1, 2]) == [
        Card((0, 1), is_shared=True),
        Card((2, 3), is_shared=True),
    ]
    assert found(dies, tmp_path / "all", dies, [3, 2, 1, 0]) == [Card((0, 1)), Card((2, 3))]


def test_partitions_are_one_card(tmp_path):
    dies = [Die("0000:05:00", MI300X, function=function) for function in range(4)] + [Die("0000:26:00", MI300X)]
    assert found(dies, tmp_path, dies, [1]) == [Card((0, 1, 2, 3), is_shared=True)]


def test_dies_that_amdsmi_hides_do_not_make_others_neighbours(tmp_path):
    dies = frontier()
    # A control group that leaves the second die of one card and the first of the next.
    hidden = [dies[0], dies[3]]
    assert found(dies, tmp_path / "a", dies, [1], hidden=hidden) == [Card((0,), is_shared=True)]
    assert found(dies, tmp_path / "b", dies, [2], hidden=hidden) == [Card((1,), is_shared=True)]
    # All of a card is hidden from the owner, though a rank trains on it: a part would not be the sum.
    assert found(dies, tmp_path / "c", dies, [0, 2], hidden=dies[:2]) == []


def test_an_odd_number_of_dies_makes_no_pairs(tmp_path):
    dies = frontier()[1:]
    assert found(dies, tmp_path, dies, [0, 1]) == [Card((0,)), Card((1,))]


def test_amd_without_a_library_or_an_address_has_no_cards(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="AMD", uuid="u"))
    device = describe_device(torch.device("cuda", 0))
    assert device == Device("AMD", is_accelerator=True)  # a torch that does not say the slot
    assert find_cards([device]) == []
    monkeypatch.setitem(sys.modules, "amdsmi", None)
    assert find_cards([Device("AMD", True, "0000:c1:00")]) == []


def test_amdsmi_is_left_running(tmp_path):
    with ExitStack() as stack:
        dies = frontier()
        smi = install(stack, tmp_path, dies, dies)
        assert find_cards([describe_device(torch.device("cuda", 0))])
        assert smi.started  # codecarbon and torch may have started it before


# --- AMD: what is counted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [0, 1])
def test_a_card_is_counted_once_whichever_die_the_job_has(on_host, own):
    dies = frontier()

    def step():
        dies[0].spend(CARD_J)
        dies[2].spend(NEIGHBOUR_J)

    report = on_host(dies, dies[own], step)
    assert report["total"]["gpu_J"] == pytest.approx(STEPS * CARD_J, rel=1e-3)
    assert report["flags"]["gpu"] == "measured_counter"
    assert "shared_card" in report["warnings"] and "gpu_unavailable" not in report["warnings"]
    assert report["devices"][0]["address"] == f"0000:{('c1', 'c6')[own]}:00"
    assert report["total"]["total_J"] > report["total"]["gpu_J"]


def test_a_card_of_one_die_is_counted_without_its_neighbour(on_host):
    # codecarbon takes every MI300 for a card with two dies, of which those with odd numbers read 0.
    dies = [Die(f"0000:{bus}:00", MI300X) for bus in ("05", "26")]

    def step():
        dies[0].spend(NEIGHBOUR_J)
        dies[1].spend(CARD_J)

    report = on_host(dies, dies[1], step)
    assert report["total"]["gpu_J"] == pytest.approx(STEPS * CARD_J, rel=1e-3)
    assert report["flags"]["gpu"] == "measured_counter"
    assert "shared_card" not in report["warnings"]


@pytest.mark.parametrize(
    ("case", "flag"),
    [
        ("power", "sampled_power"),
        ("both dies count", "unavailable"),
        ("neither die counts", "unavailable"),
        ("reads 0", "unavailable"),
        ("stands still", "unavailable"),
        ("hidden", "unavailable"),
    ],
)
def test_what_is_no_measurement_is_not_called_one(on_host, case, flag):
    two = frontier()
    alone = [Die("0000:05:00", MI300X)]
    dies, own, step, hidden = {
        "power": (two, two[1], lambda: None, []),
        "both dies count": (two, two[0], lambda: [die.spend(CARD_J) for die in two[:2]], []),
        "neither die counts": (two, two[0], lambda: two[2].spend(NEIGHBOUR_J), []),
        "reads 0": (alone, alone[0], lambda: None, []),
        "stands still": (alone, alone[0], lambda: None, []),
        "hidden": (two, two[1], lambda: two[2].spend(NEIGHBOUR_J), [two[0]]),
    }[case]
    if case == "power":
        two[0].ticks, two[0].watts = "N/A", 400  # as amdsmi writes what it does not know
    elif case == "reads 0":
        alone[0].ticks = 0
    report = on_host(dies, own, step, hidden=hidden)
    assert report["flags"]["gpu"] == flag
    if flag == "unavailable":
        assert report["total"]["gpu_J"] is None and report["total"]["total_J"] is None
        assert "gpu_unavailable" in report["warnings"]
    else:
        assert report["steady"]["gpu_J"] == pytest.approx(400 * report["steady"]["duration_s"], rel=0.5)


# --- AMD: two ranks of one host ---------------------------------------------------------------------------------------


def run_two_ranks(directory):
    """The report of each scenario, of this rank: which die of a host with two cards is its own, and what it may see."""
    rank = dist.get_rank()
    reports = {}
    for scenario, own, visible_to in (
        ("one card", (0, 1), None),
        ("two cards", (1, 3), None),
        ("one card, a die each in control groups", (0, 1), ([0], [1])),
        ("two cards, a die each in control groups", (0, 2), ([0], [2])),
    ):
        dies = frontier()
        hidden = [] if visible_to is None else [die for i, die in enumerate(dies) if i not in visible_to[rank]]

        def step(dies=dies):
            dies[0].spend(CARD_J)
            dies[2].spend(NEIGHBOUR_J)

        with ExitStack() as stack:
            install(stack, directory / scenario / f"pci of {rank}", dies, [dies[own[rank]]], hidden=hidden)
            reports[scenario] = fit(directory, step, devices=2)
    return reports


def test_two_dies_on_two_ranks(tmp_path):
    first, second = run_ranks(2, run_two_ranks, tmp_path)
    assert first == second
    for scenario, per_step in (
        ("one card", CARD_J),
        ("two cards", CARD_J + NEIGHBOUR_J),
        ("one card, a die each in control groups", CARD_J),
    ):
        assert first[scenario]["total"]["gpu_J"] == pytest.approx(STEPS * per_step, rel=1e-3), scenario
        assert first[scenario]["flags"]["gpu"] == "measured_counter"
        assert ("shared_card" in first[scenario]["warnings"]) == (scenario == "two cards")
        assert [host["owner_rank"] for host in first[scenario]["hosts"]] == [0]
    # The owner cannot see the other rank's card: half would not be the whole.
    missing = first["two cards, a die each in control groups"]
    assert missing["flags"]["gpu"] == "unavailable" and missing["total"]["total_J"] is None
