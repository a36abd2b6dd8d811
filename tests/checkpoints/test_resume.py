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
from training import EMAWeightAveraging, Net, data, needs_ema, own, trainer

from lightning_phantom import PhantomStrategy
from lightning_phantom.checkpoints.rng import rng_states, set_rng_states
from lightning_phantom.layers.split import split_layers

FORMATS = ("full", "sharded")


def whole_weights(module):
    layers = split_layers(module)
    return {
        name: layers[name.rpartition(".")[0]].global_tensor(name.rpartition(".")[2])
        if name.rpartition(".")[0] in layers
        else parameter.detach().clone()
        for name, parameter in module.named_parameters()
    }


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
    "shuffled": lambda d: DataLoader(d, batch_size=8, shuffle=True),
    "shared out": lambda d: DataLoader(d, batch_size=own(8)),
    "own sampler": lambda d: DataLoader(d, batch_size=8, sampler=RandomSampler(d)),
    "workers": lambda d: DataLoader(d, batch_size=8, shuffle=True, num_workers=1),
    "stateful": lambda d: StatefulDataLoader(d, batch_size=8, shuffle=True),
}


def shared_folder():
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder, 0)
    return folder[0]


def run(folder, strategy, loader, callbacks=(), ckpt_path=None, precision="32-true", epochs=3, seed=11, dropout=0.3):
    """Train on 32 rows an epoch; return the module with what it saw, and the generators at the end."""
    L.seed_everything(seed, verbose=False)
    module = Scheduled(dropout)
    t = trainer(
        folder,
        strategy=PhantomStrategy(num_blocks=4, **strategy),
        precision=precision,
        max_epochs=epochs,
        callbacks=list(callbacks),
        use_distributed_sampler=loader in ("shuffled", "shared out", "workers"),
    )
    dtype = torch.float64 if precision == "64-true" else torch.float32
    t.fit(module, LOADERS[loader](dataset(dtype)), ckpt_path=ckpt_path)
    states = t.optimizers[0].state_dict()["state"]
    return {
        "losses": module.losses,
        "batches": module.batches,
        "weights": whole_weights(module),
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
            results[kind, loader, step] = same(uninterrupted, resumed, step)
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(folder)
    return results


@pytest.mark.parametrize("size", [1, 2])
def test_resume_is_bit_for_bit(size):
    for result in run_ranks(size, _bit_for_bit, timeout_s=400):
        for case, equal in result.items():
            assert all(equal.values()), (case, equal)


PRECISIONS = ("32-true", "64-true")


def shared_out(folder, strategy, precision, **kwargs):
    """The losses of all ranks' batches together, of a run that is the same on any ranks: as many rows, no dropout."""
    result = run(folder, strategy, "shared out", precision=precision, epochs=4, dropout=0.0, **kwargs)
    losses = torch.tensor(result["losses"], dtype=torch.float64)
    dist.all_reduce(losses)
    return losses / dist.get_world_size()


def _write_both(folder):
    """Save at step 4 in both formats; return the losses that follow."""
    return {
        (precision, kind): shared_out(
            folder, {"state_dict_type": kind}, precision, callbacks=[SaveAt(4, f"{folder}/{kind}-{precision}.ckpt")]
        )[4:]
        for precision in PRECISIONS
        for kind in FORMATS
    }


def _resume_both(folder, *sizes):
    return [
        {
            (precision, kind): shared_out(folder, size, precision, ckpt_path=f"{folder}/{kind}-{precision}.ckpt")
            for precision in PRECISIONS
            for kind in FORMATS
        }
        for size in sizes
    ]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a checkpoint of two ranks in either format and precision, and the losses that follow there."""
    folder = tmp_path_factory.mktemp("written")
    return folder, run_ranks(2, _write_both, str(folder))[0]


def test_resume_on_other_ranks_and_in_more_groups(written):
    folder, expected = written
    for ranks, sizes in ((1, [{}]), (4, [{}, {"phantom_parallel_size": 2}])):
        for losses in run_ranks(ranks, _resume_both, str(folder), *sizes)[0]:
            for (precision, kind), got in losses.items():
                want = expected[precision, kind]
                assert len(want) == 12
                error = ((got - want) / want).abs()
                limit = (1e-9, 1e-9) if precision == "64-true" else (1e-6, 1e-4)
                assert error[0] < limit[0] and error.max() < limit[1], (ranks, precision, kind, error)


def _groups(folder):
    """Load on two groups of two."""
    seen = {}
    for kind in FORMATS:
        module = Scheduled()
        t = trainer(folder, strategy=PhantomStrategy(num_blocks=4, phantom_parallel_size=2))
        t.validate(module, DataLoader(dataset(torch.float32), batch_size=8), ckpt_path=f"{folder}/{kind}-32-true.ckpt")
        seen[kind] = whole_weights(module)
    return seen


def test_more_groups_load_the_same_weights(written):
    folder, _ = written
    factors = torch.load(folder / "full-32-true.ckpt", weights_only=True)["phantom"]["factors"]
    (entry,) = [entry["tensors"] for entry in factors if entry["path"] == ["state_dict"]]
    for result in run_ranks(4, _groups, str(folder)):
        for kind in FORMATS:
            assert all(torch.equal(result[kind][name], tensor) for name, tensor in entry.items())


def test_torchs_own_tools_read_a_sharded_checkpoint(written, tmp_path):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    path = written[0] / "sharded-32-true.ckpt"
    version = path / (path / "current").read_text().strip()
    assert [p.name for p in path.iterdir() if p.is_dir()] == [version.name]
    dcp_to_torch_save(version, tmp_path / "plain.pt")
    plain = torch.load(tmp_path / "plain.pt", weights_only=True)
    full = torch.load(written[0] / "full-32-true.ckpt", weights_only=True)["phantom"]["factors"][0]["tensors"]
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
