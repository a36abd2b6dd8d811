"""Every architecture of transformers: which linears are found, and whether the swapped model is the dense one.

    python benchmarks/models.py --results models.jsonl          # all; run again, it goes on where it was
    python benchmarks/models.py --results models.jsonl --only bert llama
    python benchmarks/models.py --results models.jsonl --markdown docs/models.md

Each architecture is made tiny (`tiny_models`) and tried by two processes of its own, so that none ends the others:

- found: of the linears that are feed-forward by name and sizes (`ffn_linears`), how many the plan makes phantom;
- one process: at full width, outputs and every gradient are the dense model's on the whole batch, in float64;
- two ranks: likewise with a half of the batch each, against the dense model on one half after the other.

The gradients of L, C and D are held to the dense weight's, by the chain rule. What is not equal is printed, and the
exit code is then 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from ffn_linears import ffn_linears
from tiny_models import Feed, architectures, class_of, make
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_phantom import PhantomConfig, phantomize_, plan_phantom
from lightning_phantom.layers.split import sharded_parameters, split_layers

BATCH, TOLERANCE = 4, 1e-8
NARROW = PhantomConfig(2, phantom_width=1)
LOW = torch.float32, torch.float16, torch.bfloat16


class InFloat64(TorchFunctionMode):
    """Norms and softmaxes that a model computes in float32, in float64 instead."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        kwargs = {
            k: torch.float64 if v in LOW else v for k, v in (kwargs or {}).items() if isinstance(v, torch.dtype)
        } | {k: v for k, v in (kwargs or {}).items() if not isinstance(v, torch.dtype)}
        return func(*(torch.float64 if isinstance(a, torch.dtype) and a in LOW else a for a in args), **kwargs)


# One architecture, on one rank of two


