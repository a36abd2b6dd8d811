"""The most memory that a process has held."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import torch


class Memory:
    """The most memory held since the last `restart`, beyond what was held when this was made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before: int | None = None
        if self.restart():
            self.before = torch.cuda.memory_allocated(device) if device.type == "cuda" else _status_bytes("VmRSS")

    def restart(self) -> bool:
        """Let the high-water mark fall to what is held now; False where the system cannot."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what has been freed goes back to the system
            Path("/proc/self/clear_refs").write_text("5")
        except (OSError, AttributeError):
            return False
        return True

    def peak_bytes(self) -> int | None:
        """Bytes; None where the system does not say."""
        if self.before is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        peak = _status_bytes("VmHWM")
        return None if peak is None else max(peak - self.before, 0)


def _status_bytes(name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None
