"""Checkpoints without a Trainer: a module, its optimizers and the ranks will do."""

from datetime import timedelta

import torch
from ranks import run_ranks
from torch import nn

from lightning_phantom import PhantomConfig, phantomize_
from lightning_phantom.checkpoints.files import AtomicCheckpointIO
from lightning_phantom.checkpoints.format import generators_of
from lightning_phantom.checkpoints.store import Store
from lightning_phantom.distributed.mesh import Sizes, make_mesh


def net():
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))


def made(mesh):
    module = phantomize_(net(), PhantomConfig(4, 2), mesh.phantom.process_group)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    return module, optimizer, Store(module, [optimizer], mesh, torch.device("cpu"), AtomicCheckpointIO())


def step(module, optimizer):
    torch.manual_seed(7)
    module(torch.randn(8, 16)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return [p.detach().clone() for p in module.parameters()]


def _save_and_load(folder):
    same = {}
    for kind in ("full", "sharded"):
        mesh, path = make_mesh(Sizes(2, 1, 4), timedelta(minutes=2)), f"{folder}/{kind}"
        torch.manual_seed(0)
        module, optimizer, store = made(mesh)
        step(module, optimizer)
        states = {"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()], "epoch": 3}
        torch.manual_seed(5)
        store.save(store.with_generators(states, mid_epoch=False), path, kind)
        drawn, expected = torch.rand(3), step(module, optimizer)

        other, fresh, reader = made(mesh)
        loaded = reader.load(path, weights_only=True)
        other.load_state_dict(loaded["state_dict"])
        fresh.load_state_dict(*reader.optimizer_states(loaded))
        assert reader.restore_generators(generators_of(loaded)) and torch.equal(torch.rand(3), drawn)
        same[kind] = loaded["epoch"] == 3 and all(map(torch.equal, step(other, fresh), expected))
    return same


def test_save_and_load_without_a_trainer(tmp_path):
    assert run_ranks(2, _save_and_load, str(tmp_path)) == [{"full": True, "sharded": True}] * 2
    plain = net()
    plain.load_state_dict(torch.load(tmp_path / "full", weights_only=True)["state_dict"])
