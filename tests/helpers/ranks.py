"""Runs a module-level function on n gloo ranks, each a process of its own, and gives back what each returned."""

import io
import os
import tempfile
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(n, function, *args, timeout_s=240):
    """Call `function(*args)` on ranks 0..n-1 of a gloo group; return their results, or raise what one raised."""
    # Forked from a process that has done nothing but import: a start takes tenths of a second, not ten seconds.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(
        [
            *("lightning_phantom.commands.cli", "torchmetrics.classification", "torch.distributed.checkpoint"),
            *("transformers.models.llama.modeling_llama", "sklearn.metrics", "hypothesis", "pytest", "frozen"),
        ]
    )
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        processes = [
            context.Process(target=_child, args=(rank, n, store, queue, dict(os.environ), function, args))
            for rank in range(n)
        ]
        for process in processes:
            process.start()
        results, deadline = {}, time.monotonic() + timeout_s
        try:
            while len(results) < n:
                try:
                    rank, ok, value = queue.get(timeout=1)
                except Exception:
                    dead = [r for r, p in enumerate(processes) if p.exitcode not in (None, 0) and r not in results]
                    if dead or time.monotonic() > deadline:
                        raise AssertionError(
                            f"ranks {dead} died without a word" if dead else f"no answer within {timeout_s} s"
                        ) from None
                    continue
                if not ok:
                    raise AssertionError(f"rank {rank} failed:\n{value}")
                results[rank] = torch.load(io.BytesIO(value), weights_only=False)
        finally:
            for process in processes:
                if len(results) < n:
                    process.kill()
                process.join(30)
                process.kill()
        return [results[rank] for rank in range(n)]


def mean_over_ranks(tensors):
    """The mean over all ranks of each tensor, in one collective: as DistributedDataParallel leaves gradients."""
    together = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(together)
    means = (together / dist.get_world_size()).split([tensor.numel() for tensor in tensors])
    return [mean.view_as(tensor) for mean, tensor in zip(means, tensors, strict=True)]


def _child(rank, n, store, queue, environment, function, args):
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    torch.manual_seed(0)  # what the process was forked from has drawn a seed at random
    mp.set_start_method("fork", force=True)  # for workers of dataloaders, as in any other process
    try:
        dist.init_process_group("gloo", store, rank=rank, world_size=n, timeout=timedelta(seconds=120))
        buffer = io.BytesIO()
        torch.save(function(*args), buffer)
        dist.barrier()
        queue.put((rank, True, buffer.getvalue()))
        dist.destroy_process_group()
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
