"""A host with AMD cards, as codecarbon and torch see one: amdsmi, the kernel's list, ROCm's device properties."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import torch

MI250X, MI300X = "0x7408", "0x74a1"
NAMES = {MI250X: "AMD Instinct MI250X", MI300X: "AMD Instinct MI300X"}
RESOLUTION_UJ = 15.259  # of the counters that these cards have


class Die:
    """A device of amdsmi. `spend` moves its counter and `watts` is its power; both stay 0 on a card's second die."""

    def __init__(self, slot, pci_number=MI250X, joules=1000.0, watts=0, function=0):
        self.slot, self.function, self.pci_number, self.watts = slot, function, pci_number, watts
        self.ticks = round(joules * 1e6 / RESOLUTION_UJ)

    def spend(self, joules):
        self.ticks += round(joules * 1e6 / RESOLUTION_UJ)


class Error(Exception):
    """amdsmi's."""


def amdsmi_of(dies):
    """What codecarbon and `energy.cards` call of amdsmi, of devices in the order of amdsmi's own numbers."""
    smi = ModuleType("amdsmi")
    smi.started = False

    def started(function):
        def call(*args, **kwargs):
            if not smi.started:
                raise Error("AMDSMI_STATUS_NOT_INIT")
            return function(*args, **kwargs)

        return call

    def init():
        smi.started = True

    def shut_down():
        smi.started = False

    smi.AmdSmiException = Error
    smi.amdsmi_exception = SimpleNamespace(AmdSmiLibraryException=Error)
    smi.amdsmi_init, smi.amdsmi_shut_down = init, shut_down
    for name, function in {
        "processor_handles": lambda: list(dies),
        "gpu_device_bdf": lambda die: f"{die.slot}.{die.function}",
        "gpu_device_uuid": lambda die: f"uuid of {die.slot}",
        "gpu_asic_info": lambda die: {"market_name": NAMES[die.pci_number], "device_id": die.pci_number},
        "gpu_vram_usage": lambda die: {"vram_total": 65536, "vram_used": 1024},
        "gpu_activity": lambda die: {"gfx_activity": 50},
        "gpu_metrics_info": lambda die: {"energy_accumulator": die.ticks, "average_socket_power": die.watts},
        "power_info": lambda die: {"average_socket_power": die.watts},
        "power_cap_info": lambda die: {"power_cap": 560_000_000},
        "energy_count": lambda die: {"energy_accumulator": die.ticks, "counter_resolution": RESOLUTION_UJ},
    }.items():
        setattr(smi, f"amdsmi_get_{name}", started(function))
    return smi


def install(stack, folder, dies, visible, hidden=()):
    """Make this process one on that host, until the ExitStack `stack` closes.

    Args:
        stack: An ExitStack.
        folder: An empty one, for the kernel's list of PCI devices.
        dies: Of the host, in the order of amdsmi.
        visible: The dies that torch sees, in its order, whatever the environment made it see.
        hidden: Dies that amdsmi leaves out, as it does where a control group forbids them.
    """
    from codecarbon.core import gpu, gpu_amd, hardware_cache

    from lightning_phantom.energy import cards

    for die in dies:
        entry = Path(folder, f"{die.slot}.{die.function}")
        entry.mkdir(parents=True)
        (entry / "vendor").write_text("0x1002\n")
        (entry / "device").write_text(f"{die.pci_number}\n")

    def properties(device):
        die = visible[device.index]
        domain, bus, number = (int(part, 16) for part in die.slot.split(":"))
        return SimpleNamespace(name=NAMES[die.pci_number], pci_domain_id=domain, pci_bus_id=bus, pci_device_id=number)

    smi = amdsmi_of([die for die in dies if die not in hidden])
    hardware_cache.clear_cache()
    stack.callback(hardware_cache.clear_cache)
    for patched in (
        patch.dict(sys.modules, amdsmi=smi),
        *(patch.object(gpu_amd, *new) for new in (("amdsmi", smi), ("AMDSMI_AVAILABLE", True))),
        *(patch.object(gpu, *new) for new in (("AMDSMI_AVAILABLE", True), ("is_rocm_system", lambda: True))),
        patch.object(cards, "PCI_DEVICES", Path(folder)),
        patch.object(torch.version, "hip", "6.4"),
        patch.object(torch.cuda, "get_device_properties", properties),
    ):
        stack.enter_context(patched)
    return smi
