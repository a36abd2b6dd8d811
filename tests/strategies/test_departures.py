"""Ranks that go different ways in a fit: an error on each, within seconds, that says where they are."""

import re
import tempfile
from concurrent.futures import ThreadPoolExecutor

import lightning as L
import pytest
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from training import Net, loader, trainer

from lightning_phantom import PhantomStrategy


class Departs(Net):
    """Does something else on the last rank in the third step."""

    def __init__(self, kind):
        super().__init__(dropout=0.0)
        self.kind = kind
        self.other = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, x):
        x, kind = self.norm(x), ""
        if self.training and self.global_step == 2 and self.global_rank == 1:
            kind = self.kind
        if kind == "calls it twice":
            self.net(x)
        y = x if kind == "skips it" else self.other(x) if kind == "calls another" else self.net(x)
        return self.tail(y.detach() if kind.startswith("leaves it out") else y)


def fit(kind, kwargs):
    dist.barrier = lambda *args, **kwargs: None  # at the end of a child, where the ranks do not meet again
    L.seed_everything(5, verbose=False)
    t = trainer(tempfile.gettempdir(), strategy=PhantomStrategy(num_blocks=4, **kwargs))
    try:
        t.fit(Departs(kind), loader(batch_size=4))
    except Exception as error:
        return type(error).__name__, str(error)


UNUSED = {"find_unused_parameters": True}
CASES = {  # what the second rank does: arguments, and where each is then
    "skips it": (UNUSED, "entry of 'net.0' 16", "reduction of a logged value"),
    "calls another": (UNUSED, "entry of 'net.0' 16", "entry of 'other.0' 16"),
    "calls it twice": ({}, "the exit of 'net.6' 8", "the question before the entry of 'net.0' 16"),
    "leaves it out of the backward": ({}, "the gradient: exit of 'net.6' 8", "the end of the backward"),
    "leaves it out, found unused": (UNUSED, "the gradient: exit of 'net.6' 8", "the end of the backward"),
}


@pytest.fixture(scope="module")
def departed():
    """What each rank has raised, by what the second does; one start each, beside each other."""
    with ThreadPoolExecutor(len(CASES)) as pool:
        started = {kind: pool.submit(run_ranks, 2, fit, kind, kwargs) for kind, (kwargs, *_) in CASES.items()}
        return {kind: future.result() for kind, future in started.items()}


@pytest.mark.parametrize("kind", CASES)
def test_ranks_that_part_in_a_fit_are_named(departed, kind):
    _, first, second = CASES[kind]
    for name, said in departed[kind]:
        assert name == "LayoutError"
        assert re.search(rf"rank 0(: | in ).*{first}.*; rank 1(: | in ).*{second}.*\. Every rank", said), said
