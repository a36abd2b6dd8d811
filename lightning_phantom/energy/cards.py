"""From the devices that ranks train on to the cards whose counters hold their energy, NVIDIA's and AMD's.

The same number means other devices to other ranks of a host (CUDA_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES,
ROCR_VISIBLE_DEVICES, a scheduler's control groups). So a rank gives its device's address, which depends on nobody, and
the owner of the host looks the addresses up in the library that its meter reads. pynvml and amdsmi are imported inside
functions: importing this module loads neither and touches no device.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_phantom.energy.report import Device

PCI_DEVICES = Path("/sys/bus/pci/devices")
# AMD's PCI numbers of cards with two dies, MI250X and MI250: each die is a device, and one of them counts for both.
TWO_DIES = ("0x7408", "0x740c")


class Card(NamedTuple):
    """A card whose energy is counted, once however many ranks train on it.

    Attributes:
        indices: codecarbon's numbers of its dies, which are its numbers in NVML or amdsmi.
        is_shared: Whether it has dies that no rank trains on; its counter holds them, too.
    """

    indices: tuple[int, ...]
    is_shared: bool = False


def describe_device(device: torch.device) -> Device:
    """Name a rank's device, with an address that is the same for all ranks of the host."""
    if device.type != "cuda":
        return Device(device.type, is_accelerator=device.type != "cpu")
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Device(properties.name, True, _pci_slot(properties))
    address = f"GPU-{properties.uuid}"
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(address)
            return Device(properties.name, True, address, _is_mig(pynvml, handle), _power_limit_w(pynvml, handle))
        finally:
            pynvml.nvmlShutdown()
    except Exception:
        return Device(properties.name, True, address)


def find_cards(devices: Sequence[Device]) -> list[Card]:
    """The cards of a host's devices; none if one of the accelerators cannot be found, for a part is not the sum."""
    addresses = {device.address for device in devices if device.is_accelerator}
    known = {address for address in addresses if address is not None}
    if not known or known != addresses:
        return []
    try:
        cards = _amd_cards(known) if torch.version.hip else _nvidia_cards(known)
    except Exception:  # no library, no driver, no permission, no such device
        logging.getLogger(__name__).debug("the accelerators' meters cannot be found", exc_info=True)
        return []
    return cards if all(card.indices for card in cards) else []


def _nvidia_cards(uuids: set[str]) -> list[Card]:
    import pynvml

    pynvml.nvmlInit()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
        return [Card((int(pynvml.nvmlDeviceGetIndex(handle)),)) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def _amd_cards(slots: set[str]) -> list[Card]:
    import amdsmi

    # Not shut down again: codecarbon and torch use it in this process, and shutting down takes it from them.
    amdsmi.amdsmi_init()
    # Partitions of a card (MI300's CPX) are functions of one PCI slot.
    listed = [
        amdsmi.amdsmi_get_gpu_device_bdf(handle).lower().rpartition(".")[0]
        for handle in amdsmi.amdsmi_get_processor_handles()
    ]
    pair_of = {die: pair for pair in _pairs_of_dies() for die in pair}
    cards = []
    for card in {pair_of.get(slot, (slot,)) for slot in slots}:
        indices = tuple(index for index, slot in enumerate(listed) if slot in card)
        cards.append(Card(indices, is_shared=max(len(card), len(indices)) > len(slots.intersection(card))))
    return cards


def _pairs_of_dies() -> list[tuple[str, str]]:
    """PCI slots of the two dies of each card that has two: neighbours, in the order of their addresses.

    Read from the kernel, which lists all of the host's: amdsmi may leave out what a control group forbids, and the rest
    would pair up wrongly.
    """
    dies = sorted(
        entry.name.lower().rpartition(".")[0]
        for entry in PCI_DEVICES.iterdir()
        if (entry / "vendor").read_text().strip() == "0x1002" and (entry / "device").read_text().strip() in TWO_DIES
    )
    # An odd number, as in a virtual machine that was given some, says not whose the odd one is.
    return list(zip(dies[::2], dies[1::2], strict=True)) if len(dies) % 2 == 0 else []


def _pci_slot(properties: Any) -> str | None:
    try:
        return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}"
    except AttributeError:  # a torch that does not say
        return None


def _is_mig(pynvml: Any, handle: Any) -> bool:
    try:
        return bool(pynvml.nvmlDeviceGetMigMode(handle)[0])
    except Exception:
        return False


def _power_limit_w(pynvml: Any, handle: Any) -> float | None:
    try:
        return float(pynvml.nvmlDeviceGetEnforcedPowerLimit(handle)) / 1000
    except Exception:
        return None
