"""Ranks that part ways get an error that names them, within seconds; what they do alike costs no question."""

import random
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn

from lightning_phantom.config import PhantomConfig
from lightning_phantom.distributed import agreement as module
from lightning_phantom.distributed.agreement import Agreement, agreement_of
from lightning_phantom.errors import LayoutError
from lightning_phantom.swap import phantomize_

CONFIG = PhantomConfig(num_blocks=4, init="random")


class Three(nn.Module):
    """Three FFNs, two of one shape and one of another."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.second = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.wide = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))


def made():
    torch.manual_seed(0)
    return phantomize_(Three(), CONFIG, dist.new_group(list(range(dist.get_world_size()))))


def part(kind, warm):
    """What one rank does otherwise: `kind`, after `warm` steps alike."""
    module.PATIENCE_S = 1
    net, rank = made(), dist.get_rank()
    x = torch.randn(3 + rank, 8)

    def alike():
        net.zero_grad()
        (net.first(x) + net.second(x)).square().sum().backward()

    for _ in range(warm):
        alike()
    started = time.monotonic()
    try:
        if kind == "another layer":
            (net.first if rank else net.second)(x)
        elif kind == "another size":
            (net.first if rank else net.wide)(x)
        elif kind == "one more":
            net.first(x)
            if rank:
                net.first(x)
            net.second(x)
        elif kind == "an inner one less":
            z = net.first[0](x)
            (net.first[2](z.relu()) if rank else z).sum()
        elif kind == "a gather more":
            z = net.first[0](x)
            if rank:
                z.sum()
            net.first[2](z.relu()).sum()
        elif kind == "no backward through one":
            a, b = net.first(x), net.second(x)
            (a if rank else a + b).square().sum().backward()
            alike()
    except LayoutError as error:
        return str(error), time.monotonic() - started
    return "nothing", time.monotonic() - started


KINDS = {
    "another layer": ("'first.0'", "'second.0'"),
    "another size": ("'first.0'", "'wide.0'"),
    "one more": ("'first.0'", "'second.0'"),
    "an inner one less": ("'first.2'", "exit of 'first.0'"),
    "a gather more": ("exit of 'first.0'", "'first.2'"),
    "no backward through one": ("'second.2'", "'first.2'"),
}


@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_part_are_named(kind, warm):
    for said, seconds in run_ranks(2, part, kind, warm, timeout_s=60):
        assert all(name in said for name in KINDS[kind]), said
        assert "rank 0" in said and "rank 1" in said and "Every rank of a group must call" in said
        assert seconds < 30


def questions():
    net, rank = made(), dist.get_rank()
    asked = []
    own = Agreement._ask
    Agreement._ask = lambda self, what, *args: asked.append(what) or own(self, what, *args)
    counts = []
    for _ in range(4):
        for rows in (3 + rank, 5 - rank, 0 if rank else 2):  # other rows every time
            asked.clear()
            x = torch.randn(rows, 8, requires_grad=True)
            (net.first(x) + net.second(x * 2)).square().sum().backward()
            counts.append(len(asked))
    return counts


def test_what_was_done_before_is_asked_for_at_entries_only():
    for counts in run_ranks(2, questions):
        assert counts[0] > 2
        assert set(counts[1:]) == {2}, counts


def fuzz(cases):
    """Random programs; in most cases one rank leaves out a call, adds one or swaps two."""
    module.PATIENCE_S = 0.3
    rank, generator = dist.get_rank(), random.Random(0)
    net = made()
    ends = {"alike": 0, "named": 0}
    for case in range(cases):
        group = dist.new_group([0, 1])  # one that nobody waits in any more
        for layer in net.modules():
            if hasattr(layer, "ranks"):
                layer.ranks = type(layer.ranks)(group)
        program = [(generator.choice(["first", "second", "wide"]), generator.randint(0, 4)) for _ in range(4)]
        mine, victim = list(program), generator.randint(0, 1)
        change = generator.choice(["none", "leave out", "add", "swap"])
        at = generator.randrange(3)
        if victim == rank and change == "leave out":
            del mine[at]
        elif victim == rank and change == "add":
            mine.insert(at, mine[at])
        elif victim == rank and change == "swap":
            mine[at], mine[at + 1] = mine[at + 1], mine[at]
        told = [None, None]
        dist.all_gather_object(told, [name for name, _ in program] != [name for name, _ in mine])
        error = None
        try:
            total = 0
            for name, rows in mine:
                total = total + getattr(net, name)(torch.ones(rows + rank, 8)).square().sum()
            total.backward()
            agreement_of(group).step("end of the program")
        except LayoutError as caught:
            error = caught
        if any(told):
            assert error is not None and "rank 0" in str(error) and "rank 1" in str(error), (case, error)
            ends["named"] += 1
        else:
            assert error is None, (case, error)
            ends["alike"] += 1
    return ends


def test_fuzzed_programs_on_two_ranks_end_alike_or_named():
    ends = run_ranks(2, fuzz, 100, timeout_s=200)[0]
    assert ends["alike"] > 20 and ends["named"] > 40, ends


def dies():
    net, rank = made(), dist.get_rank()
    if rank:
        raise KeyError("a cursed sample")
    net.first(torch.ones(2, 8))


def test_a_rank_that_is_gone_is_noticed():
    with pytest.raises(AssertionError, match=r"a cursed sample|in the question before the entry of 'first\.0'"):
        run_ranks(2, dies, timeout_s=60)


class FrozenStore:
    """A store whose host is stopped: it takes questions and does not answer."""

    def set(self, key, value):
        time.sleep(1000)


def frozen():
    """One rank does not come, and is the store's host."""
    module.PATIENCE_S = 1
    module._store = lambda group: FrozenStore()
    group = dist.new_group([0, 1], timeout=timedelta(seconds=6))
    agreement_of(group).timeout = timedelta(seconds=6)
    net = phantomize_(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), CONFIG, group)
    net(torch.ones(2, 8)).sum().backward()
    if dist.get_rank():
        return time.sleep(15)
    with pytest.raises(RuntimeError, match="while waiting for the other ranks, in the question before the entry"):
        net(torch.ones(2, 8))


def test_a_rank_that_is_frozen_with_the_store_is_given_up_after_the_timeout():
    run_ranks(2, frozen, timeout_s=60)


class Broken:
    """A collective that ends because another rank has gone."""

    def wait(self, timeout):
        raise RuntimeError("Connection closed by peer")

    def is_completed(self):
        return True


def leaves_first():
    group = dist.new_group([0, 1])
    if dist.get_rank():
        module._Board(module._store(group), 1, 2).write("7 exit of 'second.2'")
    dist.barrier()
    if dist.get_rank() == 0:
        with pytest.raises(LayoutError, match=r"rank 0 in the exit of 'first\.2'; rank 1 in the exit of 'second\.2'"):
            agreement_of(group)._watch(Broken(), "exit of 'first.2'")


def test_a_rank_that_has_raised_and_gone_does_not_take_the_reason_with_it():
    run_ranks(2, leaves_first, timeout_s=60)
