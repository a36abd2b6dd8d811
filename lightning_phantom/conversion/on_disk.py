"""Tensors in files instead of memory, while a checkpoint larger than that is made."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch


def on_disk(tensor: torch.Tensor, folder: Path) -> torch.Tensor:
    """Copy a tensor into a file in `folder` that is gone when the tensor is, whatever ends the process.

    The system can write its pages out when memory runs short.
    """
    size = tensor.numel() * tensor.element_size()
    if not size:
        return tensor
    descriptor, name = tempfile.mkstemp(dir=folder)
    try:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, but kills the process that writes a page
            os.posix_fallocate(descriptor, 0, size)
        mapped = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    finally:
        os.close(descriptor)
        os.unlink(name)
    return mapped.view(tensor.shape).copy_(tensor)
