"""Resuming equals not having stopped: bit for bit on the same ranks, closely on others, in both formats."""

import shutil
import tempfile
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from ranks import run_ranks
from torch.utils.data import DataLoader, RandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from training import EMAWeightAveraging, Net, data, needs_ema, own, trainer, weights

from lightning_phantom import PhantomStrategy
from lightning_phantom.checkpoints.rng import rng_states, set_rng_states

FORMATS = ("full", "sharded")


class Scheduled(Net):
    """Adam with momentum to lose, a schedule to forget, dropout to fall differently, batches to remember."""

    def __init__(self, dropout=0.3):
        super().__init__(dropout)
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch[0].sum().item())
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


class SaveAt(Callback):
    """Saves after one training step: at the end of the epoch if that step is its last."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step and not trainer.is_last_batch:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer, module):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def dataset(dtype):
    return data(32, dtype)


LOADERS = {
    "shuffled": lambda d: DataLoader(d, batch_size=own(8), shuffle=True),
    "own sampler": lambda d: DataLoader(d, batch_size=8, sampler=RandomSampler(d)),
    "workers": lambda d: DataLoader(d, batch_size=own(8), shuffle=True, num_workers=1),
    "stateful": lambda d: StatefulDataLoader(d, batch_size=8, shuffle=True),
}


def shared_folder():
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder, 0)
    return folder[0]


def run(folder, strategy, loader, callbacks=(), ckpt_path=None, precision="32-true", epochs=3, seed=11, dropout=0.3):
    """Train three epochs of four steps; return the module with what it saw, and the generators at the end."""
    L.seed_everything(seed, verbose=False)
    module = Scheduled(dropout)
    t = trainer(
        folder,
        strategy=PhantomStrategy(num_blocks=4, **strategy),
        precision=precision,
        max_epochs=epochs,
        callbacks=list(callbacks),
        use_distributed_sampler=loader in ("shuffled", "workers"),
    )
    dtype = torch.float64 if precision == "64-true" else torch.float32
    t.fit(module, LOADERS[loader](dataset(dtype)), ckpt_path=ckpt_path)
    states = t.optimizers[0].state_dict()["state"]
    return {
        "losses": module.losses,
        "batches": module.batches,
        "weights": weights(module),
        "adam": [v for state in states.values() for v in state.values()],
        "lr": t.optimizers[0].param_groups[0]["lr"],
        "rng": rng_states(),
    }


def same(a, b, start):
    """Whether a run equals one that began at step `start`, in every bit."""
    return {
        "losses": a["losses"][start:] == b["losses"],
        "batches": a["batches"][start:] == b["batches"],
        "weights": all(torch.equal(v, b["weights"][k]) for k, v in a["weights"].items()),
        "adam": all(torch.equal(x, y) for x, y in zip(a["adam"], b["adam"], strict=True)),
        "lr": a["lr"] == b["lr"],
        "rng": torch.equal(a["rng"]["torch"], b["rng"]["torch"]) and a["rng"]["python"] == b["rng"]["python"],
    }


def _bit_for_bit():
    """Every loader in one format; in the other one those that stop at the end of an epoch and within one."""
    ends = [("shuffled", 4), ("stateful", 6)]
    every = [*ends, ("own sampler", 8), ("workers", 4), ("stateful", 8)]
    results = {}
    for kind, loaders in zip(FORMATS, (every, ends) if dist.get_world_size() > 1 else (ends, every), strict=True):
        for loader, step in loaders:
            folder = shared_folder()
            path = f"{folder}/a.ckpt"
            strategy = {"state_dict_type": kind}
            uninterrupted = run(folder, strategy, loader, [SaveAt(step, path)])
            # Another seed: nothing may come from anywhere but the checkpoint.
            resumed = run(folder, strategy, loader, ckpt_path=path, seed=11 if loader != "own sampler" else 12)
            results[kind, loader, step] = same(uninterrupted, resumed, step), resumed["rng"]["torch"]
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(folder)
    return results


@pytest.mark.parametrize("size", [1, 2])
def test_resume_is_bit_for_bit(size):
    results = run_ranks(size, _bit_for_bit, timeout_s=400)
    for result in results:
        for case, (equal, _) in result.items():
            assert all(equal.values()), (case, equal)
    for case, (_, generator) in results[0].items():  # each rank has its own
        assert not any(torch.equal(generator, result[case][1]) for result in results[1:]), case


def long(folder, strategy, **kwargs):
    """Four epochs in 64 bits, with the same masks on any number of ranks: none."""
    return run(folder, strategy, "shuffled", precision="64-true", epochs=4, dropout=0.0, **kwargs)["losses"]


def _written(folder):
    """Save at step 4 in both formats; return the losses of the uninterrupted runs from there."""
    return {
        kind: long(folder, {"state_dict_type": kind}, callbacks=[SaveAt(4, f"{folder}/{kind}.ckpt")])[4:]
        for kind in FORMATS
    }


def _resumed(folder, layouts):
    """Go on from what two ranks have saved: losses, and the weights to begin with."""
    seen = []
    for sizes in layouts:
        losses, start = {}, {}
        for kind in FORMATS:
            path = f"{folder}/{kind}.ckpt"
            losses[kind] = long(folder, sizes, ckpt_path=path)
            module = Scheduled()
            t = trainer(folder, strategy=PhantomStrategy(num_blocks=4, **sizes), precision="64-true")
            t.validate(module, DataLoader(dataset(torch.float64)), ckpt_path=path)
            start[kind] = weights(module)
        seen.append((losses, start))
    return seen


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, run_ranks(2, _written, str(folder))


@pytest.mark.parametrize(("size", "layouts"), [(1, [{}]), (4, [{}, {"phantom_parallel_size": 2}])])
def test_resume_on_other_ranks(written, size, layouts):
    """The ranks' mean losses go on, from the very same weights."""
    folder, results = written
    factors = torch.load(folder / "full.ckpt", weights_only=True)["phantom"]["factors"]
    (saved,) = [entry["tensors"] for entry in factors if entry["path"] == ["state_dict"]]
    by_rank = run_ranks(size, _resumed, str(folder), layouts)
    for n, sizes in enumerate(layouts):
        for kind in FORMATS:
            want = torch.tensor([result[kind] for result in results], dtype=torch.float64).mean(0)
            got = torch.tensor([result[n][0][kind] for result in by_rank], dtype=torch.float64).mean(0)
            error = ((got - want) / want).abs()
            assert len(want) == 12 and error.max() < 1e-9, (size, sizes, kind, error)
            for result in by_rank:
                assert all(torch.equal(result[n][1][kind][name], tensor) for name, tensor in saved.items())


