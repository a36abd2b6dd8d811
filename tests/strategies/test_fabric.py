"""Fabric, where the training loop is one's own: the same training as the Trainer's, clipping and checkpoints."""

import copy
import os
import tempfile
from itertools import islice

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins import TorchCheckpointIO
from ranks import run_ranks
from torch import nn
from training import Net, loader, own, trainer, weights

from examples import fabric_digits
from lightning_phantom import PhantomLinear, PhantomStrategy
from lightning_phantom.errors import CheckpointError, PhantomError, PlanError
from lightning_phantom.strategies.fabric import PhantomFabricStrategy

DOUBLE = {"dtype": torch.float64}


def launched(**kwargs):
    os.environ.setdefault("NODE_RANK", "0")
    devices = dist.get_world_size() if dist.is_initialized() else 1
    strategy = PhantomFabricStrategy(num_blocks=4, **kwargs)
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=strategy)
    fabric.launch()
    return fabric


def made(fabric, make=torch.optim.AdamW):
    L.seed_everything(5, verbose=False)
    module = Net(dropout=0.0).double()
    return module, *fabric.setup(module, make(module.parameters(), lr=0.01))


def step(fabric, model, optimizer, batches, max_norm=0.2, accumulate=1):
    """Train on batches, and return losses and norms."""
    losses, norms = [], []
    for n, (x, y) in enumerate(batches, 1):
        with fabric.no_backward_sync(model, enabled=n % accumulate != 0):
            loss = nn.functional.cross_entropy(model(x), y)
            fabric.backward(loss / accumulate)
        losses.append(loss.item())
        if n % accumulate == 0:
            norms.append(fabric.clip_gradients(model, optimizer, max_norm=max_norm).item())
            optimizer.step()
            optimizer.zero_grad()
    return losses, norms


def with_trainer(sizes, accumulate):
    L.seed_everything(5, verbose=False)
    module = Net(dropout=0.0, lr=0.01, optimizer=torch.optim.AdamW).double()
    strategy = PhantomStrategy(num_blocks=4, **sizes)
    options = {"gradient_clip_val": 0.2, "accumulate_grad_batches": accumulate}
    t = trainer(tempfile.gettempdir(), strategy=strategy, **options)
    t.fit(module, loader(batch_size=own(8), shuffle=True, **DOUBLE))
    return module.losses, weights(module)


def with_fabric(sizes, accumulate):
    fabric = launched(**sizes)
    module, model, optimizer = made(fabric)
    batches = fabric.setup_dataloaders(loader(batch_size=own(8), shuffle=True, **DOUBLE))
    losses, norms = step(fabric, model, optimizer, batches, accumulate=accumulate)
    return losses, weights(module), norms


def trainings(layouts):
    return [(with_trainer(sizes, n), with_fabric(sizes, n)) for sizes in layouts for n in (1, 2)]


LAYOUTS = {1: [{}], 2: [{"phantom_parallel_size": 2}, {"phantom_parallel_size": 1}], 4: [{"phantom_parallel_size": 2}]}


@pytest.fixture(scope="module")
def trained():
    return {ranks: run_ranks(ranks, trainings, layouts) for ranks, layouts in LAYOUTS.items()}


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_the_same_training_as_the_trainers(trained, ranks):
    for seen in trained[ranks]:
        for (losses, expected), (found, whole, norms) in seen:
            assert found == losses and len(found) == 8
            assert all(torch.equal(whole[name], tensor) for name, tensor in expected.items())
            assert min(norms) > 0.2  # clipping did something


def test_losses_on_any_ranks_are_those_of_one_process(trained):
    def mean(ranks, case):
        return torch.tensor([seen[case][1][0] for seen in trained[ranks]], **DOUBLE).mean(0)

    for accumulate in (0, 1):
        for ranks, layouts in LAYOUTS.items():
            for case in range(len(layouts)):
                assert torch.allclose(mean(1, accumulate), mean(ranks, 2 * case + accumulate), rtol=1e-9), (ranks, case)


# Checkpoints


