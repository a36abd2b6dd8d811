"""Checkpoints of format version 1, saved on two ranks by an earlier release, load for ever."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from training import Net, loader, own, trainer

from lightning_phantom import PhantomStrategy, densify

DATA = Path(__file__).parents[1] / "data"
FORMATS = ("full", "sharded")
STEPS = 8  # of the epoch that the saved fit had


def averaged(losses):
    losses = torch.tensor(losses)
    dist.all_reduce(losses)
    return losses / dist.get_world_size()


def net():
    return Net(dropout=0.0, lr=0.01, optimizer=torch.optim.AdamW)


def outputs_of(module):
    with torch.no_grad():
        return densify(module).eval()(torch.linspace(-1, 1, 64).view(4, 16))


def _load_and_go_on(folder):
    """For each format outputs of what is loaded, and one more epoch with the optimizer's state: steps, mean losses."""
    seen = {}
    for kind in FORMATS:
        path, loaded, resumed = f"{folder}/{kind}.ckpt", net(), net()
        t = trainer(folder, strategy=PhantomStrategy(num_blocks=4))
        t.validate(loaded, loader(), ckpt_path=path, verbose=False)
        t = trainer(folder, strategy=PhantomStrategy(num_blocks=4, state_dict_type=kind), max_epochs=2)
        t.fit(resumed, loader(batch_size=own(8)), ckpt_path=path)
        steps = {int(state["step"]) for state in t.optimizers[0].state.values()}
        seen[kind] = outputs_of(loaded), t.global_step, steps, averaged(resumed.losses)
    return seen


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("version_1")
    shutil.copy(DATA / "version_1_full.ckpt", folder / "full.ckpt")
    shutil.copytree(DATA / "version_1_sharded.ckpt", folder / "sharded.ckpt")
    return folder


@pytest.fixture(scope="module")
def results(copied):
    return {size: run_ranks(size, _load_and_go_on, str(copied)) for size in (1, 2)}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", FORMATS)
def test_weights_and_optimizer_load(results, kind, size):
    expected = torch.load(DATA / "version_1_outputs.pt", weights_only=True)[kind]
    alone = results[1][0][kind]
    for outputs, global_step, steps, losses in (seen[kind] for seen in results[size]):
        torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)
        assert global_step == 2 * STEPS and steps == {2 * STEPS}
        torch.testing.assert_close(losses, alone[3], rtol=1e-4, atol=0)
        assert losses[-1] < 2


def test_the_full_one_loads_without_the_package(copied):
    module = net()
    module.load_state_dict(torch.load(copied / "full.ckpt", weights_only=True)["state_dict"])
    expected = torch.load(DATA / "version_1_outputs.pt", weights_only=True)["full"]
    with torch.no_grad():
        outputs = module.eval()(torch.linspace(-1, 1, 64).view(4, 16))
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)