def test_torchs_own_tools_read_a_sharded_checkpoint(written, tmp_path):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    folder, _ = written
    path = folder / "sharded.ckpt"
    version = path / (path / "current").read_text().strip()
    assert [p.name for p in path.iterdir() if p.is_dir()] == [version.name]
    dcp_to_torch_save(version, tmp_path / "plain.pt")
    plain = torch.load(tmp_path / "plain.pt", weights_only=True)
    full = torch.load(folder / "full.ckpt", weights_only=True)["phantom"]["factors"][0]["tensors"]
    for name, tensor in full.items():
        assert torch.equal(plain[f"state_dict/{name}"], tensor), name


# On one rank, in this process


def one(folder, kind="full", **kwargs):
    return trainer(folder, devices=1, strategy=PhantomStrategy(num_blocks=4, state_dict_type=kind), **kwargs)


@needs_ema
@pytest.mark.parametrize("kind", FORMATS)
def test_an_average_is_saved_resumed_and_loads_into_the_plain_module(tmp_path, kind):
    def fit(epochs, path=None):
        L.seed_everything(0, verbose=False)
        module, average = Scheduled(), EMAWeightAveraging(decay=0.5)
        saver = ModelCheckpoint(tmp_path / f"{epochs}", save_last=True)
        t = one(tmp_path, kind, max_epochs=epochs, callbacks=[average, saver], enable_checkpointing=True)
        t.fit(module, DataLoader(dataset(torch.float32), batch_size=8), ckpt_path=path)
        return module, saver.last_model_path

    whole, _ = fit(2)
    _, path = fit(1)
    resumed, _ = fit(2, path)
    for (name, a), b in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b[1]), name
    if kind == "full":
        file = torch.load(path, weights_only=True)
        paths = sorted(entry["path"][0] for entry in file["phantom"]["factors"])
        assert paths == ["current_model_state", "state_dict"]
        averaged, current = Net(), Net()
        averaged.load_state_dict(file["state_dict"])
        current.load_state_dict(file["current_model_state"])
        assert not torch.equal(averaged.net[0].weight, current.net[0].weight)


def test_a_teacher_with_the_same_names_keeps_its_dense_weights(tmp_path):
    """A dense copy under another prefix is not mistaken for the phantom layers it resembles."""

    class Student(Net):
        def __init__(self):
            super().__init__()
            self.teacher = Net()
            self.teacher.requires_grad_(False)

    module = Student()
    strategy = PhantomStrategy(num_blocks=4, plan={"net.*": "phantom"})
    t = trainer(tmp_path, devices=1, strategy=strategy)
    t.fit(module, DataLoader(dataset(torch.float32), batch_size=8))
    t.save_checkpoint(tmp_path / "a.ckpt")
    file = torch.load(tmp_path / "a.ckpt", weights_only=True)
    for name, value in module.teacher.state_dict().items():
        assert torch.equal(file["state_dict"][f"teacher.{name}"], value)
    assert file["state_dict"].keys() == Student().state_dict().keys()


@pytest.mark.parametrize("kind", FORMATS)
def test_the_other_format_takes_the_place_of_a_checkpoint_of_the_same_name(tmp_path, kind):
    path = tmp_path / "a.ckpt"
    other = FORMATS[1 - FORMATS.index(kind)]
    for k in (other, kind, kind):
        t = one(tmp_path, k)
        t.fit(Scheduled(), DataLoader(dataset(torch.float32), batch_size=8))
        t.save_checkpoint(path)
    assert path.is_dir() == (kind == "sharded")
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]
    one(tmp_path, other).validate(Scheduled(), DataLoader(dataset(torch.float32), batch_size=8), ckpt_path=path)


def test_generators_come_back():
    import random

    import numpy as np

    state = rng_states()
    first = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    set_rng_states(state)
    assert first == (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    path = Path(tempfile.mkdtemp()) / "rng"
    torch.save(state, path)
    assert torch.load(path, weights_only=True)["numpy"] == state["numpy"]