def checkpointed(kind):
    folder = [tempfile.mkdtemp()]
    if dist.is_initialized():
        dist.broadcast_object_list(folder, 0)
    path = f"{folder[0]}/a"
    fabric = launched(state_dict_type=kind)
    batches = list(loader(batch_size=4, **DOUBLE))[fabric.global_rank :: fabric.world_size]
    module, model, optimizer = made(fabric)
    step(fabric, model, optimizer, batches[:4])
    average = copy.deepcopy(module)
    fabric.save(path, {"model": model, "average": average, "adam": optimizer, "epoch": 3})
    expected = step(fabric, model, optimizer, batches[4:])

    fresh, other, adam = made(fabric)
    twin = copy.deepcopy(fresh)
    state = {"model": other, "average": twin, "adam": adam, "epoch": 0}
    rest = fabric.load(path, state)
    saved = weights(average)
    same = all(torch.equal(saved[name], tensor) for name, tensor in weights(twin).items())
    again = step(fabric, other, adam, batches[4:])
    alone = made(fabric)[1]
    fabric.load(path, {"model": alone})
    errors = []
    for wrong in ({"model": alone, "absent": 1}, {"model": alone, "adam": adam, "another": made(fabric)[2]}):
        try:
            fabric.load(path, wrong)
        except CheckpointError as error:
            errors.append(str(error).removeprefix(path))
    return again == expected, same, state["epoch"], rest, errors, path


@pytest.mark.parametrize("ranks", [1, 2])
def test_checkpoints(ranks):
    for kind in ("full", "sharded"):
        for same, average_same, epoch, rest, errors, path in run_ranks(ranks, checkpointed, kind):
            assert (same, average_same, epoch, rest) == (True, True, 3, {})
            assert errors == [
                " has no 'absent'; with strict=False it is left as it is.",
                "the checkpoint has 1 optimizers, the module 2.",
            ]
            if kind == "full":
                file = torch.load(path, weights_only=True)
                Net().load_state_dict(file["model"])
                Net().load_state_dict(file["average"])


def test_a_raw_state_dict_and_a_dense_checkpoint_load(tmp_path):
    dense = Net(dropout=0.0).double()
    torch.save(dense.state_dict(), tmp_path / "raw")
    torch.save({"model": dense.state_dict()}, tmp_path / "dense")
    exact = {"phantom_width": 10**6, "plan": {"net.*": "phantom"}}
    for name in ("raw", "dense"):
        fabric = launched(**exact)
        module, model, _ = made(fabric)
        if name == "raw":
            fabric.load_raw(tmp_path / name, model)
        else:
            fabric.load(tmp_path / name, {"model": model})
        x = torch.randn(3, 16, dtype=torch.float64)
        assert isinstance(module.net[0], PhantomLinear) and torch.allclose(module(x), dense(x), rtol=1e-9)


# Refusals


def test_a_checkpoint_io_of_your_own(tmp_path):
    class Counts(TorchCheckpointIO):
        saved = 0

        def save_checkpoint(self, *args, **kwargs):
            self.saved += 1
            super().save_checkpoint(*args, **kwargs)

    io = Counts()
    strategy = PhantomFabricStrategy(num_blocks=4)
    fabric = Fabric(accelerator="cpu", devices=1, strategy=strategy, plugins=[io])
    fabric.launch()
    _, model, _ = made(fabric)
    fabric.save(tmp_path / "a", {"model": model})
    assert io.saved == 1 and (tmp_path / "a").is_file()


def test_what_is_refused(tmp_path):
    with pytest.raises(PhantomError, match=r"state_dict_type='whole': choose 'full' or 'sharded'"):
        PhantomFabricStrategy(state_dict_type="whole")
    with pytest.raises(PhantomError, match=r"call fabric.launch\(\) first"):
        _ = PhantomFabricStrategy(num_blocks=4).mesh
    fabric = launched()
    with pytest.raises(PlanError, match="nothing in Linear qualifies as a phantom layer"):
        fabric.setup(nn.Linear(5, 5))
    _, model, optimizer = made(fabric)
    with pytest.raises(PhantomError, match="a filter would tear the factors of phantom layers apart"):
        fabric.save(tmp_path / "a", {"model": model}, filter={"model": lambda key, value: "bias" not in key})
    other = fabric.setup(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)))
    with pytest.raises(PhantomError, match="these modules have other phantom layers than each other"):
        fabric.save(tmp_path / "a", {"model": model, "other": other})
    x, y = next(islice(loader(**DOUBLE), 1))
    fabric.backward(nn.functional.cross_entropy(model(x * float("nan")), y))
    with pytest.raises(RuntimeError, match="The norm of the gradients is nan"):
        fabric.clip_gradients(model, optimizer, max_norm=1.0)


# The example


def digits():
    os.environ.setdefault("NODE_RANK", "0")
    os.chdir(tempfile.mkdtemp())
    return fabric_digits.main(devices=2)


def test_the_example():
    first, second = run_ranks(2, digits)
    assert first == second > 0.9