def examine(name: str, rank: int, store: str) -> dict[str, Any]:
    """What there is to say of an architecture."""
    found: dict[str, Any] = {"name": name, "class": class_of(name)}
    torch.set_default_dtype(torch.float64)
    try:
        dense = make(name)
    except Exception as error:
        return found | {"not_built": _words(error)}
    wanted, plan = ffn_linears(dense), plan_phantom(dense, NARROW)
    swapped = [layer.name for layer in plan.swapped]
    missed = {layer.name: layer.reason for layer in plan.layers if layer.name in wanted and not layer.swapped}
    found |= {
        "wanted": len(wanted),
        "found": len(set(wanted) & set(swapped)),
        "others": len(set(swapped) - set(wanted)),
    }
    found["missed"] = missed
    try:  # each forward by a copy of its own: some keep what they have computed
        feed = Feed(copy.deepcopy(dense), BATCH)
        halves = slice(0, BATCH // 2), slice(BATCH // 2, BATCH)
        models = [copy.deepcopy(dense) for _ in range(4)]
        parts = slice(0, BATCH), *halves, halves[rank]
        whole, *apart, again = (outputs_of(model, feed(part)) for model, part in zip(models, parts, strict=True))
        if not all(torch.isfinite(x).all() for x in whole):
            raise ArithmeticError("its outputs are not finite")
        if not any(x.requires_grad for x in whole):
            raise ValueError("no output has a gradient")
        if not all(map(same, again, apart[rank])):
            raise ArithmeticError("it gives two outputs for one input")
    except Exception as error:
        return found | {"not_run": _words(error)}
    # Outputs in which a sample depends on the others of its batch are compared, but have no part in the loss.
    joined = [torch.cat(parts) if all(p.dim() for p in parts) else parts[0] for parts in zip(*apart, strict=True)]
    alone = [n for n, (x, y) in enumerate(zip(whole, joined, strict=True)) if x.dim() and same(x, y)]
    alone = [n for n in alone if whole[n].requires_grad]
    found["coupled"] = not alone
    alone = alone or [n for n, x in enumerate(whole) if x.requires_grad]

    if not swapped:
        return found
    config = PhantomConfig(2, phantom_width=1.0, plan=dict.fromkeys(swapped, "phantom"))
    loss_of(whole, alone).backward()
    expected = gradients(models[0])
    mine = phantomize_(copy.deepcopy(dense), config)
    outputs = outputs_of(mine, feed(slice(0, BATCH)))
    loss_of(outputs, alone).backward()
    found["one"] = differences(mine, whole, outputs, expected)

    for outputs in apart:
        (loss_of(outputs, alone) / 2).backward()
    expected = total_of(*map(gradients, models[1:3]))
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    mine = phantomize_(dense, config, dist.group.WORLD)
    outputs = outputs_of(mine, feed(halves[rank]))
    loss_of(outputs, alone).backward()
    found["two"] = differences(mine, apart[rank], outputs, expected)
    dist.barrier()
    return found


def outputs_of(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """The floating point tensors that a model returns, in order."""
    torch.manual_seed(0)
    random.seed(0)
    with InFloat64():
        return list(_tensors(model(**inputs)))


def _tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value + 0 if type(value) is not Tensor else value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def loss_of(outputs: list[Tensor], which: list[int]) -> Tensor:
    """A sum over the batch in which no output of a sample counts like another, and every sample like the others."""
    total = outputs[which[0]].new_zeros(())
    for n in which:
        x = outputs[n]
        each = x[:1].numel() if x.dim() else 1
        total = total + (x.reshape(-1, each) * torch.arange(each).sin()).sum()
    return total


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def total_of(one: dict[str, Tensor | None], other: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {
        name: y if x is None else x if y is None else x + y
        for (name, x), y in zip(one.items(), other.values(), strict=True)
    }


def same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and bool((x - y).abs().max() <= TOLERANCE * max(1, y.abs().max())) if x.numel() else True


@torch.no_grad()
def differences(
    mine: nn.Module, whole: list[Tensor], outputs: list[Tensor], expected: dict[str, Tensor | None]
) -> list[str]:
    """What of the outputs and the gradients of `mine`, of all ranks together, is not the dense model's."""
    wrong = [f"output {n}" for n, (x, y) in enumerate(zip(outputs, whole, strict=True)) if not same(x, y)]
    splits, layers = sharded_parameters(mine), split_layers(mine)
    for name, parameter in mine.named_parameters():
        owner, _, kind = name.rpartition(".")
        if owner in layers and kind != "bias":
            wanted = pulled_back(layers[owner], kind, expected[f"{owner}.weight"])
        else:
            wanted = expected[name]
        got = parameter.grad
        lacks = torch.tensor(float(got is None))
        if dist.is_initialized():
            dist.all_reduce(lacks)
            got = torch.zeros_like(parameter) if got is None else got
            if id(parameter) in splits:
                got = splits[id(parameter)].gather(got)
            else:
                dist.all_reduce(got)
                got = got / 2
            got = None if lacks == 2 else got
        if got is None and wanted is not None and not wanted.any():
            continue
        if (got is None) != (wanted is None) or (got is not None and wanted is not None and not same(got, wanted)):
            wrong.append(name)
    return wrong


def pulled_back(layer: Any, kind: str, grad: Tensor | None) -> Tensor | None:
    """The gradient of L, C or D that the dense weight's gradient [out, in] implies: W_ii = L_i, W_ij = D_ij C_j."""
    c, d = layer.global_tensor("compressor_weight"), layer.global_tensor("decompressor_weight")
    if grad is None:
        return None
    p = layer.num_blocks
    grad = grad if grad.shape == (layer.out_features, layer.in_features) and not _turned(layer) else grad.T
    blocks = [row.chunk(p, 1) for row in grad.chunk(p, 0)]
    if kind == "weight":
        return torch.cat([blocks[i][i] for i in range(p)])
    cs = c.chunk(p, 0)
    ds = [
        dict(zip((j for j in range(p) if j != i), row.chunk(p - 1, 1), strict=True))
        for i, row in enumerate(d.chunk(p, 0))
    ]
    if kind == "compressor_weight":
        return torch.cat([sum(ds[i][j].T @ blocks[i][j] for i in range(p) if i != j) for j in range(p)])
    return torch.cat([torch.cat([blocks[i][j] @ cs[j].T for j in range(p) if j != i], 1) for i in range(p)])


def _turned(layer: Any) -> bool:
    return layer.dense_class.__name__ == "Conv1D"


def _words(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return f"{said} ({Path(where.filename).name}:{where.lineno})"


# All of them


def tried(name: str, limit_s: int) -> dict[str, Any]:
    """Examine an architecture in two processes, and give them up after a while."""
    with tempfile.TemporaryDirectory() as folder:
        pids = [_forked(name, rank, folder, limit_s) for rank in range(2)]
        deadline, left = time.monotonic() + limit_s, set(pids)
        while left and time.monotonic() < deadline:
            left -= {pid for pid in left if os.waitpid(pid, os.WNOHANG)[0]}
            time.sleep(0.01)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        results = [json.loads(p.read_text()) for rank in range(2) if (p := Path(folder, f"rank{rank}")).exists()]
    if len(results) < 2:
        what = f"not within {limit_s} s" if left else "its process died"
        return {"name": name, "class": class_of(name), **(results[0] if results else {}), "crashed": what}
    for each in ("one", "two"):
        if each in results[0]:
            results[0][each] = sorted({*results[0][each], *results[1].get(each, ["the other rank"])})
    for each in ("crashed", "not_run"):
        if each in results[1]:
            results[0].setdefault(each, results[1][each])
    return results[0]


def _forked(name: str, rank: int, folder: str, limit_s: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.alarm(limit_s + 5)
        sys.stdout = sys.stderr = open(os.devnull, "w")
        try:
            found = examine(name, rank, f"{folder}/store")
        except BaseException as error:
            found = {"name": name, "class": class_of(name), "crashed": _words(error)}
        Path(folder, f"rank{rank}.tmp").write_text(json.dumps(found))
        os.rename(f"{folder}/rank{rank}.tmp", f"{folder}/rank{rank}")
    finally:
        os._exit(0)


def verdict(found: dict[str, Any]) -> str:
    for key, word in (("not_built", "not built"), ("crashed", "crashed"), ("not_run", "not run")):
        if key in found:
            return f"{word}: {found[key]}"
    if "two" not in found:
        return "no linear to swap"
    wrong = [
        f"{where}: {', '.join(found[key][:3])}"
        for key, where in (("one", "one process"), ("two", "two ranks"))
        if found[key]
    ]
    return f"WRONG on {'; '.join(wrong)}" if wrong else "equal"


def line_of(found: dict[str, Any]) -> str:
    return f"{found['name']:34} {found.get('found', '-'):>4} of {found.get('wanted', '-'):>4}  {verdict(found)}"


def score(results: list[dict[str, Any]]) -> str:
    wanted, got = (sum(r.get(key, 0) for r in results) for key in ("wanted", "found"))
    words = [verdict(r).split(":")[0].split(" on ")[0] for r in results]
    counts = ", ".join(f"{words.count(w)} {w}" for w in dict.fromkeys(words))
    full = sum(r.get("wanted", 0) == r.get("found", -1) for r in results if r.get("wanted"))
    return (
        f"{got} of {wanted} feed-forward linears found ({got / max(wanted, 1):.1%}), all of them in {full} of "
        f"{sum(bool(r.get('wanted')) for r in results)} architectures that have any; of {len(results)}: {counts}"
    )


def table(results: list[dict[str, Any]]) -> str:
    """The results as a page of the documentation."""
    release = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
    lines = [
        "# Models",
        "",
        f"Written by `benchmarks/models.py` with {release}. Every architecture that an Auto class makes",
        "a model of, tiny and from its default config. *Found* are the linears that the plan makes phantom, of those",
        "that are feed-forward by name and sizes, as the benchmark judges by itself. *Equal*: at full width outputs",
        "and every gradient are the dense model's in float64, in one process with the whole batch and on two ranks",
        "with a half each. What was not built or not run says why: most needs other sizes or inputs than here.",
        "",
        score(results) + ".",
        "",
        "| architecture | class | found | at full width |",
        "|---|---|---|---|",
    ]
    for found in results:
        count = f"{found['found']} of {found['wanted']}" if "found" in found else "-"
        said = (
            verdict(found)
            .replace("|", "\\|")
            .replace("<", "&lt;")
            .replace("_", "\\_")
            .replace("*", "\\*")
            .replace("[", "\\[")
        )
        lines.append(f"| `{found['name']}` | `{found['class']}` | {count} | {said} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, required=True, help="one JSON line an architecture; what is there is not run again"
    )
    parser.add_argument("--only", nargs="*", help="model types (default: all)")
    parser.add_argument("--limit-s", type=int, default=120, help="seconds for one (default: 120)")
    parser.add_argument("--markdown", type=Path, help="write the table there, of what the results hold")
    args = parser.parse_args()
    done = (
        {r["name"]: r for r in map(json.loads, args.results.read_text().splitlines())} if args.results.exists() else {}
    )
    names = args.only if args.only is not None else architectures()
    if args.markdown is None:
        torch.set_num_threads(1)
        for common in ("llama", "t5", "vit", "wav2vec2"):  # what most import is there before the processes part
            make(common)
        for n, name in enumerate(names):
            if name not in done:
                done[name] = tried(name, args.limit_s)
                with args.results.open("a") as file:
                    print(json.dumps(done[name]), file=file)
            print(f"{n + 1:3}/{len(names)} {line_of(done[name])}", flush=True)
    results = [done[name] for name in names if name in done]
    print(score(results))
    if args.markdown:
        args.markdown.write_text(table(results))
    raise SystemExit(any(verdict(r).startswith("WRONG") for r in results))


if __name__ == "__main__":
    main()
