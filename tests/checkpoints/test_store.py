"""Checkpoints without a Trainer: a module, its optimizers and the ranks will do."""

import copy
from datetime import timedelta

import torch
from ranks import run_ranks
from torch import nn

from lightning_phantom import PhantomConfig, densify, phantomize_
from lightning_phantom.checkpoints.files import AtomicCheckpointIO
from lightning_phantom.checkpoints.format import generators_of
from lightning_phantom.checkpoints.full import stand_ins
from lightning_phantom.checkpoints.store import Store
from lightning_phantom.distributed.mesh import Sizes, make_mesh
from lightning_phantom.layers.factors import Factors, to_dense
from lightning_phantom.layers.phantom import FACTORS


def net():
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))


def made(mesh, make=net):
    module = phantomize_(make(), PhantomConfig(4, 2), mesh and mesh.phantom.process_group)
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


# A gate and what it gates in one linear, of whose halves a block has its share each


def gated():
    return nn.Sequential(nn.Linear(16, 64), nn.GLU(), nn.Linear(32, 16))


def _gate(folder):
    mesh, seen = make_mesh(Sizes(2, 1, 4), timedelta(minutes=2)), {}
    torch.manual_seed(0)
    module, optimizer, store = made(mesh, gated)
    step(module, optimizer)
    x = torch.randn(5, 16)
    expected = module(x)[:]
    for kind in ("full", "sharded"):
        store.save({"state_dict": module.state_dict()}, f"{folder}/{kind}", kind)
        other, _, reader = made(mesh, gated)
        other.load_state_dict(reader.load(f"{folder}/{kind}", weights_only=True)["state_dict"])
        seen[kind] = torch.equal(other(x)[:], expected)

    loaded = reader.read(f"{folder}/full", weights_only=True)
    as_read = stand_ins(loaded)
    bias = loaded["state_dict"]["0.bias"] = torch.arange(64.0)  # somebody's own, before it is loaded
    other.load_state_dict(reader.fit(loaded, as_read)["state_dict"])
    seen["own bias"] = torch.equal(densify(other)[0].bias, bias)

    early = reader.read(f"{folder}/full", weights_only=True)
    assert early["phantom"]["layers"]["0"].pop("parts") == 2
    average = copy.deepcopy(other)
    share = reader.fit(early)["state_dict"]
    other.load_state_dict(share)
    average.load_state_dict(share)
    tensors = early["phantom"]["factors"][0]["tensors"]
    weight = to_dense(Factors(*(tensors[f"0.{name}"] for name in FACTORS[:3])), 4)
    for made_of, name in ((other, "early"), (average, "early average")):
        dense = densify(made_of)
        close = torch.allclose(made_of(x)[:], dense(x), atol=1e-6)
        seen[name] = close and torch.equal(dense[0].weight, weight) and torch.equal(dense[0].bias, tensors["0.bias"])
    assert "parts" not in other[0].record()
    return seen, x, expected.detach()


def test_a_gate_in_one_linear(tmp_path):
    plain = gated()
    for seen, x, expected in run_ranks(2, _gate, str(tmp_path)):
        assert len(seen) == 5 and all(seen.values()), seen
        plain.load_state_dict(torch.load(tmp_path / "full", weights_only=True)["state_dict"])
        assert torch.allclose(plain(x), expected, atol=1e-6)
    # In one process the same function, and the same factors.
    module, _, store = made(None, gated)
    module.load_state_dict(store.load(str(tmp_path / "full"), weights_only=True)["state_dict"])
    assert module[0].parts == 2 and torch.allclose(module(x), expected, atol=1e-6)
