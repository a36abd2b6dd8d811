"""Random numbers that know nothing of ranks, so that the model does not either."""

from __future__ import annotations

import hashlib

import torch


def generator_of(*key: object) -> torch.Generator:
    """A CPU generator that the key alone seeds, on every rank and in every process alike."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
